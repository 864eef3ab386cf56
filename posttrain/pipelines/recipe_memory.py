"""What a recipe needs of each GPU, stage by stage, whether it is there, and what to change where it is not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import UserError
from posttrain.models import memory
from posttrain.models.architecture import Architecture, architecture
from posttrain.models.memory import BFLOAT16, FLOAT32, Batch, Launch, Precision, Trained
from posttrain.pipelines.pipeline import stages_of
from posttrain.pipelines.recipe import Recipe, launch_of, value_base
from posttrain.rollouts.transformers import PREFILL_TOKENS
from posttrain.rollouts.vllm import MEMORY_SHARE

GB = 1e9
FREE = 0.05  # of a GPU: CUDA's own, and what fragmentation wastes
PROMPT = {"arithmetic": 40}  # tokens of the longest prompt, data set by data set
LONG_PROMPT = 256  # of all others
FEATURE_TOKENS = 8192  # models/features.py: in one forward
Parts = dict[str, int]
Stages = dict[str, Parts]  # stage -> part -> bytes on one rank


@dataclass(frozen=True)
class Machine:
    """gpus: of all machines together, 0 for none; memory: bytes of each."""

    gpus: int
    memory: int

    @property
    def usable(self) -> float:
        return (1 - FREE) * self.memory


@dataclass(frozen=True)
class Knob:
    """A change, the recipe with it, and what would then be the most that a rank needs."""

    change: str
    recipe: Recipe
    peak: int


def machine_for(recipe: Recipe, gpus: int | None, gigabytes: float) -> Machine:
    """gpus: default as many as the recipe's launcher starts processes."""
    launch = launch_of(recipe)
    if gpus is not None and gpus < 0:
        raise UserError(f"--gpus: must not be negative, got {gpus}; 0 is a machine without any")
    if not gigabytes > 0:
        raise UserError(f"--gpu-memory: must be positive, got {gigabytes:g}")
    return Machine(launch.ranks if gpus is None else gpus, int(gigabytes * GB))


def reckon(recipe: Recipe, machine: Machine) -> Stages:
    """Bytes on one rank, of every stage of a run."""
    launch = launch_of(recipe)
    launch = replace(launch, ranks=max(1, machine.gpus)) if recipe.launcher else launch
    return STAGES[recipe.command](recipe.config, launch, machine)


def peak(stages: Stages) -> int:
    return max(sum(parts.values()) for parts in stages.values())


def on_host(recipe: Recipe, machine: Machine) -> int:
    """What all ranks together keep in memory of the machines' own: DeepSpeed's offloaded optimiser."""
    launch = launch_of(recipe)
    return sum(memory.host_state(module) for module in _learning(recipe)) if launch.offload and machine.gpus else 0


def knobs(recipe: Recipe, machine: Machine) -> list[Knob]:
    """What lowers the peak, the best first. One that has many steps is turned until it fits, or helps no more."""
    before, found = peak(reckon(recipe, machine)), []
    for turn in (_launchers, _switches, _halved):
        for changes in turn(recipe):
            best: Knob | None = None
            for change, changed in changes:
                lower = peak(reckon(changed, machine))
                if lower > 0.99 * (best.peak if best else before):
                    break
                best = Knob(change, changed, lower)
                if lower <= machine.usable:
                    break
            if best is not None:
                found.append(best)
    return sorted(found, key=lambda knob: knob.peak)


def way(recipe: Recipe, machine: Machine) -> list[Knob]:
    """One change after the other until it fits, each on top of those before it, or until nothing helps."""
    steps: list[Knob] = []
    while (steps[-1].peak if steps else math.inf) > machine.usable:
        turned = knobs(steps[-1].recipe if steps else recipe, machine)
        if not turned:
            break
        steps.append(turned[0])
    return steps


def _part(recipe: Recipe) -> str:
    """The field that says how it trains."""
    return "value" if recipe.command == "qsharp" else "training"


