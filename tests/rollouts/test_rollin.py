"""Rolling in: where completions are cut, and the tables that come of it."""

from dataclasses import replace

import pyarrow as pa
import pytest

from posttrain.errors import UserError
from posttrain.rollouts.collect import Prompt, collect, completion_seed
from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.rollin import Prefix, cut_completions, cut_index
from posttrain.rollouts.table import RolloutTable
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.trainers.value_examples import collate, examples_of

SETTINGS = {"samples": 6, "sampling": Sampling(max_tokens=8, seed=5), "policy": "digits", "shard_prompts": 2}
REFERENCE = {**SETTINGS, "sampling": Sampling(max_tokens=8, seed=6)}


@pytest.fixture
def guided(engine, tokenizer, prompts, tmp_path):
    """Whole completions of 8 digits; those that end with 0 say that they stopped."""
    return collect(engine, tokenizer, prompts, out=tmp_path / "guided", **SETTINGS)


def rolled_out(engine, tokenizer, prompts, out, prefixes, **changes):
    engine.requests.clear()
    return collect(engine, tokenizer, prompts, out=out, prefixes=prefixes, **{**REFERENCE, **changes})


def by_key(table: RolloutTable):
    return {(row["prompt_id"], row["sample"]): row for row in table.rows()}


# -- the cut


