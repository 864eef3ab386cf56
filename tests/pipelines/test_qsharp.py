"""Q# from beginning to end, on a handful of problems; and, slow, what it must reach."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.config import build, read_yaml
from posttrain.decoding.guidance import Guidance
from posttrain.errors import UserError
from posttrain.pipelines import qsharp
from posttrain.pipelines.pipeline import stages_of
from posttrain.pipelines.qsharp import QSharpConfig, Work, run
from posttrain.pipelines.recipe import read
from posttrain.pipelines.value_training import ValueTraining
from posttrain.rollouts.table import read_table
from recipes.qsharp.study import print_study, study
from tests.soak.sizes import size

RECIPES = Path(__file__).parents[2] / "recipes" / "qsharp"
SMALL = QSharpConfig(
    out="",
    train_prompts=12,
    train_samples=6,
    rollin_samples=2,
    test_prompts=6,
    k=3,
    guided_samples=3,
    sweep=(1.0,),
    shard_prompts=5,
    value=ValueTraining(head="shared", learning_rate=3e-3, epochs=2, batch_size=8, eval_fraction=0.3),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("qsharp") / "run"
    said: list[str] = []
    return out, run(replace(SMALL, out=str(out)), say=said.append), said


@pytest.mark.slow
def test_every_arm_is_measured(finished):
    out, result, _ = finished
    assert {"base", "majority", "oracle", "qsharp", "qsharp_2", "cd", "qsharp_best", "qsharp_vote"} == set(result.arms)
    for name in ("qsharp", "qsharp_2", "cd"):
        assert result.arms[name].measures["kl"] >= 0
        assert set(result.arms[name].measures) == {"kl", "tokens_per_second", "majority"}
    assert {(point.law, point.beta) for point in result.points} >= {("Q#", 0.1), ("Q#", 1.0), ("CD", 1.0)}
    qsharp.publish(result, "a title", "a lead")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["arms"]["qsharp"]["accuracy"] == result.arms["qsharp"].accuracy
    gain = summary["comparisons"]["qsharp_2 - base"]
    assert gain["problems"] == SMALL.test_prompts and gain["low"] <= gain["difference"] <= gain["high"]
    assert gain["difference"] == pytest.approx(result.arms["qsharp_2"].accuracy - result.arms["base"].accuracy)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "KL, nats" in page


@pytest.mark.slow
def test_the_second_round_is_rolled_in_by_the_first(finished):
    out, _, _ = finished
    rollin, rollouts = read_table(out / "round-2" / "rollin"), read_table(out / "round-2" / "rollouts")
    assert set(rollin.column("beta")) == {0.1} and None not in rollin.column("guide")
    assert set(rollouts.column("guide")) == {None}
    for before, after in zip(rollin.rows(), rollouts.rows(), strict=True):
        kept = after["cut"] + 1
        assert after["completion_ids"][:kept] == before["completion_ids"][:kept]
        assert after["prompt_id"] == before["prompt_id"] and after["kl"] == 0


@pytest.mark.slow
def test_everything_is_kept(finished):
    """Again, and what is there already is not made anew."""
    out, result, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    said: list[str] = []
    again = run(replace(SMALL, out=str(out)), say=said.append)
    assert said[0] == f"round 1: collected already, in {out / 'train'}"
    assert not any("completions of each" in line and line.startswith("round") for line in said)
    assert not any("looking for" in line for line in said)
    assert {name: arm.accuracy for name, arm in again.arms.items()} == {
        name: arm.accuracy for name, arm in result.arms.items()
    }
    assert again.points == result.points
    kept = json.loads((out / "round-2" / "cd_beta.json").read_text())
    assert kept["beta"] == next(point.beta for point in again.points if point.law == "CD")
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.mark.slow
def test_the_beta_of_cd_is_looked_for_anew_where_it_is_that_of_something_else(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out / "round-2", tmp_path / "round-2")
    kept = json.loads((out / "round-2" / "cd_beta.json").read_text())
    said: list[str] = []
    config = replace(SMALL, out=str(tmp_path))
    assert Work(config, said.append).matched_beta(2) == kept["beta"] and said == []
    for change in ({"beta": 0.5}, {"train_prompts": 5}, {"guidance": Guidance(delta=0.1)}):
        Work(replace(config, **change), said.append).matched_beta(2)
        assert said.pop(0) == "round 2: looking for the beta at which CD has the KL of Q#"
        said.clear()


@pytest.mark.slow
def test_where_another_engine_samples_it_has_the_gpu_for_itself(finished, tmp_path, monkeypatch):
    """What a value model takes there is given back before that engine starts."""
    out, _, _ = finished
    shutil.copytree(out / "round-1", tmp_path / "round-1")
    work = Work(replace(SMALL, out=str(tmp_path), rounds=1, engine="vllm"))
    held = weakref.ref(work.guide(1).value)
    assert held() is not None
    served = work.sampling_guide(1)
    gc.collect()
    assert held() is None and served.fingerprint == work.guide(1).fingerprint


@pytest.mark.parametrize("stage", [None, "evaluate"])
def test_values_of_preferences_are_not_measured_as_returns(tmp_path, stage):
    values = {"out": str(tmp_path / "run"), "value": replace(SMALL.value, loss="ipl")}
    with pytest.raises(UserError, match=r"^rounds: must be 1 with value\.loss ipl"):
        replace(SMALL, **values)
    with pytest.raises(UserError, match=r"^value\.loss: .*--stage train.* posttrain eval --guide"):
        run(replace(SMALL, rounds=1, **values), stage, say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_a_stage_alone_says_what_it_lacks(tmp_path):
    config = replace(SMALL, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"stage: round 1 is not collected.*\(--stage collect --round 1\)"):
        run(config, "train", 1, say=lambda _: None)
    with pytest.raises(UserError, match="round 1 has no value model in .*; train it first"):
        run(config, "collect", 2, say=lambda _: None)
    with pytest.raises(UserError, match="round: must be between 1 and the configuration's rounds, 2, got 3"):
        run(config, "train", 3, say=lambda _: None)


def test_a_half_saved_value_model_guides_nothing(tmp_path):
    """Killed between the weights and `made_by.json`, which is written last."""
    work = Work(replace(SMALL, out=str(tmp_path)), say=lambda _: None)
    (tmp_path / "round-1" / "value").mkdir(parents=True)
    (tmp_path / "round-1" / "value" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"round 1 has no value model in .*; train it first"):
        work.guide(1)


@pytest.mark.slow
def test_stages_alone_make_what_the_whole_run_makes(finished, tmp_path):
    out, _, _ = finished
    config = replace(SMALL, out=str(tmp_path / "run"))
    for stage, number in (("collect", 1), ("train", 1), ("collect", 2)):
        assert run(config, stage, number, say=lambda _: None) is None
    for part in ("train", "round-2/rollouts"):
        assert read_table(tmp_path / "run" / part).data.equals(read_table(out / part).data)
    weights = "round-1/value/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.slow
def test_the_mean_of_the_last_rounds_guides(finished, tmp_path):
    """The value models are what they were; what guides the last round, and is measured, is their mean."""
    out, result, _ = finished
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("guided"))
    config = replace(SMALL, out=str(tmp_path / "run"), history=2)
    averaged = run(config, "evaluate", say=lambda _: None)
    work = Work(config, say=lambda _: None)
    assert work.guide(2).value.config.width == 2 * work.guide(1).value.config.width
    assert set(averaged.guided.column("guide")) == {work.guide(2).name} != set(result.guided.column("guide"))
    assert averaged.arms["qsharp"].accuracy == result.arms["qsharp"].accuracy


@pytest.mark.slow
def test_a_value_model_of_other_settings_is_not_overwritten(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "run")
    other = replace(SMALL, out=str(tmp_path / "run"), value=replace(SMALL.value, epochs=3))
    with pytest.raises(UserError, match="value: .* was trained on other completions or with other settings"):
        run(other, "train", 1, say=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta: must be at least 1e-09 and finite, got 0.0"),
        ({"sweep": (0.1, -1.0)}, "beta: must be at least 1e-09 and finite, got -1.0"),
        ({"rounds": 0}, "rounds: must be at least 1, got 0"),
        ({"history": 0}, "history: must be at least 1, got 0"),
        ({"history": 2, "value": ValueTraining(head="v")}, "history: value.head is v, and only shared heads"),
        ({"test_split": "train"}, "test_split: train is the training split too"),
        ({"guidance": Guidance(lazy=True)}, "guidance.lazy: a run measures the KL of guidance"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize("base", [None, "tiny"])
def test_more_layers_than_there_are_are_refused_before_anything_is_sampled(base, tmp_path):
    config = replace(SMALL, out=str(tmp_path / "run"), value=ValueTraining(base=base, layers=5))
    with pytest.raises(UserError, match=r"^value\.layers: must be between 1 and the base's 4, got 5"):
        run(config, say=lambda _: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_configurations(path):
    build(QSharpConfig, read_yaml(path))


def test_other_test_data(tmp_path):
    """A file has no splits: two files are trained and measured on, and no problem may be in both."""
    for name, first in (("train", 0), ("test", 5), ("both", 2)):
        lines = [json.dumps({"problem": f"{n}+1=?", "answer": str(n + 1)}) for n in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"data": str(tmp_path / "train.jsonl"), "prompt": "{problem}", "test_split": "train", "out": str(tmp_path)}
    work = Work(replace(SMALL, **files, test_data=str(tmp_path / "test.jsonl")), say=lambda _: None)
    assert [row["problem"] for row in work.test_plan.rows()] == ["5+1=?", "6+1=?", "7+1=?", "8+1=?"]
    with pytest.raises(UserError, match="data: 2 test problems are training problems too"):
        Work(replace(SMALL, **files, test_data=str(tmp_path / "both.jsonl")), say=lambda _: None)


@pytest.mark.timeout(5400)
@pytest.mark.slow
def test_guidance_raises_accuracy_and_cd_does_not_do_more_with_its_kl(tmp_path):
    """500 test problems, two samples each at temperature 1, the recipe of the demo, in one seed; the soak: in three (`pytest -s`
    prints the tables)."""
    (value,) = (each.config.value for each in stages_of(read("pipeline/demo").config) if each.method == "qsharp")
    config = QSharpConfig(out=str(tmp_path), guided_samples=2, shard_prompts=100, value=value)
    found = study(config, size((0,), (0, 1, 2)), tmp_path)
    print_study(found)
    for of_seed in found.values():
        gains = of_seed["differences"]
        assert gains["qsharp_2 - base"].difference > 0.25
        assert gains["qsharp_2 - majority"].difference > 0
        for other in ("qsharp", "cd"):
            assert gains[f"qsharp_2 - {other}"].low > -0.02
        kl = {name: of_seed["arms"][name]["kl"] for name in ("qsharp_2", "cd")}
        assert kl["cd"] == pytest.approx(kl["qsharp_2"], rel=0.15)
        assert of_seed["parameters"]["value"] <= of_seed["parameters"]["policy"]
