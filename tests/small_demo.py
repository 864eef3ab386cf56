"""The demo on a handful of problems: what it does, not how well."""

from functools import partial

import pytest

from posttrain.pipelines import demo
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.value_training import ValueTraining

SIZES = {"train_prompts": 12, "train_samples": 4, "test_prompts": 6, "k": 4}
VALUE = ValueTraining(head="shared", learning_rate=3e-3, epochs=1, eval_fraction=0.3)


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo, "QProbeConfig", partial(QProbeConfig, **SIZES, layers=(1,), poolings=("mean",)))
    patch.setattr(demo, "QSharpConfig", partial(QSharpConfig, **SIZES, rollin_samples=2, guided_samples=3, value=VALUE))
