import pytest
import yaml

from posttrain.cli.main import main
from posttrain.pipelines.recipe import names


def test_list_names_all(capsys):
    assert main(["recipe", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names())
    assert "Qwen/Qwen2-7B-Instruct" in shown


def test_show_prints_the_file(capsys):
    assert main(["recipe", "show", "dqo/arithmetic"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["out"] == "runs/dqo/arithmetic" and shown.startswith("# DQO on the embedded model")


def test_check_says_how_it_is_launched_and_that_it_fits(capsys):
    assert main(["recipe", "check", "dqo/qwen2_7b_gsm8k", "--gpus", "16"]) == 0
    shown = capsys.readouterr().out
    assert "dqo/qwen2_7b_gsm8k: every field is right" in shown
    assert (
        "launch: accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 16 -m posttrain dqo"
        in shown
    )
    assert "fits: " in shown and "of 80 GB" in shown


def test_check_of_what_does_not_fit_ends_with_1_and_what_to_change(capsys):
    assert main(["recipe", "check", "dqo/gemma_7b_gsm8k", "--gpus", "2"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit: training needs" in shown
    assert any("zero3_offload.yaml" in line and line.endswith("yes") for line in map(str.rstrip, shown.splitlines()))


def test_check_says_when_nothing_helps(capsys):
    assert main(["recipe", "check", "dqo/gemma_7b_gsm8k", "--gpu-memory", "24"]) == 1
    assert "no settings make it fit" in capsys.readouterr().out


@pytest.mark.parametrize("header", ["", "# posttrain qsharp --config mine.yaml\n"])
def test_check_of_a_file_of_one_s_own_is_told_its_method(header, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(f"{header}model: tiny\nout: {tmp_path}/run\ntrain_samples: 4\n")
    assert main(["recipe", "check", str(file), "--method", "dqo"]) == 0
    shown = capsys.readouterr().out
    assert f"{file}: every field is right\nlaunch: posttrain dqo --config {file}\n" in shown
    assert main(["recipe", "check", str(file), "--method", "dpo"]) == 2
    assert "method: must be one of qprobe, qsharp, dqo," in capsys.readouterr().err


def test_check_without_gpus(capsys):
    assert main(["recipe", "check", "dqo/arithmetic", "--gpus", "0"]) == 0
    shown = capsys.readouterr().out
    assert "GB of memory" in shown and "needs 0." in shown and "fits" not in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check"], "name: check which recipe? see posttrain recipe list"),
        (["list", "dqo"], "name: list has none"),
        (["show", "dqo/arithmetik"], "name: no recipe or file dqo/arithmetik (did you mean dqo/arithmetic?)"),
        (["check", "dqo/arithmetic", "--gpus", "-1"], "--gpus: must not be negative"),
        (["check", "grpo_lambda/qwen3_8b_math", "--gpus", "6"], "training.batch_size: in 6 processes 48 completions"),
        (["tell", "dqo/arithmetic"], "verb: invalid choice: 'tell'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(["recipe", *argv]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"posttrain: error: {message}") and shown.count("\n") == 1
