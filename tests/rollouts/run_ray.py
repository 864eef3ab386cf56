"""What the tests of the Ray engine look at, made in a process of its own, on a cluster of two machines that are both this one."""

import json
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.ray import RayEngine
from tests.rollouts.run_vllm import plain, refused, requests

work = json.load(sys.stdin)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
asked = requests(work["prompts"], work["law"])
with RayEngine(Path(work["model"]), dtype="float32", slots=8) as engine:
    found = {"replicas": len(engine._replicas), "settings": engine.settings, "fingerprint": engine.fingerprint}
    found["completions"] = plain(engine.generate(asked))
    found["refused"] = [
        refused(lambda: engine.generate([Request(0, (5,) * 40, Sampling(max_tokens=500))])),
        refused(lambda: engine.generate([Request(0, (5,), Sampling(max_tokens=5), beta=0.1)])),
    ]
    never = Sampling(temperature=0, max_tokens=400, stop_ids=(0,))
    long = [Request(i, (5, 6, 7), never) for i in range(15)]
    running = engine.generate([*long, Request(15, (5,), Sampling(max_tokens=1))])
    assert next(running).request_id == 15
    ray.kill(engine._replicas[0])
    found["refused"].append(refused(lambda: list(running)))
cluster.shutdown()
print()
print(json.dumps(found))
