import json

import pytest
import yaml

from posttrain.cli.main import main

SMALL = {"train_prompts": 10, "train_samples": 4, "test_prompts": 6, "k": 4, "layers": [1], "poolings": ["mean"]}


@pytest.fixture
def recipe(tmp_path):
    """(**fields) -> a configuration file"""

    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), **SMALL, **fields}))
        return str(path)

    return write


@pytest.mark.slow
def test_a_recipe_is_run_into_the_folder_of_the_command_line(tmp_path, recipe, capsys):
    assert main(["qprobe", "--config", recipe(), "--out", str(tmp_path / "other"), "--model", "tiny"]) == 0
    out = tmp_path / "other"
    assert not (tmp_path / "run").exists()
    assert json.loads((out / "summary.json").read_text())["manifest"]["config"]["train_prompts"] == 10
    assert list((out / "probe").glob("*.safetensors"))
    shown = capsys.readouterr().out
    assert "Q-Probe, best of 4" in shown and f"probe: {out}/probe" in shown


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_promts": 3}, "train_promts: unknown field (did you mean train_prompts?)"),
        ({"k": "many"}, "k: must be of type int"),
        ({"k": 1}, "k: must be at least 2"),
        ({"slots": 0}, "slots: must be at least 1"),
        ({"probe": {"loss": "polcy"}}, "probe.loss: must be one of"),
        ({"layers": [99]}, "layer"),
        ({"model": "./nowhere"}, "model: no such folder"),
        ({"train_split": "nowhere"}, "split: "),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_and_nothing_is_made(fields, message, tmp_path, recipe, capsys):
    assert main(["qprobe", "--config", recipe(**fields)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"posttrain: error: {message}") and shown.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there(capsys):
    assert main(["qprobe", "--config", "nowhere.yaml"]) == 2
    assert "config: no such file: nowhere.yaml" in capsys.readouterr().err