@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_a_cut_is_uniform_over_the_tokens(length):
    """Every count within five standard deviations of its mean."""
    draws = 20_000
    counts = [0] * length
    for sample in range(draws):
        counts[cut_index(3, f"p{sample % 100}", sample // 100, length)] += 1
    mean = draws / length
    assert all(abs(count - mean) <= 5 * (mean * (1 - 1 / length)) ** 0.5 for count in counts)


def test_a_cut_is_of_its_own_seed_prompt_and_sample():
    names = [(seed, prompt, k) for seed in (0, 1) for prompt in ("a", "b", "1", "11") for k in range(12)]
    cuts = [cut_index(*name, 10**9) for name in names]
    assert len(set(cuts)) == len(cuts)
    assert cuts == [cut_index(*name, 10**9) for name in names]


def test_cuts_have_nothing_to_do_with_the_seed_that_samples():
    """The same hash would tie where a completion is cut to what stands there."""
    pairs = [(cut_index(0, "p", k, 1 << 32) / (1 << 32), completion_seed(0, "p", k) / (1 << 63)) for k in range(2000)]
    covariance = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(pairs)
    assert abs(covariance) * 12 < 0.1


def test_a_prefix_goes_up_to_its_cut_with_it(guided):
    prefixes, rows = cut_completions(guided, 1), by_key(guided)
    assert prefixes.keys() == rows.keys()
    for key, prefix in prefixes.items():
        row = rows[key]
        assert prefix.cut == cut_index(1, *key, len(row["completion_ids"]))
        assert prefix.ids == tuple(row["completion_ids"][: prefix.cut + 1])
        assert prefix.logprobs == tuple(row["logprobs"][: prefix.cut + 1])
        assert prefix.finish_reason == (row["finish_reason"] if prefix.cut == 7 else None)
    assert any(prefix.cut == 7 for prefix in prefixes.values())


def test_another_seed_cuts_elsewhere(guided):
    first, again, other = (cut_completions(guided, seed) for seed in (1, 1, 2))
    assert first == again
    assert sum(first[key].cut != other[key].cut for key in first) > len(first) / 2


def test_the_order_and_company_of_rows_have_no_say(guided):
    part = RolloutTable(guided.data.take([30, 4, 17]), guided.manifest, guided.folder)
    prefixes = cut_completions(guided, 1)
    found = cut_completions(part, 1)
    assert len(found) == 3 and all(prefixes[key] == prefix for key, prefix in found.items())


def test_a_table_without_log_probabilities_is_refused(guided):
    column = guided.data.schema.get_field_index("logprobs")
    field = guided.data.schema.field(column)
    nulls = guided.data.set_column(column, field, pa.nulls(len(guided), field.type))
    with pytest.raises(UserError, match="table: .* has no log-probabilities"):
        cut_completions(RolloutTable(nulls, guided.manifest, guided.folder), 0)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_prefix_that_ended_is_the_whole_completion(reason):
    prefix = Prefix((4, 5), (-1.0, -2.0), 1, reason)
    done = prefix.before(None)
    assert (done.ids, done.logprobs, done.finish_reason) == ((4, 5), (-1.0, -2.0), reason)


def test_a_prefix_stands_before_what_comes():
    done = Prefix((4, 5), (-1.0, -2.0), 1).before(Completion(7, (6, 1), (-3.0, -4.0), "stop"))
    assert done == Completion(7, (4, 5, 6, 1), (-1.0, -2.0, -3.0, -4.0), "stop")


# -- the table


def test_rows_join_what_was_rolled_in_and_what_was_rolled_out(engine, tokenizer, prompts, guided, tmp_path):
    prefixes = cut_completions(guided, 1)
    rows = by_key(rolled_out(engine, tokenizer, prompts, tmp_path / "t", prefixes))
    assert rows.keys() == prefixes.keys()
    asked = {(request.sampling.seed, request.prompt_ids): request for request in engine.requests}
    for (prompt_id, sample), prefix in prefixes.items():
        row = rows[prompt_id, sample]
        prompt = prompts[int(prompt_id[1:])]
        count = len(prefix.ids)
        assert row["prompt_ids"] == list(prompt.ids) and row["cut"] == prefix.cut == count - 1
        assert tuple(row["completion_ids"][:count]) == prefix.ids
        assert tuple(row["logprobs"][:count]) == prefix.logprobs
        assert len(row["logprobs"]) == len(row["completion_ids"]) == 8
        assert row["completion"] == "#### " + "".join(map(str, row["completion_ids"]))
        assert row["finish_reason"] == ("length" if row["completion_ids"][-1] else "stop")
        assert row["correct"] == (str(row["extracted"]) == row["answer"])
        assert row["guide"] is None and row["beta"] is None and row["kl"] == 0
        assert row["sampling"]["max_tokens"] == 8
        request = asked.pop((completion_seed(6, prompt_id, sample), prompt.ids + prefix.ids), None)
        assert (request is None) == (count == 8)
        if request is not None:
            assert request.sampling.max_tokens == 8 - count and request.beta is None
            alone = next(engine.generate([request]))
            assert tuple(row["completion_ids"][count:]) == alone.ids
            assert row["logprobs"][count:] == pytest.approx(list(alone.logprobs))
    assert not asked


def test_a_cut_at_the_last_token_needs_no_roll_out(engine, tokenizer, prompts, guided, tmp_path):
    whole = by_key(guided)
    prefixes = {
        key: Prefix(tuple(row["completion_ids"]), tuple(row["logprobs"]), 7, row["finish_reason"])
        for key, row in whole.items()
    }
    rows = by_key(rolled_out(engine, tokenizer, prompts, tmp_path / "t", prefixes))
    assert engine.requests == []
    assert {row["finish_reason"] for row in rows.values()} == {"stop", "length"}
    for key, row in rows.items():
        same = ("completion_ids", "logprobs", "finish_reason", "completion", "reward", "verdict", "extracted")
        assert {name: row[name] for name in same} == {name: whole[key][name] for name in same}
        assert row["cut"] == 7


def test_labels_begin_at_the_cut(engine, tokenizer, prompts, guided, tmp_path):
    prefixes = cut_completions(guided, 1)
    table = rolled_out(engine, tokenizer, prompts, tmp_path / "t", prefixes)
    mask = collate(examples_of([table], drop_unanimous=False))["mask"]
    expected = [8 - prefix.cut for prefix in prefixes.values()]
    assert mask.sum(-1).tolist() == expected


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_run_gives_the_same_bytes(engine, tokenizer, prompts, guided, tmp_path, monkeypatch, after):
    prefixes = cut_completions(guided, 1)
    rolled_out(engine, tokenizer, prompts, tmp_path / "whole", prefixes)
    generate, calls = engine.generate, []

    def dying(requests):
        calls.append(1)
        for completion in generate(requests):
            yield completion
            if len(calls) == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        rolled_out(engine, tokenizer, prompts, tmp_path / "cut", prefixes)
    monkeypatch.undo()
    rolled_out(engine, tokenizer, prompts, tmp_path / "cut", prefixes, resume=True)
    whole, cut = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("shard-*")} for name in ("whole", "cut")
    )
    assert whole == cut and len(whole) == 4


