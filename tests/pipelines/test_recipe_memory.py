"""Whether recipes fit, and what is said of those that do not."""

import pytest

from posttrain.errors import UserError
from posttrain.models.architecture import architecture
from posttrain.pipelines.recipe import names, read
from posttrain.pipelines.recipe_memory import Machine, knobs, machine_for, on_host, peak, reckon, way

H100 = Machine(8, int(80e9))


@pytest.mark.parametrize("name", names())
def test_our_own_fit_where_they_say(name):
    """On GPUs of 80 GB, as many as their launcher starts."""
    recipe = read(name)
    machine = machine_for(recipe, None, 80)
    assert 0 < peak(reckon(recipe, machine)) <= machine.usable


@pytest.mark.parametrize("name", [name for name in names() if name.endswith(("arithmetic", "low_coverage", "smollm2"))])
def test_the_small_ones_fit_into_a_laptop(name):
    assert peak(reckon(read(name), Machine(0, 1))) < 12e9


def test_training_a_7b_policy_and_its_value_model():
    """By hand: 16 bytes per parameter over 8 ranks, which DeepSpeed's bfloat16 has as 2 + 2 + 4 + 8."""
    recipe = read("dqo/qwen2_7b_gsm8k")
    stage = reckon(recipe, H100)["training"]
    sizes = architecture(recipe.config.model)
    share = 16 * (sizes.parameters + sizes.body) / 8
    state = [stage[part] for part in ("policy", "value model", "gradients", "optimiser")]
    assert sum(state) == pytest.approx(share, rel=1e-3)
    assert stage["policy that sampled"] == 0


def test_more_ranks_need_less_each():
    recipe = read("dqo/qwen2_7b_gsm8k")
    peaks = [sum(reckon(recipe, Machine(gpus, int(80e9)))["training"].values()) for gpus in (2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_what_does_not_fit_is_told_what_to_change():
    """Every change is one that the command takes, and does what it says."""
    recipe = read("grpo_lambda/qwen3_8b_math")
    small = Machine(8, int(48e9))
    before = peak(reckon(recipe, small))
    assert before > small.usable
    turned = knobs(recipe, small)
    assert [knob.peak for knob in turned] == sorted(knob.peak for knob in turned)
    for knob in turned:
        assert knob.peak == peak(reckon(knob.recipe, small)) < before
    steps = way(read("dqo/gemma_7b_gsm8k"), Machine(2, int(80e9)))
    assert steps[0].change == "--config_file recipes/accelerate/zero3_offload.yaml"
    assert steps[-1].peak <= Machine(2, int(80e9)).usable


def test_a_long_batch_is_halved():
    recipe = read("qsharp/gsm8k_qwen")
    assert "value.batch_size: 16" in {knob.change for knob in knobs(recipe, Machine(1, int(50e9)))}


def test_each_rank_generates_its_share_and_a_service_all_of_it():
    from dataclasses import replace

    recipe = read("grpo_lambda/qwen3_8b_math")
    without = replace(recipe.config, training=replace(recipe.config.training, trl={}))
    caches = [
        reckon(replace(recipe, config=without), Machine(gpus, int(80e9)))["roll-outs"]["KV cache"] for gpus in (8, 16)
    ]
    assert caches[0] == 2 * caches[1] > 0
    served = replace(without, engine="service", urls=("http://127.0.0.1:8000",))
    stages = reckon(replace(recipe, config=served), H100)
    assert "roll-outs" not in stages and stages["sampling"].keys() == {"policy"}


def test_vllm_takes_its_share_alone_and_the_beta_of_cd_is_looked_for_here():
    from dataclasses import replace

    recipe = read("qsharp/gsm8k_qwen")
    value, guidance = replace(recipe.config.value, head="q"), replace(recipe.config.guidance, outside="mask")
    config = replace(recipe.config, engine="vllm", value=value, guidance=guidance)
    stages = reckon(replace(recipe, config=config), Machine(1, int(80e9)))
    assert stages["sampling"] == {"vLLM": int(0.85 * 80e9)}
    ours = replace(recipe, config=replace(config, engine="transformers"))
    assert stages["guided"] == reckon(ours, Machine(1, int(80e9)))["guided"]


def test_a_batch_of_pairs_has_twice_as_many_rows():
    """Of a shared head, which is all that learns, each is read for Q and for V as well."""
    from dataclasses import replace

    def activations(head, loss, size):
        recipe = read("qsharp/arithmetic")
        value = replace(recipe.config.value, head=head, layers=None, loss=loss, batch_size=size)
        recipe = replace(recipe, config=replace(recipe.config, rounds=1, value=value))
        return reckon(recipe, Machine(1, int(80e9)))["training"]["activations"]

    assert activations("q", "ipl", 8) == activations("q", "likelihood", 16) > activations("q", "likelihood", 8)
    assert activations("shared", "ipl", 8) > activations("shared", "likelihood", 16)


def test_two_changes_where_one_is_not_enough():
    from dataclasses import replace

    recipe = read("grpo_lambda/r1_distill_7b_math")
    training = replace(recipe.config.training, batch_size=8)
    recipe = replace(recipe, config=replace(recipe.config, slots=128, training=training))
    assert not any(knob.peak <= H100.usable for knob in knobs(recipe, H100))
    steps = way(recipe, H100)
    assert len(steps) == 2 and steps[-1].peak <= H100.usable


def test_an_offloaded_optimiser_lies_elsewhere():
    from dataclasses import replace

    recipe = read("dqo/gemma_7b_gsm8k")
    assert on_host(recipe, H100) == 0
    offload = replace(recipe, launcher=recipe.launcher.with_name("zero3_offload.yaml"))
    sizes = architecture(recipe.config.model)
    assert on_host(offload, H100) == pytest.approx(16 * (sizes.parameters + sizes.body), rel=1e-3)
    assert reckon(offload, H100)["training"]["optimiser"] == 0


@pytest.mark.parametrize(
    ("gpus", "memory", "message"), [(-1, 80, "--gpus: must not be"), (1, 0, "--gpu-memory: must be")]
)
def test_a_machine_that_is_none_is_refused(gpus, memory, message):
    with pytest.raises(UserError, match=message):
        machine_for(read("dqo/arithmetic"), gpus, memory)