def _launchers(recipe: Recipe) -> Iterator[Iterator[tuple[str, Recipe]]]:
    if recipe.launcher is None or getattr(recipe.config, "baselines", None):
        return
    settings = getattr(recipe.config, _part(recipe))
    adapters = any(getattr(settings, name, None) for name in ("lora_rank", "value_lora_rank"))
    for name in ("zero2", "zero3", "zero3_offload"):
        path = recipe.launcher.with_name(f"{name}.yaml")
        if path.is_file() and path != recipe.launcher and not (adapters and name != "zero2"):
            yield iter([(f"--config_file recipes/accelerate/{name}.yaml", replace(recipe, launcher=path))])


def _switches(recipe: Recipe) -> Iterator[Iterator[tuple[str, Recipe]]]:
    """Settings that are on or off."""
    part = _part(recipe)
    settings = getattr(recipe.config, part, None)
    zero3 = launch_of(recipe).zero == 3
    changes: list[dict[str, Any]] = [{"bf16": True}, {"gradient_checkpointing": True}]
    if recipe.command == "dqo" and not zero3:
        changes.append({"lora_rank": 32, "value_lora_rank": 32})
    elif not zero3:
        changes.append({"lora_rank": 32})
    for change in changes:
        if settings is None or getattr(settings, "head", None) == "shared":
            continue
        if all(getattr(settings, name) in (None, False, 0) for name in change):
            text = ", ".join(f"{part}.{name}: {str(value).lower()}" for name, value in change.items())
            yield iter([(text, _with(recipe, part, change))])


def _halved(recipe: Recipe) -> Iterator[Iterator[tuple[str, Recipe]]]:
    """Sizes that may be smaller: half, a quarter, ..."""
    config = recipe.config
    part = _part(recipe)
    if hasattr(config, part):
        yield _batches(recipe, part)
    yield (
        (f"slots: {config.slots >> i}", replace(recipe, config=replace(config, slots=config.slots >> i)))
        for i in range(1, config.slots.bit_length())
    )
    if recipe.command == "grpo-lambda" and config.training.trl.get("use_vllm"):
        share = config.training.trl.get("vllm_gpu_memory_utilization", VLLM_SHARE)
        yield (
            (
                f"training.trl.vllm_gpu_memory_utilization: {share * i / 10:.2f}",
                _with(
                    recipe,
                    "training",
                    {"trl": {**config.training.trl, "vllm_gpu_memory_utilization": share * i / 10}},
                ),
            )
            for i in (8, 6)
        )


def _batches(recipe: Recipe, part: str) -> Iterator[tuple[str, Recipe]]:
    settings = getattr(recipe.config, part)
    size = settings.batch_size
    while size > 1 and size % 2 == 0:
        size //= 2
        change = {"batch_size": size}
        if hasattr(settings, "accumulation"):
            change["accumulation"] = settings.batch_size * settings.accumulation // size
        text = ", ".join(f"{part}.{name}: {value}" for name, value in change.items())
        yield text, _with(recipe, part, change)


def _with(recipe: Recipe, part: str, change: dict[str, Any]) -> Recipe:
    settings = replace(getattr(recipe.config, part), **change)
    return replace(recipe, config=replace(recipe.config, **{part: settings}))


VLLM_SHARE = 0.3  # TRL's default of vllm_gpu_memory_utilization


def _time(config: Any, model: Architecture, tokens: int) -> int:
    return min(model.context, PROMPT.get(config.data, LONG_PROMPT) + tokens)


def _precision(bf16: bool, launch: Launch) -> Precision:
    return "float32" if not bf16 else "autocast" if launch.zero is None else "bfloat16"


def _sampling(config: Any, model: Architecture, width: int, machine: Machine) -> Parts:
    """Our engine, or vLLM, for which the policy leaves the GPU; a service's memory is not this machine's."""
    if config.engine == "service":
        return {"policy": width * model.parameters}
    if config.engine != "transformers" and machine.gpus:
        return {"vLLM": int(MEMORY_SHARE * machine.memory)}
    return _ours(config, model, width)


def _ours(config: Any, model: Architecture, width: int) -> Parts:
    """Our engine with `slots` requests."""
    time = _time(config, model, config.max_tokens)
    return {
        "policy": width * model.parameters,
        "KV cache": memory.kv_cache(model, config.slots, time, width),
        "logits": 4 * FLOAT32 * config.slots * model.vocabulary,  # scaled, as noise, as log-probabilities, and sorted
        "activations": memory.forward(model, PREFILL_TOKENS, width),
    }


