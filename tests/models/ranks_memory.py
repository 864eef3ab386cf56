"""Two steps of DQO on a random model, of whose worst moment every rank says how many bytes it took, and were reckoned.

accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 --cpu tests/models/ranks_memory.py OUT ZERO [bf16]
"""

import json
import os
import sys
from pathlib import Path

import torch

from posttrain.models import memory
from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.models.memory import Batch, Launch
from posttrain.trainers.dqo import DQOConfig, DQOTrainer
from tests.models.test_memory import arguments, build, peak, reckoned, sizes_of

SIZES = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 3000}
ROWS, TIME, PROMPT = 2, 60, 20


def main(out: Path, zero: int | None, bf16: bool) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sizes = sizes_of(build(**SIZES), out / f"model-{rank}")  # before DeepSpeed shards whatever is built
    count = TIME - PROMPT
    example = {
        "input_ids": torch.randint(2, 100, (TIME,)).tolist(),
        "first": PROMPT,
        "rewards": [1.0] * count,
        "ref_logprobs": [-8.0] * count,
        "logprobs": [-8.0] * count,
        "ended": True,
    }

    def run() -> None:
        policy = build(**SIZES)
        model = ActorCritic(policy, new_critic(policy, "reference"))
        trainer = DQOTrainer(model, DQOConfig(**arguments(out / "run", ROWS, 1), bf16=bf16), [example] * 8)
        trainer._checked = True  # these reference log-probabilities are nobody's
        trainer.train()

    measured, launch = peak(run), Launch(ranks, zero)
    precision = "float32" if not bf16 else "autocast" if zero is None else "bfloat16"
    modules = memory.trained(sizes, sizes.parameters), memory.trained(sizes, sizes.body)
    batch = Batch(ROWS, TIME, count)
    head = memory.our_head(modules[0], batch, precision)
    total = reckoned(modules, batch, precision, head, accumulated=True, launch=launch)
    (out / f"rank-{rank}.json").write_text(json.dumps([measured, total]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) or None, "bf16" in sys.argv)
