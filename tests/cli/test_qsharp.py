import json

import pytest
import yaml

from posttrain.cli.main import main
from posttrain.record import read_attempts, read_metrics, read_status

SMALL = {
    **{"train_prompts": 10, "train_samples": 4, "rounds": 1, "test_prompts": 4, "k": 3, "guided_samples": 1},
    "shard_prompts": 5,
    "value": {"head": "shared", "learning_rate": 3e-3, "epochs": 1, "batch_size": 8, "eval_fraction": 0.3},
}


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
    """Stage after stage, each alone."""
    out = tmp_path / "other"
    for stage in (["collect", "--round", "1"], ["train", "--round", "1"]):
        assert main(["qsharp", "--config", recipe(), "--out", str(out), "--model", "tiny", "--stage", *stage]) == 0
    assert not (tmp_path / "run").exists() and not (out / "summary.json").exists()
    capsys.readouterr()
    assert main(["qsharp", "--config", recipe(), "--out", str(out), "--stage", "evaluate"]) == 0
    assert json.loads((out / "summary.json").read_text())["manifest"]["config"]["train_prompts"] == 10
    assert read_status(out).state == "finished" and len(read_attempts(out)) == 3
    assert any(row["part"] == "round-1/value" and "eval_auc" in row for row in read_metrics(out))
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for sample in (sample for each in samples for sample in each["samples"]):
        assert len(sample["values"]) == sample["tokens"] and all(0 <= value <= 1 for _, value in sample["values"])
        assert "".join(text for text, _ in sample["values"]).startswith(sample["completion"])
    page, shown = (out / "report.html").read_text(), capsys.readouterr().out
    assert "Q#, round 1, beta 0.1" in shown and f"guide: {out}/round-1/value" in shown
    assert all(f"<td>{name}</td>" in page for name in ("Q#", "CD", "reward model", "weighted majority"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_promts": 3}, "train_promts: unknown field (did you mean train_prompts?)"),
        ({"k": 1}, "k: must be at least 2"),
        ({"beta": 0}, "beta: must be at least 1e-09 and finite, got 0.0"),
        ({"value": {"head": "w"}}, "value.head: must be one of v, q, shared"),
        ({"value": {"epochs": 0}}, "value.epochs: must be positive, got 0.0"),
        ({"value": {"atoms": [1, 0]}}, "value.atoms: must be at least two increasing numbers"),
        ({"value": {"head": "v", "base": "./nowhere"}}, "value.base: no such folder: ./nowhere"),
        ({"guidance": {"candidates": 0}}, "guidance.candidates: must be at least 1, got 0"),
        ({"guidance": {"law": "cd"}}, "guidance.law: a run measures both laws"),
        ({"model": "./nowhere"}, "model: no such folder"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_and_nothing_is_made(fields, message, tmp_path, recipe, capsys):
    assert main(["qsharp", "--config", recipe(**fields)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"posttrain: error: {message}") and shown.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--round", "1"], "round: it goes with --stage collect or --stage train"),
        (["--stage", "evaluate", "--round", "1"], "round: it goes with --stage collect or --stage train"),
        (["--stage", "train", "--round", "2"], "round: must be between 1 and the configuration's rounds, 1, got 2"),
        (["--stage", "trian"], "--stage: invalid choice: 'trian'"),
        (["--stage", "train"], "stage: round 1 is not collected, or not all of it, in "),
        (["--stage", "evaluate"], "stage: round 1 has no value model in "),
    ],
)
def test_a_stage_says_what_it_lacks(options, message, tmp_path, recipe, capsys):
    assert main(["qsharp", "--config", recipe(), *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"posttrain: error: {message}") and shown.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
