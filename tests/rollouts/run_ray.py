"""What the tests of the Ray engine look at, made in a process of its own, on a cluster of two machines that are both this one, the
second with more processors."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from posttrain.decoding.guidance import Guidance
from posttrain.decoding.vllm import load_vllm_guide
from posttrain.models.load import load_tokenizer
from posttrain.rollouts import ray as replicas
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.ray import RayEngine
from tests.rollouts.run_vllm import plain, refused, requests

work = json.load(sys.stdin)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=2)
os.environ["RAY_ADDRESS"] = cluster.address
asked = requests(work["prompts"], work["law"])
os.chdir(Path(work["guide"]).parent)  # of which Ray's processes know nothing
guide = load_vllm_guide(Path(work["guide"]).name, load_tokenizer(work["model"]), Guidance(delta=0))
handler = signal.getsignal(signal.SIGTERM)
with RayEngine(Path(os.path.relpath(work["model"])), dtype="float32", slots=8, guide=guide) as engine:
    found = {"replicas": len(engine._replicas), "settings": engine.settings, "fingerprint": engine.fingerprint}
    found["handler kept"] = signal.getsignal(signal.SIGTERM) is handler
    found["completions"] = plain(engine.generate(asked))
    found["guided"] = plain(engine.generate([dataclasses.replace(one, beta=0.5) for one in asked]))
    found["refused"] = [
        refused(lambda: engine.generate([Request(0, (5,) * 40, Sampling(max_tokens=500))])),
        refused(lambda: engine.generate([Request(0, (1000,), Sampling(max_tokens=5))])),
    ]
    never = Sampling(temperature=0, max_tokens=400, stop_ids=(0,))
    long = [Request(i, (5, 6, 7), never) for i in range(15)]
    running = engine.generate([*long, Request(15, (5,), Sampling(max_tokens=1))])
    assert next(running).request_id == 15
    ray.kill(engine._replicas[0])
    found["refused"].append(refused(lambda: list(running)))


@ray.remote
class Other:
    """What else a cluster is for: it holds what it is given."""


def held(**given: int) -> ray.actor.ActorHandle:
    other = Other.options(**given).remote()
    ray.get(other.__ray_ready__.remote())
    return other


replicas.PATIENCE = 20.0
ray.init(cluster.address)
processor = held(num_cpus=1)
found["refused"].append(refused(lambda: RayEngine(Path(work["model"]))))
ray.kill(processor)
cluster.add_node(num_cpus=2, num_gpus=2)  # GPUs are what a machine says that it has
one = held(num_gpus=1)
found["free GPUs"] = len(replicas._shares())
two = held(num_gpus=1)
found["refused"].append(refused(lambda: RayEngine(Path(work["model"]))))
ray.shutdown()
cluster.shutdown()
print()
print(json.dumps(found))
