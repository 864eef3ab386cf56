"""The demo on a handful of problems: what it does, not how well."""

from dataclasses import replace
from functools import partial

import pytest

from posttrain.pipelines import demo
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.value_training import ValueTraining

FULL = demo.Sizes(12, 6, (0.3, 1.0), replace(demo.GRPO, steps=3, prompts_per_step=2, samples=2, batch_size=4))
FAST = replace(FULL, test_prompts=5, sweep=(), online=replace(FULL.online, steps=1))
SIZES = {"train_samples": 4, "k": 4}
VALUE = ValueTraining(head="shared", learning_rate=3e-3, epochs=1, eval_fraction=0.3)


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo, "FULL", FULL)
    patch.setattr(demo, "FAST", FAST)
    patch.setattr(demo, "QProbeConfig", partial(QProbeConfig, **SIZES, layers=(1,), poolings=("mean",)))
    patch.setattr(demo, "QSharpConfig", partial(QSharpConfig, **SIZES, rollin_samples=2, guided_samples=3, value=VALUE))
