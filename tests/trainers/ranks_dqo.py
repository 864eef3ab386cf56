"""Five steps of DQO on a small random model with tied embeddings; the launcher decides on how many ranks and under what ZeRO.

accelerate launch --use_deepspeed --zero_stage 3 --num_processes 2 tests/trainers/ranks_dqo.py OUT [--bf16] [--resume CHECKPOINT]
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.pipelines.ranks import leave, part
from posttrain.trainers.dqo import DQOConfig, DQOTrainer, labelled
from tests.small_models import BASE


def actor_critic() -> ActorCritic:
    torch.manual_seed(0)
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, tie_word_embeddings=True)).eval()
    critic = new_critic(policy, "reference")
    torch.nn.init.normal_(critic.head.weight, std=0.05)
    return ActorCritic(policy, critic)


def examples() -> list[dict]:
    """Completions of very different lengths: a mean over ranks of means over tokens is not the mean over tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(2, 101, (3 + i % 3 + 1 + 5 * i % 11,), generator=generator).tolist(),
            "first": 3 + i % 3,
            "reward": float(i % 2),
            "process_rewards": None,
            "behaviour_logprobs": None,
            "truncated": False,
            "prompt_id": str(i),
        }
        for i in range(40)
    ]


def trained(out: Path, rows: int, accumulation: int, bf16: bool = False, checkpoint: Path | None = None) -> DQOTrainer:
    """Every step takes eight examples, `rows` at a time on every rank; in the first only the value model learns."""
    model = actor_critic().bfloat16() if bf16 else actor_critic()
    data = labelled(model, examples(), "reference", out / "cache")
    arguments = DQOConfig(
        str(out / "run"),
        max_steps=5,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-3,
        value_learning_rate=3e-3,
        critic_warmup_steps=1,
        weight_decay=0.01,
        max_grad_norm=0.1,
        lam=0.9,
        beta=0.1,
        adam_epsilon=1e-3,  # where gradients are nearly zero Adam's steps are otherwise all sign and no size
        bf16=bf16,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
    )
    trainer = DQOTrainer(model, arguments, data)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def write_report(out: Path, trainer: Any) -> None:
    wrapped = trainer.model_wrapped
    report = {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "ranks": trainer.args.world_size,
        "engine": type(wrapped).__name__,
        "zero_stage": wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else 0,
    }
    (out / "report.json").write_text(json.dumps(report))


def main(out: Path, bf16: bool, checkpoint: Path | None) -> None:
    trainer = trained(out, 2, 4 // int(os.environ["WORLD_SIZE"]), bf16, checkpoint)
    trainer.save(out / "policy")
    if trainer.is_world_process_zero():
        write_report(out, trainer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    main(args.out, args.bf16, args.resume)
    part()
    leave(0)
