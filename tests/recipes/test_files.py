"""Every recipe is a configuration that its command takes, and says how it is launched."""

from pathlib import Path

import pytest

from posttrain.config import build, read_yaml
from posttrain.pipelines.dqo import DQORunConfig
from posttrain.pipelines.grpo_lambda import GRPOLambdaRunConfig
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig

COMMANDS = {
    "qprobe": ("qprobe", QProbeConfig),
    "qsharp": ("qsharp", QSharpConfig),
    "dqo": ("dqo", DQORunConfig),
    "grpo_lambda": ("grpo-lambda", GRPOLambdaRunConfig),
}
RECIPES = sorted(path for folder in COMMANDS for path in Path("recipes", folder).glob("*.yaml"))
LAUNCHERS = sorted(Path("recipes/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_is_a_configuration_and_names_its_command(path):
    command, config = COMMANDS[path.parent.name]
    assert build(config, read_yaml(path)).out == f"runs/{path.parent.name}/{path.stem}"
    lines = [line for line in path.read_text().splitlines() if f"posttrain {command} --config {path}" in line]
    assert lines, f"no command line in {path}"
    for word in lines[0].split():
        if word.startswith("recipes/"):
            assert Path(word).is_file()


@pytest.mark.parametrize("path", LAUNCHERS, ids=str)
def test_accelerate_takes_its_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DeepSpeedPlugin

    config = load_config_from_file(str(path))
    assert config.num_processes in (2, 8)
    if config.deepspeed_config:
        settings = config.deepspeed_config["deepspeed_config_file"]
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        assert f"zero{plugin.zero_stage}" in path.stem
        assert "optimizer" not in plugin.hf_ds_config.config  # DQO's has a learning rate for each of two models
