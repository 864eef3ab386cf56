"""Every recipe is a configuration that its command takes, and says how it is launched."""

import re
from pathlib import Path

import pytest

from posttrain.config import build, read_yaml
from posttrain.pipelines import recipe_memory as needs
from posttrain.pipelines.dqo import DQORunConfig
from posttrain.pipelines.grpo_lambda import GRPOLambdaRunConfig
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.recipe import names, read

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
    assert config.num_processes in (2, 8, 16)
    if config.deepspeed_config:
        settings = config.deepspeed_config["deepspeed_config_file"]
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        assert path.stem.startswith(f"zero{plugin.zero_stage}")
        assert "optimizer" not in plugin.hf_ds_config.config  # DQO's has a learning rate for each of two models


@pytest.mark.parametrize("name", names())
def test_a_header_says_what_is_reckoned(name):
    recipe = read(name)
    header = " ".join(line.lstrip("# ") for line in recipe.path.read_text().splitlines() if line.startswith("#"))
    small = recipe.config.model == "tiny" or "SmolLM2" in recipe.config.model
    gpus = None if recipe.launcher else 0 if small else 1
    peak = needs.peak(needs.reckon(recipe, needs.machine_for(recipe, gpus, 80))) / 1e9
    said = re.findall(r"([\d.]+) GB", header.partition("Memory (posttrain recipe check): ")[2])
    assert any(float(number) == pytest.approx(peak, rel=0.05, abs=0.06) for number in said), peak
    assert re.search(r"\b(minute|hour|day)", header), "how long it takes"
    assert re.search(r"\b([Oo]urs|[Pp]aper)", header), "where its values come from"