def _dqo(config: Any, launch: Launch, machine: Machine) -> Stages:
    settings, model = config.training, architecture(config.model)
    time = _time(config, model, config.max_tokens)
    batch = Batch(settings.batch_size, time, config.max_tokens, settings.gradient_checkpointing, settings.packing)
    precision = _precision(settings.bf16, launch)
    policy, critic = _actor_critic(config)
    states = [memory.state(module, precision, launch) for module in (policy, critic)]
    gradients = sum(part["gradients"] for part in states)
    accumulated = settings.accumulation > 1 or launch.ranks > 1
    head = memory.our_head(policy, batch, precision)
    waiting = 0 if machine.gpus else FLOAT32 * model.parameters  # a GPU's goes to the machine's own memory
    stages = {"sampling": _sampling(config, model, FLOAT32, machine)}
    if launch.zero == 3:
        whole = {"policy": FLOAT32 * policy.weights, "value model": FLOAT32 * critic.weights}
        stages["start"] = whole  # every rank has both whole before DeepSpeed shares them out
    stages["training"] = {
        "policy that sampled": waiting,
        "policy": states[0]["weights"],
        "value model": states[1]["weights"],
        "gradients": gradients,
        "optimiser": sum(part["optimiser"] for part in states),
        "DeepSpeed's buffers": memory.zero_buffers((policy, critic), precision, launch),
        "activations": memory.backward((policy, critic), batch, precision, head, gradients, accumulated),
    }
    return stages


def _actor_critic(config: Any) -> tuple[Trained, Trained]:
    settings, model = config.training, architecture(config.model)
    shared = None not in (settings.lora_rank, settings.value_lora_rank)
    policy = memory.trained(model, model.parameters, settings.lora_rank)
    critic = memory.trained(
        model, 0 if shared else model.body + model.hidden + 1, settings.value_lora_rank, settings.value_layers
    )
    return policy, critic


def _grpo_lambda(config: Any, launch: Launch, machine: Machine) -> Stages:
    settings, model = config.training, architecture(config.model)
    time = _time(config, model, settings.max_tokens)
    batch = Batch(settings.batch_size, time, settings.max_tokens, settings.gradient_checkpointing)
    precision = _precision(settings.bf16, launch)
    policy = memory.trained(model, model.parameters, settings.lora_rank)
    state = memory.state(policy, precision, launch)
    completions = settings.prompts_per_step * settings.samples
    accumulated = completions > settings.batch_size or launch.ranks > 1
    share = settings.trl.get("vllm_gpu_memory_utilization", VLLM_SHARE)
    vllm = settings.trl.get("use_vllm") and settings.trl.get("vllm_mode", "colocate") == "colocate"
    always = {
        "policy that sampled": 0 if machine.gpus else FLOAT32 * model.parameters,
        "policy": state["weights"],
        "reference": state["weights"] if settings.beta and not settings.lora_rank else 0,
        "optimiser": state["optimiser"],
        "DeepSpeed's buffers": memory.zero_buffers((policy,), precision, launch),
        "vLLM": int(share * machine.memory) if vllm and machine.gpus else 0,
    }
    stages = {"sampling": _sampling(config, model, FLOAT32, machine)}
    if launch.zero == 3:
        stages["start"] = {"policy": FLOAT32 * model.parameters, "vLLM": always["vLLM"]}
    if config.engine != "service" and not settings.trl.get("use_vllm"):
        # Without vLLM transformers generates a rank's share of a step in one batch, on CPUs our engine does.
        rows = math.ceil(completions / launch.ranks) if machine.gpus else config.slots
        width = memory.weight_bytes(precision)
        stages["roll-outs"] = {
            **always,
            "KV cache": 2 * model.layers * rows * model.keys * time * width,
            "logits": 4 * FLOAT32 * rows * model.vocabulary,
        }
    stages["training"] = {
        **always,
        "gradients": state["gradients"],
        "activations": memory.backward(
            (policy,), batch, precision, memory.trl_head(policy, batch, precision), state["gradients"], accumulated
        ),
    }
    return stages


