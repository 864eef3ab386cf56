"""The demo on a handful of problems: what it does, not how well."""

from pathlib import Path
from typing import Any

import yaml

DEMO: dict[str, Any] = {
    **{
        "title": "a small demo",
        "about": "What it does, not how well.",
        "model": "tiny",
        "data": "arithmetic",
        "seed": 3,
    },
    **{"train_prompts": 12, "train_samples": 4, "test_prompts": 6, "k": 4, "shard_prompts": 6, "device": "cpu"},
    "stages": [
        {"method": "qprobe", "layers": [1], "poolings": ["mean"]},
        {
            **{"method": "qsharp", "rounds": 2, "rollin_samples": 2, "guided_samples": 3, "sweep": [0.3, 1.0]},
            "value": {"head": "shared", "learning_rate": 3e-3, "epochs": 1, "eval_fraction": 0.3},
        },
        {"method": "dqo", "baselines": ["rejection"], "test_samples": 2, "training": {"critic_warmup_steps": 1}},
        {
            **{"method": "grpo-lambda", "arms": ["grpo", "plain", "grpo_lambda"]},
            **{"validation_prompts": 0, "test_samples": 2},
            "training": {
                **{"steps": 3, "prompts_per_step": 2, "samples": 2, "batch_size": 4},
                **{"learning_rate": 5e-4, "gate_fraction": 0.5, "penalty_warmup_steps": 2},
            },
        },
    ],
}


def write(folder: Path, **changes: Any) -> Path:
    """The small demo as a file, with its run's folder beside it."""
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "run"), **DEMO, **changes}))
    return path
