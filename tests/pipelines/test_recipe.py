"""What is refused of a recipe, and that all of ours are right and fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from posttrain.errors import UserError
from posttrain.models.memory import Launch
from posttrain.pipelines.recipe import FOLDER, launch_of, line_for, names, read, validate

ACCELERATE = "accelerate launch --config_file recipes/accelerate/zero3.yaml -m "


@pytest.mark.parametrize("name", names())
def test_our_own_are_right(name):
    recipe = read(name)
    validate(recipe)
    assert recipe.command.replace("-", "_") == Path(name).parts[0]
    assert f"recipes/{name}.yaml" in recipe.line


def test_every_recipe_file_is_listed():
    files = {path for path in Path("recipes").rglob("*.yaml") if path.parent.name != "accelerate"}
    assert {f"recipes/{name}.yaml" for name in names()} == set(map(str, files))


def test_a_recipe_is_found_by_name_by_file_and_from_elsewhere(tmp_path, monkeypatch):
    path = Path("recipes/dqo/arithmetic.yaml").resolve()
    assert read("recipes/dqo/arithmetic.yaml").config == read(str(path)).config
    monkeypatch.chdir(tmp_path)
    for name in ("dqo/arithmetic", "recipes/dqo/arithmetic.yaml", "dqo/arithmetic.yaml"):
        assert read(name).config == read(str(path)).config
    assert launch_of(read("dqo/qwen2_7b_gsm8k")) == Launch(8, 3)


@pytest.mark.parametrize(
    ("launcher", "launch"),
    [
        ("ddp", Launch(8)),
        ("ddp2_cpu", Launch(2)),
        ("zero2", Launch(8, 2)),
        ("zero3", Launch(8, 3)),
        ("zero3_offload", Launch(8, 3, True)),
    ],
)
def test_a_launcher_says_how_it_is_run(launcher, launch, tmp_path):
    header = f"accelerate launch --config_file recipes/accelerate/{launcher}.yaml -m posttrain dqo --config x.yaml"
    (tmp_path / "x.yaml").write_text(f"# {header}\nout: x\n")
    recipe = read(str(tmp_path / "x.yaml"))
    assert launch_of(recipe) == launch
    assert line_for(recipe, launch.ranks) == header
    assert line_for(recipe, 16) == header.replace(" -m ", " --num_processes 16 -m ")


BROKEN = [  # what is put into a right recipe, its launch line, and the words that it is refused with
    ("dqo", {"train_promts": 3}, "train_promts: unknown field (did you mean train_prompts?)"),
    ("dqo", {"training": {"learning_rat": 1e-5}}, "training.learning_rat: unknown field (did you mean learning_rate?)"),
    ("dqo", {"training": {"gradient_checkpoint": True}}, "(did you mean gradient_checkpointing?)"),
    ("dqo", {"training": {"normalisation": "tokens"}}, "must be one of token, seq, got 'tokens' (did you mean token?)"),
    ("dqo", {"training": {"batch_size": 2.5}}, "training.batch_size: must be of type int, got 2.5"),
    ("dqo", {"training": {"beta": 0}}, "training.beta: must be positive and finite, got 0.0"),
    ("dqo", {"training": [1]}, "training: must be a mapping, got [1]"),
    ("dqo", {"baselines": ["dop"]}, "must be one of rejection, dpo, kto, got 'dop' (did you mean dpo?)"),
    ("dqo", {"max_tokens": 512}, "max_tokens: tiny reads 512 tokens, prompt included, got 512"),
    ("dqo", {"training": {"value_layers": 9}}, "training.value_layers: tiny has 4 layers, got 9"),
    ("dqo", {"prompt": "Solve it."}, "prompt: the template must contain {problem}"),
    ("dqo", {"data": "gsm8"}, "data: no data set or file named gsm8 (did you mean gsm8k?)"),
    ("dqo", {"data": "./none.jsonl"}, "data: no such file: none.jsonl"),
    ("dqo", {"model": "./nowhere"}, "model: no such folder or file: ./nowhere"),
    ("dqo", {"temperature": -1}, "temperature: must be 0 (greedy) or a finite number"),
    ("dqo", {"out": None}, "out: must be of type str, got None"),
    ("dqo", {"test_split": "train"}, "test_split: train is the training split too"),
    (f"{ACCELERATE}posttrain dqo", {"training": {"lora_rank": 8}}, "training.lora_rank: adapters cannot be merged"),
    (f"{ACCELERATE}posttrain dqo", {"baselines": ["dpo"]}, "baselines: are trained in one process or under DDP"),
    (f"{ACCELERATE}posttrain dqo", {"engine": "vllm"}, "engine: vllm runs in one process; several are served by engine: service"),
    ("dqo", {"engine": "service"}, "urls: give at least one, as in --url http://127.0.0.1:8000"),
    ("grpo-lambda", {"urls": ["http://127.0.0.1:8000"]}, "urls: they are the service's; with them goes engine: service"),
    ("pipeline", {"stages": [{"method": "grpo-lambda", "engine": "service"}]}, "stages[0].urls: give at least one"),
    ("qsharp", {"value": {"head": "w"}}, "value.head: must be one of v, q, shared, got 'w'"),
    ("qsharp", {"value": {"layers": 9}}, "value.layers: tiny has 4 layers, got 9"),
    ("qsharp", {"value": {"base": "./nowhere"}}, "value.base: no such folder or file: ./nowhere"),
    ("qsharp", {"guidance": {"candidate": 3}}, "guidance.candidate: unknown field (did you mean candidates?)"),
    ("qprobe", {"layers": [2, 5]}, "layers: tiny has 4 layers, got 5"),
    ("qprobe", {"poolings": ["max"]}, "poolings[0]: must be one of last, mean, got 'max'"),
    ("grpo-lambda", {"arms": ["grpo_lamda"]}, "got 'grpo_lamda' (did you mean grpo_lambda?)"),
    ("grpo-lambda", {"training": {"trl": {"use_vlm": 1}}}, "use_vlm: no argument of TRL's GRPOConfig (did you mean use_vllm?)"),
    ("grpo-lambda", {"training": {"batch_size": 7}}, "batch_size: must divide prompts_per_step * samples, 256, got 7"),
    ("grpo-lambda", {"training": {"gate_fraction": 2.0}}, "gate_fraction: must be between 0 and 1, got 2.0"),
    ("grpo_lambda", {}, "header: no command 'grpo_lambda' takes recipes (did you mean grpo-lambda?)"),
    ("dpo", {}, "header: no command 'dpo' takes recipes (did you mean dqo?)"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "fields", "message"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_broken_recipe_is_refused_with_the_right_words(command, fields, message, tmp_path, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_DATA", raising=False)
    path = tmp_path / "recipe.yaml"
    line = command if command.startswith("accelerate") else f"posttrain {command}"
    path.write_text(f"# {line} --config recipe.yaml\n{yaml.safe_dump({'out': 'runs/x', **fields})}")
    with pytest.raises(UserError) as refused:
        validate(read(str(path)))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("grpo_lambda/qwen3_8b_math", 6, "training.batch_size: in 6 processes 48 completions go forward at once"),
        ("dqo/qwen2_7b_gsm8k", 10**6, "training.critic_warmup_steps: must be less than the run's 1 steps"),
    ],
)
def test_what_so_many_processes_cannot_train_is_refused(name, ranks, message):
    validate(read(name))
    with pytest.raises(UserError) as refused:
        validate(read(name), ranks)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "out: x\n",
            r"^method: .* give --method, one of qprobe, qsharp, dqo, grpo-lambda, pipeline, or .* \"# posttrain dqo --config x.yaml\"",
        ),
        ("# posttrain dqo --config x.yaml\nout: x\nseed: 1\nseed: 2\n", "seed: stands twice, again in line 4"),
        ("# posttrain dqo --config x.yaml\nmodel: tiny\n", "out: missing"),
        ("# posttrain dqo --config x.yaml\nout: [x\n", "config: .* is not YAML"),
        ("# posttrain dqo --config x.yaml\n- out\n", "config: .* must be a mapping of field to value"),
        ("# accelerate launch -m posttrain dqo --config x.yaml\nout: x\n", "accelerate's line names no --config_file"),
        (
            f"# {ACCELERATE.replace('zero3', 'zero4')}posttrain dqo --config x.yaml\nout: x\n",
            "no such file: recipes/acc",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "x.yaml"))


def test_a_name_that_is_none_gets_a_suggestion():
    with pytest.raises(UserError, match=r"did you mean dqo/gemma_7b_math\?"):
        read("dqo/gemma_7b")
    with pytest.raises(UserError, match="no recipe or file accelerate/zero3"):
        read("accelerate/zero3")


def test_the_package_has_the_recipes():
    assert FOLDER.resolve() == Path("recipes").resolve()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is damaged"), ("[]", "no zero_optimization"), ('{"zero_optimization": {}}', "no zero")]
)
def test_a_deepspeed_file_that_is_none_is_one_line(text, message, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    launcher = {"num_processes": 2, "distributed_type": "DEEPSPEED"}
    launcher["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(launcher))
    recipe = replace(read("dqo/qwen2_7b_gsm8k"), launcher=tmp_path / "zero.yaml")
    with pytest.raises(UserError, match=f"^deepspeed_config_file: .*ds.json .*{message}"):
        launch_of(recipe)