def _qsharp(config: Any, launch: Launch, machine: Machine) -> Stages:
    model, base, settings = architecture(config.model), value_base(config), config.value
    width = _width(config, machine)
    time = _time(config, model, config.max_tokens)
    precision = _precision(settings.bf16, launch)
    shared = settings.head == "shared"
    body = base.cut(settings.layers or base.layers)
    policy = {"policy": width * model.parameters}
    value = _value(config)
    times = 2 if settings.loss == "ipl" else 1  # a pair is two rows, and of each the head is asked for Q and for V
    rows = times * settings.batch_size
    if shared:
        # Embeddings and states as the head reads them, and its hidden layer.
        head = model.hidden + times * (model.hidden + 4 * 256)
        acts = rows * time * FLOAT32 * head + memory.forward(model, rows * time, width)
    else:
        batch = Batch(rows, time, config.max_tokens, settings.gradient_checkpointing, settings.packing)
        state = memory.state(value, precision, launch)
        acts = memory.backward((value,), batch, precision, 0, state["gradients"], False)
    state = memory.state(value, precision, launch)
    stages = {"sampling": _sampling(config, model, width, machine)}
    if not shared:
        stages["start"] = {**policy, "value model": FLOAT32 * value.weights, "its base": FLOAT32 * base.parameters}
    stages["training"] = {
        **policy,
        "value model": state["weights"],
        "gradients": state["gradients"],
        "optimiser": state["optimiser"],
        "DeepSpeed's buffers": memory.zero_buffers((value,), precision, launch),
        "activations": acts,
    }
    guided = _ours(config, model, width)  # whatever samples: CD's beta is looked for here
    if not shared:
        children = config.slots * config.guidance.candidates if settings.head == "v" else config.slots
        guided["value model"] = width * value.weights
        guided["KV cache"] += memory.kv_cache(body, config.slots, time + config.guidance.candidates, width)
        guided["activations"] = max(guided["activations"], memory.forward(body, children, width))
    stages["guided"] = guided
    return stages


def _value(config: Any) -> Trained:
    model, base, settings = architecture(config.model), value_base(config), config.value
    small = 256 * (model.hidden + base.hidden + 2) if settings.head != "v" else base.hidden + 1
    if settings.head == "shared":
        return Trained(model, small, small, 0)
    body = base.cut(settings.layers or base.layers)
    return memory.trained(body, body.body + small, settings.lora_rank)


def _qprobe(config: Any, launch: Launch, machine: Machine) -> Stages:
    model, width = architecture(config.model), _width(config, machine)
    return {
        "sampling": _sampling(config, model, width, machine),
        "features": {
            "policy": width * model.parameters,
            "activations": memory.forward(model, FEATURE_TOKENS, width),
        },
    }


def _pipeline(config: Any, launch: Launch, machine: Machine) -> Stages:
    """Of every stage its largest part; one runs after the other."""
    stages = {stage.name: STAGES[stage.method](stage.config, launch, machine) for stage in stages_of(config)}
    return {name: max(parts.values(), key=lambda part: sum(part.values())) for name, parts in stages.items()}


def _width(config: Any, machine: Machine) -> int:
    """Bytes of the policy's weights, of a command that has a dtype."""
    return BFLOAT16 if (config.dtype or ("bfloat16" if machine.gpus else "float32")) == "bfloat16" else FLOAT32


def _learning(recipe: Recipe) -> tuple[Trained, ...]:
    if recipe.command == "dqo":
        return _actor_critic(recipe.config)
    if recipe.command == "qsharp":
        return (_value(recipe.config),)
    model = architecture(recipe.config.model)
    return (memory.trained(model, model.parameters, recipe.config.training.lora_rank),)


STAGES: dict[str, Callable[[Any, Launch, Machine], Stages]] = {
    "dqo": _dqo,
    "grpo-lambda": _grpo_lambda,
    "qsharp": _qsharp,
    "qprobe": _qprobe,
    "pipeline": _pipeline,
}
