"""Recipes: a configuration whose header says which command takes it and how that is launched."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config import build, read_yaml, within
from posttrain.data.load import check_data
from posttrain.errors import UserError, nearest
from posttrain.models.architecture import Architecture, architecture
from posttrain.models.memory import Launch
from posttrain.pipelines.dqo import DQORunConfig, check_launch
from posttrain.pipelines.engines import Sampler
from posttrain.pipelines.grpo_lambda import GRPOLambdaRunConfig, arguments
from posttrain.pipelines.pipeline import PipelineConfig, stages_of
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.rollout import RolloutConfig
from posttrain.provenance import read_json
from posttrain.rollouts.engine import Sampling

FOLDER = Path(__file__).parent / "recipes"  # the repository's, a part of the package
CONFIGS: dict[str, type] = {
    "qprobe": QProbeConfig,
    "qsharp": QSharpConfig,
    "dqo": DQORunConfig,
    "grpo-lambda": GRPOLambdaRunConfig,
    "pipeline": PipelineConfig,
}
COMMAND = re.compile(r"\bposttrain ([\w-]+)(?: --config|(?<=pipeline)) \S+")
LAUNCHER = re.compile(r"--config_file (\S+)")


@dataclass(frozen=True)
class Recipe:
    """name: of the file below `recipes`, or its path; about: its header's first line; line: what launches it; launcher:
    accelerate's configuration, None for a single process."""

    name: str
    path: Path
    about: str
    line: str
    command: str
    config: Any
    launcher: Path | None


