"""Every command of the README and the docs: the small ones are run, smaller still; of the others the arguments and recipes are read."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from posttrain.cli.main import command_of, main
from posttrain.pipelines.recipe import find, read, validate
from tests.small_demo import DEMO

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
STARTS = re.compile(r"(posttrain|accelerate|make|curl|python|pip|source) ")


def commands(page: str) -> list[str]:
    """Of blocks of shell, fenced or, without a language, indented; comments left out."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    fenced = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = [line for line in outside.splitlines() if line.startswith("    ") and STARTS.match(line.strip())]
    return [line.strip() for line in (*fenced, *indented) if line.strip()]


ALL = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), ALL, ids=lambda value: value[:60])
def test_a_command_s_arguments_and_its_recipe_are_right(page, line):
    assert STARTS.match(line), f"{page}: only commands stand in blocks of sh"
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    if words[0] == "accelerate":
        launcher = Path(words[words.index("--config_file") + 1])
        assert launcher.parent == Path("recipes/accelerate") and (ROOT / launcher).is_file()
        words = words[words.index("-m") + 1 :]
    if words[0] == "posttrain":
        command, *rest = words[1:]
        command_of(command)[1].parse_args(rest)
        for word in rest:
            if word.startswith("recipes/") or (command == "recipe" and "/" in word):
                validate(read(word))


SMALL = {
    **{"train_prompts": 8, "train_samples": 4, "test_prompts": 4, "test_samples": 2, "k": 2, "rollin_samples": 2},
    **{"guided_samples": 1, "sweep": [], "validation_prompts": 0, "shard_prompts": 8, "max_tokens": 96, "layers": [1]},
    **{"baselines": ["rejection"], "arms": ["grpo_lambda"]},
}
SMALL_TRAINING = {
    "qsharp": {"value": {"head": "shared", "epochs": 1, "eval_fraction": 0.3, "drop_unanimous": False}},
    "dqo": {"training": {"batch_size": 8, "critic_warmup_steps": 0}},
    "grpo-lambda": {"training": {"steps": 1, "prompts_per_step": 2, "samples": 2, "batch_size": 4}},
}
FEWER = {"--samples": "2", "--limit": "2", "--n": "2", "--beta": "0.3"}


def smaller(words: list[str], folder: Path) -> list[str]:
    """The same command with less to do, on recipes of the embedded model; itself where there is nothing to make smaller."""
    done = list(words)
    for option, value in FEWER.items():
        if option in done:
            done[done.index(option) + 1] = value
    if (
        words[1] in ("eval", "rollout")
        and words[2] not in ("list", "report", "grade", "export", "overlap")
        and "--limit" not in done
    ):
        done += ["--limit", "2"]
    for i, word in enumerate(words):
        if word.startswith("recipes/") and word.endswith(".yaml"):
            recipe = read(word)
            values = yaml.safe_load(find(word).read_text())
            if recipe.command == "pipeline":
                values = {**DEMO, "out": values["out"], "stages": DEMO["stages"][:2]}  # all of it: test_pipeline.py
            else:
                fields = vars(recipe.config)
                values |= {name: value for name, value in SMALL.items() if fields.get(name) not in (None, ())}
                values |= SMALL_TRAINING.get(recipe.command, {})
            path = folder / f"{Path(word).parent.name}-{Path(word).name}"
            path.write_text(yaml.safe_dump(values))
            done[i] = str(path)
    return done


def is_small(line: str) -> bool:
    """On the embedded model, or on none."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["posttrain"] or words[1] in ("serve", "rollout-service"):
        return False
    recipes = [word for word in words if word.startswith("recipes/")]
    if words[1] in ("grade", "recipe", "doctor"):
        return True
    return all(read(word).config.model == "tiny" for word in recipes) if recipes else "tiny" in line or "list" in words


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_small_commands_run(tmp_path, monkeypatch, capsys):
    """In the order of the pages, in one folder: what one leaves another may read."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = list(dict.fromkeys(line.partition("  #")[0].strip() for _, line in ALL if is_small(line)))
    order = ("qsharp", "pipeline", "qprobe", "dqo", "grpo-lambda")  # what leaves guides before what reads them
    lines.sort(key=lambda line: order.index(line.split()[1]) if line.split()[1] in order else len(order))
    ran = set()
    for line in lines:
        words = smaller(shlex.split(line, comments=True), tmp_path)
        if "--out" in words and Path(words[words.index("--out") + 1]).exists():
            continue  # the same command on another page, which writes there too
        assert main(words[1:]) in ((0, 1) if words[1] == "doctor" else (0,)), f"{line}\n{capsys.readouterr().err}"
        ran.add(words[1])
    assert ran >= {"pipeline", "qprobe", "qsharp", "dqo", "grpo-lambda", "rollout", "eval", "grade", "recipe", "doctor"}
    assert os.path.exists("runs/demo/report.html")
