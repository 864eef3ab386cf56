"""What is reckoned against what is measured: the bytes that torch's CPU allocator has given out at the worst moment of two
optimiser steps (torch.profiler's memory events, which a process's resident size would blur)."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from posttrain.models import memory
from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.models.architecture import architecture
from posttrain.models.load import load_model
from posttrain.models.memory import Batch, Launch
from posttrain.models.value import new_value_model
from posttrain.pipelines.dqo import _lora
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import Batch as Running
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.trainers.dqo import DQOConfig, DQOTrainer
from posttrain.trainers.value import ValueConfig, ValueTrainer

NEAR = 0.15
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2, "vocab_size": 3000}  # grouped heads
SMOLLM2 = {  # as published, at its full size
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
    **{"num_attention_heads": 9, "num_key_value_heads": 3},
}


def peak(run):
    """Bytes above those at the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        run()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def build(**changes):
    sizes = {"vocab_size": 101, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, "tie_word_embeddings": True, **changes}))


def sizes_of(model, folder):
    model.config.save_pretrained(folder)
    return architecture(str(folder))


def arguments(folder, rows, accumulation):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
    }


def own_bytes(*models):
    weights = {id(weight): weight for model in models for weight in model.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def reckoned(modules, batch, precision, head, accumulated=False, launch=Launch()):  # noqa: B008
    states = [memory.state(module, precision, launch) for module in modules]
    gradients = sum(state["gradients"] for state in states)
    rest = memory.backward(modules, batch, precision, head, gradients, accumulated)
    rest += memory.zero_buffers(modules, precision, launch)
    return sum(sum(state.values()) for state in states) + rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rows", "time", "settings"),
    [
        ({}, 32, 100, {}),
        ({}, 8, 200, {"packing": True}),
        ({}, 8, 200, {"gradient_checkpointing": True}),
        ({}, 8, 200, {"bf16": True}),
        ({}, 8, 200, {"bf16": True, "gradient_checkpointing": True}),
        ({}, 8, 200, {"value_layers": 2}),
        ({}, 8, 200, {"lora_rank": 16, "value_lora_rank": 16}),
        ({}, 8, 200, {"lora_rank": 16, "value_lora_rank": 16, "gradient_checkpointing": True}),
        (WIDE, 8, 100, {"accumulation": 2}),
        (WIDE, 8, 100, {"gradient_checkpointing": True}),
        (WIDE, 8, 100, {"tie_word_embeddings": False}),
        (SMOLLM2, 4, 128, {"lora_rank": 16, "value_lora_rank": 16}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_training_policy_and_value_model(changes, rows, time, settings, tmp_path):
    settings, prompt = dict(settings), 40
    ranks = [settings.pop(name, None) for name in ("lora_rank", "value_lora_rank")]
    accumulation = settings.pop("accumulation", 1)
    policy = build(**changes, tie_word_embeddings=settings.pop("tie_word_embeddings", True))
    sizes = sizes_of(policy, tmp_path / "model")
    model = ActorCritic(policy, new_critic(policy, "reference", shared=None not in ranks))
    count = time - prompt
    examples = [
        {
            "input_ids": torch.randint(2, 100, (time,)).tolist(),
            "first": prompt,
            "rewards": [0.0] * (count - 1) + [float(i % 2)],
            "ref_logprobs": [-4.6] * count,
            "logprobs": [-4.6] * count,
            "ended": True,
        }
        for i in range(2 * rows * accumulation)
    ]
    args = DQOConfig(**arguments(tmp_path / "run", rows, accumulation), **settings)
    lora = {name: _lora(rank) for name, rank in zip(("peft_config", "value_peft_config"), ranks, strict=True)}
    trainer = DQOTrainer(model, args, examples, **lora)
    trainer._checked = True  # these reference log-probabilities are nobody's
    own = own_bytes(model)
    measured = own + peak(trainer.train)
    whole = 0 if None not in ranks else sizes.body
    modules = (
        memory.trained(sizes, sizes.parameters, ranks[0]),
        memory.trained(sizes, whole, ranks[1], settings.get("value_layers")),
    )
    checkpointing, packed = settings.get("gradient_checkpointing", False), settings.get("packing", False)
    batch = Batch(rows, time, count, checkpointing, packed)
    precision = "autocast" if settings.get("bf16") else "float32"
    head = memory.our_head(modules[0], batch, precision)
    assert reckoned(modules, batch, precision, head, accumulation > 1) == pytest.approx(measured, rel=NEAR)
    assert memory.FLOAT32 * sum(module.weights for module in modules) == pytest.approx(own, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"lora_rank": 16}], ids=str)
def test_training_a_value_model(settings, tmp_path):
    rank = settings.get("lora_rank")
    value = new_value_model(load_model("tiny", "cpu"), layers=3)
    examples = [
        {
            "input_ids": torch.randint(2, 100, (200,)).tolist(),
            "first": 40,
            "return_": float(i % 2),
            "prompt_id": str(i),
        }
        for i in range(32)
    ]
    on = settings.get("gradient_checkpointing", False)
    args = ValueConfig(**arguments(tmp_path, 16, 1), gradient_checkpointing=on)
    trainer = ValueTrainer(value, args, examples, peft_config=_lora(rank))
    measured = own_bytes(value) + peak(trainer.train)
    sizes = architecture("tiny").cut(3)
    module = memory.trained(sizes, sizes.body, rank)
    assert reckoned((module,), Batch(16, 200, 160, on), "float32", 0) == pytest.approx(measured, rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=str)
def test_training_a_policy_online(settings, tmp_path):
    """TRL's head by tiles; the completions are made up, so that nothing but training is measured."""
    from datasets import Dataset

    from posttrain.trainers.grpo_lambda import GRPOLambdaConfig, GRPOLambdaTrainer

    policy = load_model("tiny", "cpu")
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "1" * 38}]}] * 4)

    def rollouts(prompts, trainer):
        ids = [trainer.processing_class.encode("1" * 40)] * len(prompts)
        completions = [torch.randint(7, 100, (160,)).tolist() for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    args = GRPOLambdaConfig(
        **arguments(tmp_path, 16, 1),
        num_generations=4,
        max_completion_length=160,
        bf16=False,
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
        report_to="none",
    )
    trainer = GRPOLambdaTrainer(
        policy.model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args,
        prompts,
        processing_class=policy.tokenizer,
        rollout_func=rollouts,
    )
    measured = own_bytes(policy.model) + peak(trainer.train)
    sizes = architecture("tiny")
    module, batch = memory.trained(sizes, sizes.parameters), Batch(16, 200, 160, args.gradient_checkpointing)
    head = memory.trl_head(module, batch, "float32")
    assert reckoned((module,), batch, "float32", head) == pytest.approx(measured, rel=NEAR)


def test_the_cache_of_an_engine():
    policy = load_model("tiny", "cpu")
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint="", slots=5)
    running = Running(engine)
    running.add([Request(0, (7,) * 140, Sampling(max_tokens=10))])
    running.step()
    held = sum(tensor.nbytes for tensor in (*running.cache.keys, *running.cache.values))
    assert held == memory.kv_cache(architecture("tiny"), 5, 141, 4)