def names() -> list[str]:
    """Of all recipes that the package has."""
    found = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/*.yaml"))
    return sorted(str(path) for path in found if path.parent.name != "accelerate")


def find(name: str) -> Path:
    """The file of a recipe's name, or a file of one's own. Errors: UserError naming `name`."""
    if Path(name).is_file():
        return Path(name)
    path = FOLDER / f"{name.removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    if not path.is_file() or path.parent.name == "accelerate":
        raise UserError(f"name: no recipe or file {name}{nearest(name, names())}; see posttrain recipe list")
    return path


def read(name: str, method: str | None = None) -> Recipe:
    """method: of the command that takes it, in one process; default: as its header says.

    Errors: UserError for a header without a launch line, a launcher that is not there, and as `build` says.
    """
    path = find(name)
    values = read_yaml(path)
    header = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    if method is None:
        line = next((line for line in header if COMMAND.search(line)), None)
        if line is None:
            raise UserError(
                f"method: {path} does not say which command takes it: give --method, one of {', '.join(CONFIGS)}, or begin the file "
                f'with a line such as "# posttrain dqo --config {path.name}"'
            )
        command = COMMAND.search(line)[1]  # type: ignore[index]
        if command not in CONFIGS:
            raise UserError(f"header: no command {command!r} takes recipes{nearest(command, CONFIGS)}; in {path}")
    else:
        if method not in CONFIGS:
            raise UserError(f"method: must be one of {', '.join(CONFIGS)}, got {method!r}{nearest(method, CONFIGS)}")
        command, line = method, f"posttrain {method} {'' if method == 'pipeline' else '--config '}{path}"
    launcher = LAUNCHER.search(line)
    if line.startswith("accelerate") and launcher is None:
        raise UserError(f"header: accelerate's line names no --config_file, in {path}")
    return Recipe(
        name=str(path.relative_to(FOLDER).with_suffix("")) if path.is_relative_to(FOLDER) else str(path),
        path=path,
        about=header[0] if header else "",
        line=line,
        command=command,
        config=build(CONFIGS[command], values),
        launcher=_beside(launcher[1], "header") if launcher else None,
    )


def launch_of(recipe: Recipe) -> Launch:
    """How its launch line runs it. Errors: UserError naming the launcher's field."""
    if recipe.launcher is None:
        return Launch()
    values = read_yaml(recipe.launcher)
    ranks = values.get("num_processes", 1)
    if values.get("distributed_type") != "DEEPSPEED":
        return Launch(ranks)
    settings = values.get("deepspeed_config", {}).get("deepspeed_config_file")
    if settings is None:
        raise UserError(f"deepspeed_config_file: missing in {recipe.launcher}")
    path = _beside(settings, "deepspeed_config_file")
    given = read_json(path, "deepspeed_config_file")
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        raise UserError(f"deepspeed_config_file: {path} has no zero_optimization with a stage")
    return Launch(ranks, zero["stage"], zero.get("offload_optimizer", {}).get("device", "none") != "none")


def line_for(recipe: Recipe, ranks: int) -> str:
    """Its launch line, for so many processes in all."""
    if recipe.launcher is None or launch_of(recipe).ranks == ranks:
        return recipe.line
    return recipe.line.replace(" -m posttrain", f" --num_processes {ranks} -m posttrain", 1)


def _beside(name: str, field: str) -> Path:
    """A file that a recipe or a launcher names: from here, else of the package."""
    for path in (Path(name), FOLDER / name.removeprefix("recipes/")):
        if path.is_file():
            return path
    raise UserError(f"{field}: no such file: {name}")


def validate(recipe: Recipe, ranks: int | None = None) -> None:
    """What the command itself would refuse, as far as it can be known without data and weights.

    ranks: the processes in all, where a launcher starts several; default: as many as it says.
    Errors: UserError naming the field.
    """
    launch = launch_of(recipe)
    check(recipe.command, recipe.config, replace(launch, ranks=ranks) if recipe.launcher and ranks else launch)


def check(command: str, config: Any, launch: Launch = Launch()) -> None:  # noqa: B008
    """As `validate`, of a configuration alone."""
    for data in {config.data, getattr(config, "test_data", None) or config.data}:
        check_data(data)
    sampling = Sampling(
        config.temperature, getattr(config, "top_p", 1.0), max_tokens=config.max_tokens, seed=config.seed
    )
    for name in ("train_samples", "test_samples", "k", "rollin_samples", "guided_samples", "validation_samples"):
        samples = getattr(config, name, 1)
        RolloutConfig(
            config.data, prompt=config.prompt, samples=samples, sampling=sampling, slots=config.slots,
            shard_prompts=config.shard_prompts,
        )  # fmt: skip
    if engine := getattr(config, "engine", None):
        Sampler(engine, config.urls, getattr(config, "dtype", None))
        if launch.ranks > 1 and engine in ("vllm", "ray"):
            raise UserError(f"engine: {engine} runs in one process; several are served by engine: service")
    model = architecture(config.model)
    _check_lengths("max_tokens", config.max_tokens, model)
    if command == "pipeline":
        for i, stage in enumerate(stages_of(config)):
            with within(f"stages[{i}]."):
                check(stage.method, stage.config)
    if command == "qprobe":
        _check_layers("layers", max(config.layers, default=0), model)
    if command == "qsharp":
        _check_layers("value.layers", config.value.layers or 0, value_base(config))
    if command == "dqo":
        _check_layers("training.value_layers", config.training.value_layers or 0, model)
        check_launch(config, launch.ranks, launch.zero is not None)
    if command == "grpo-lambda":
        _check_lengths("training.max_tokens", config.training.max_tokens, model)
        for arm in config.arms:
            arguments(config, arm, Path(config.out), True, launch.ranks)
    for part, name in (("training", "lora_rank"), ("training", "value_lora_rank"), ("value", "lora_rank")):
        if launch.zero == 3 and getattr(getattr(config, part, None), name, None):
            raise UserError(f"{part}.{name}: adapters cannot be merged under ZeRO-3; launch it with zero2.yaml")
    if launch.ranks > 1 and command in ("qprobe", "pipeline"):
        raise UserError(f"header: {command} runs in one process; launch it without accelerate")


def value_base(config: QSharpConfig) -> Architecture:
    """What the value model's backbone is made of. Errors: UserError naming `value.base`."""
    try:
        return architecture(config.value.base or config.model)
    except UserError as error:
        raise UserError(f"value.base: {str(error).removeprefix('model: ')}") from None


def _check_lengths(field: str, tokens: int, model: Architecture) -> None:
    if tokens >= model.context:
        raise UserError(f"{field}: {model.name} reads {model.context} tokens, prompt included, got {tokens}")


def _check_layers(field: str, layers: int, model: Architecture) -> None:
    if layers > model.layers:
        raise UserError(f"{field}: {model.name} has {model.layers} layers, got {layers}")