def test_resuming_with_other_prefixes_is_refused(engine, tokenizer, prompts, guided, tmp_path):
    rolled_out(engine, tokenizer, prompts, tmp_path / "t", cut_completions(guided, 1))
    for other in (cut_completions(guided, 2), None):
        with pytest.raises(UserError, match="^prefixes: "):
            rolled_out(engine, tokenizer, prompts, tmp_path / "t", other, resume=True)


@pytest.mark.parametrize("budget", [1, 4])
def test_a_prefix_that_leaves_no_room_is_refused_before_anything_is_sampled(
    engine, tokenizer, prompts, guided, tmp_path, budget
):
    """A prefix of the last prompt, in the last shard, and only there."""
    prefixes = {key: prefix for key, prefix in cut_completions(guided, 1).items() if prefix.finish_reason is None}
    long = {key: prefix for key, prefix in prefixes.items() if key[0] == "p6" and len(prefix.ids) >= budget}
    assert long
    with pytest.raises(UserError, match=f"max_tokens: .*'p6'.*{budget}"):
        rolled_out(engine, tokenizer, prompts, tmp_path / "t", long, sampling=Sampling(max_tokens=budget))
    assert engine.requests == [] and not (tmp_path / "t").exists()


def test_prompts_without_a_prefix_are_sampled_whole(engine, tokenizer, prompts, guided, tmp_path):
    plain = by_key(collect(engine, tokenizer, prompts, out=tmp_path / "plain", **REFERENCE))
    prefixes = {key: prefix for key, prefix in cut_completions(guided, 1).items() if key[0] == "p0"}
    rows = by_key(rolled_out(engine, tokenizer, prompts, tmp_path / "t", prefixes))
    assert all(rows[key] == plain[key] for key in rows if key[0] != "p0")


# -- the law


def test_a_roll_out_is_what_the_engine_samples_after_the_prefix(llama, tokenizer, tmp_path):
    """The joined row's tokens after the cut, and their log-probabilities, are the reference's, given the joined prefix."""
    reference = TransformersEngine(llama, fingerprint="r", slots=3)
    question = [{"role": "user", "content": "?"}]
    asked = [Prompt(f"q{i}", question, tuple(range(10, 13 + i)), "1") for i in range(3)]
    sampling = Sampling(max_tokens=12, seed=1, stop_ids=(1, 7, 9, 30, 31))
    common = {"samples": 4, "policy": "llama"}
    first = collect(reference, tokenizer, asked, sampling=sampling, out=tmp_path / "in", **common)
    prefixes = cut_completions(first, 2)
    sampling = replace(sampling, seed=8)
    table = collect(reference, tokenizer, asked, sampling=sampling, out=tmp_path / "t", prefixes=prefixes, **common)
    assert {prefix.finish_reason is None for prefix in prefixes.values()} == {True, False}
    for key, row in by_key(table).items():
        prefix = prefixes[key]
        assert tuple(row["completion_ids"][: len(prefix.ids)]) == prefix.ids
        if prefix.finish_reason is None:
            left = replace(sampling, seed=completion_seed(8, *key), max_tokens=12 - len(prefix.ids))
            alone = next(reference.generate([Request(0, tuple(row["prompt_ids"]) + prefix.ids, left)]))
            assert tuple(row["completion_ids"][len(prefix.ids) :]) == alone.ids
            assert row["logprobs"][len(prefix.ids) :] == pytest.approx(list(alone.logprobs), abs=1e-4)
            assert row["finish_reason"] == alone.finish_reason
        else:
            assert row["finish_reason"] == prefix.finish_reason