@pytest.mark.parametrize(
    ("launch", "bytes_per_parameter"),
    [
        (Launch(1), (4, 4, 8)),
        (Launch(8), (4, 8, 8)),  # DDP's buckets
        (Launch(8, 2), (2, 2 / 8, 12 / 8)),
        (Launch(8, 3), (2 / 8, 2 / 8, 12 / 8)),
        (Launch(8, 3, offload=True), (2 / 8, 0, 0)),
    ],
)
def test_what_ranks_share_out(launch, bytes_per_parameter):
    """Rajbhandari et al. 2020 (arXiv 1910.02054): of 2, 2 and 12 bytes per parameter each stage divides one more by the ranks."""
    sizes = architecture("Qwen/Qwen2-7B-Instruct")
    module = memory.trained(sizes, sizes.parameters)
    found = memory.state(module, "autocast" if launch.zero is None else "bfloat16", launch)
    assert [size / sizes.parameters for size in found.values()] == pytest.approx(bytes_per_parameter)
    assert memory.host_state(module) == 16 * sizes.parameters


@pytest.mark.parametrize(
    ("name", "parameters", "body"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 134_515_008),
        ("Qwen/Qwen2-7B-Instruct", 7_615_616_512, 7_070_619_136),
        ("google/gemma-1.1-7b-it", 8_537_680_896, 8_537_680_896),
        ("Qwen/Qwen3-8B", 8_190_735_360, 7_568_405_504),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 1_235_814_400),
    ],
)
def test_published_sizes(name, parameters, body):
    """As the model's page says; the body is what a value model has of it."""
    sizes = architecture(name)
    assert (sizes.parameters, sizes.body) == (parameters, body)


def test_the_sizes_of_a_model_are_those_of_its_weights():
    policy = load_model("tiny", "cpu")
    sizes = architecture("tiny")
    assert sizes.parameters == sum(weight.numel() for weight in policy.model.parameters())
    value = new_value_model(policy, layers=2)
    assert sizes.cut(2).body == sum(weight.numel() for weight in value.backbone.parameters())
    from peft import get_peft_model

    adapted = get_peft_model(policy.model, _lora(4))
    learning = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert memory.trained(sizes, sizes.parameters, 4).learning == learning
