import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from posttrain.errors import UserError
from posttrain.rollouts.collect import collect, completion_seed, completion_text, prompts_for
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.rollin import NO_PREFIX
from posttrain.rollouts.table import read_manifest, shard_name

SETTINGS = {"samples": 3, "sampling": Sampling(max_tokens=4, seed=5), "policy": "digits", "shard_prompts": 2}


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.parquet")}


def test_rows_are_in_order_of_prompt_then_sample(engine, tokenizer, prompts, tmp_path):
    table = collect(engine, tokenizer, prompts, out=tmp_path / "t", **SETTINGS)
    expected = [(f"p{i}", k, i) for i in range(7) for k in range(3)]
    assert list(zip(table.column("prompt_id"), table.column("sample"), table.column("group"), strict=True)) == expected
    assert set(shards_of(tmp_path / "t")) == {shard_name(i) for i in range(4)}


def test_prompts_may_have_different_numbers_of_completions(engine, tokenizer, prompts, tmp_path):
    """Drawn by seed and prompt; a completion is what it is where every prompt has as many."""
    whole = collect(engine, tokenizer, prompts, out=tmp_path / "whole", **SETTINGS)
    some = collect(engine, tokenizer, prompts, out=tmp_path / "some", least_samples=1, **SETTINGS)
    counts = [len(samples) for samples in some.by_prompt("sample")]
    assert len(counts) == 7 and set(counts) == {1, 2, 3}
    ids = {(row["prompt_id"], row["sample"]): row["completion_ids"] for row in whole.rows()}
    assert all(ids[row["prompt_id"], row["sample"]] == row["completion_ids"] for row in some.rows())
    with pytest.raises(UserError, match=r"least_samples: .* was collected with least_samples 1, not 2"):
        collect(engine, tokenizer, prompts, out=tmp_path / "some", least_samples=2, resume=True, **SETTINGS)


def test_a_row_says_all_that_its_completion_is(engine, tokenizer, prompts, tmp_path):
    row = next(collect(engine, tokenizer, prompts, out=tmp_path / "t", **SETTINGS).rows())
    seed = completion_seed(5, "p0", 0)
    assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 4, "seed": seed}
    assert row["completion"] == "#### " + "".join(map(str, row["completion_ids"]))
    assert (row["prompt"], row["prompt_ids"]) == ([{"role": "user", "content": "0?"}], [1, 2])
    assert row["policy"] == "digits@" + "f" * 64 and row["guide"] is None
    assert len(row["logprobs"]) == len(row["completion_ids"]) == 4


def test_rewards_are_the_grades(engine, tokenizer, prompts, tmp_path):
    answers = [replace(prompt, answer="1") for prompt in prompts]
    table = collect(
        engine,
        tokenizer,
        answers,
        out=tmp_path / "t",
        **{**SETTINGS, "sampling": Sampling(max_tokens=1), "samples": 20},
    )
    for row in table.rows():
        assert row["correct"] == (row["completion_ids"] == [1])
        assert row["reward"] == float(row["correct"])
        assert row["verdict"] == ("equal" if row["correct"] else "different")
        assert row["extracted"] == str(row["completion_ids"][0])
    assert 0 < sum(table.column("correct")) < len(table)


def test_a_truncated_completion_without_an_answer_is_wrong(engine, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, skip_special_tokens=True: "3 + 4 is")
    table = collect(engine, tokenizer, prompts, out=tmp_path / "t", **SETTINGS)
    assert set(table.column("verdict")) == {"no_answer"} and not any(table.column("correct"))


@pytest.mark.parametrize(
    ("prompt", "verdict"), [("user: 0?\nassistant: <think>\n", "no_answer"), ("<think></think>\n", "equal")]
)
def test_a_thought_that_the_prompt_opens_and_nothing_closes_has_no_answer(
    engine, tokenizer, prompts, tmp_path, monkeypatch, prompt, verdict
):
    def decode(self, ids, skip_special_tokens=True):
        return "Perhaps \\boxed{7}. But wait" if skip_special_tokens else prompt

    monkeypatch.setattr(type(tokenizer), "decode", decode)
    sevens = [replace(each, answer="7") for each in prompts]
    table = collect(engine, tokenizer, sevens, out=tmp_path / "t", **SETTINGS)
    assert set(table.column("verdict")) == {verdict} and set(table.column("completion")) == {decode(None, ())}
    assert table.manifest["settings"].get("thinking") == ("<think>" if verdict == "no_answer" else None)


def test_a_stop_text_is_not_part_of_the_completion(tokenizer):
    ids, logprobs = (1, 2, 3), (-1.0, -1.0, -1.0)
    assert completion_text(tokenizer, Completion(0, ids, logprobs, "stop", "2")) == "#### 1"
    assert completion_text(tokenizer, Completion(0, ids, logprobs, "stop")) == "#### 123"


def test_a_seed_is_its_own_prompts_and_samples():
    seeds = {completion_seed(seed, prompt, k) for seed in (0, 1) for prompt in ("a", "b", "1", "11") for k in range(20)}
    assert len(seeds) == 160 and all(0 <= seed < 2**63 for seed in seeds)


def test_completions_do_not_depend_on_how_prompts_are_sharded(engine, tokenizer, prompts, tmp_path):
    tables = [
        collect(engine, tokenizer, prompts, out=tmp_path / str(size), **{**SETTINGS, "shard_prompts": size})
        for size in (1, 3, 7, 100)
    ]
    assert all(list(table.rows()) == list(tables[0].rows()) for table in tables)


def test_a_prompts_completions_do_not_depend_on_the_other_prompts(engine, tokenizer, prompts, tmp_path):
    every = collect(engine, tokenizer, prompts, out=tmp_path / "all", **SETTINGS).by_prompt("completion")
    some = collect(engine, tokenizer, prompts[4:], out=tmp_path / "some", **SETTINGS).by_prompt("completion")
    assert some == every[4:]


class Killed(BaseException):
    pass


def interrupted(engine, tokenizer, prompts, out, after, monkeypatch, **changes):
    """A run that dies while it samples its `after`-th shard."""
    generate, calls = engine.generate, []

    def dying(requests):
        calls.append(1)
        for completion in generate(requests):
            yield completion
            if len(calls) == after:
                raise Killed

    monkeypatch.setattr(engine, "generate", dying)
    with pytest.raises(Killed):
        collect(engine, tokenizer, prompts, out=out, **SETTINGS | changes)
    monkeypatch.undo()


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_run_gives_the_same_bytes_and_redoes_no_finished_shard(
    engine, tokenizer, prompts, tmp_path, monkeypatch, after
):
    collect(engine, tokenizer, prompts, out=tmp_path / "whole", **SETTINGS)
    interrupted(engine, tokenizer, prompts, tmp_path / "cut", after, monkeypatch)
    engine.requests.clear()
    table = collect(engine, tokenizer, prompts, out=tmp_path / "cut", resume=True, **SETTINGS)
    assert shards_of(tmp_path / "cut") == shards_of(tmp_path / "whole")
    assert len(table) == 21 and len(engine.requests) == 21 - 6 * (after - 1)


def test_resuming_a_finished_collection_samples_nothing(engine, tokenizer, prompts, tmp_path):
    collect(engine, tokenizer, prompts, out=tmp_path / "t", **SETTINGS)
    before = shards_of(tmp_path / "t")
    engine.requests.clear()
    assert len(collect(engine, tokenizer, prompts, out=tmp_path / "t", resume=True, **SETTINGS)) == 21
    assert engine.requests == [] and shards_of(tmp_path / "t") == before


def test_resume_of_nothing_begins(engine, tokenizer, prompts, tmp_path):
    assert len(collect(engine, tokenizer, prompts, out=tmp_path / "new", resume=True, **SETTINGS)) == 21


def test_leftovers_of_a_killed_write_are_removed(engine, tokenizer, prompts, tmp_path, monkeypatch):
    interrupted(engine, tokenizer, prompts, tmp_path, 2, monkeypatch)
    (tmp_path / ".shard-00001.parquet.tmp").write_bytes(b"half")
    (tmp_path / ".manifest.json.x7").write_bytes(b"half")
    (tmp_path / shard_name(1)).write_bytes(b"written, but not yet in the manifest")
    collect(engine, tokenizer, prompts, out=tmp_path, resume=True, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", *(shard_name(i) for i in range(4))]


def test_a_deleted_shard_is_collected_again(engine, tokenizer, prompts, tmp_path):
    collect(engine, tokenizer, prompts, out=tmp_path, **SETTINGS)
    before = shards_of(tmp_path)
    (tmp_path / shard_name(2)).unlink()
    collect(engine, tokenizer, prompts, out=tmp_path, resume=True, **SETTINGS)
    assert shards_of(tmp_path) == before


@pytest.mark.parametrize("field", ["slots", "grader", "vllm"])
def test_what_may_differ_once_all_is_there_may_not_while_a_shard_is_missing(
    engine, tokenizer, prompts, tmp_path, field
):
    collect(engine, tokenizer, prompts, out=tmp_path, settings={field: 1}, **SETTINGS)
    collect(engine, tokenizer, prompts, out=tmp_path, settings={field: 2}, resume=True, **SETTINGS)
    (tmp_path / shard_name(2)).unlink()
    message = refused(engine, tokenizer, prompts, tmp_path, resume=True, settings={field: 2})
    assert message.startswith(f"{field}: {tmp_path} was collected with {field} 1, not 2; resume")


def refused(engine, tokenizer, prompts, out, **changes):
    """The error of a collection that must not generate anything."""
    engine.requests.clear()
    with pytest.raises(UserError) as caught:
        collect(engine, tokenizer, prompts, out=out, **{**SETTINGS, **changes})
    assert engine.requests == [] and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("samples", {"samples": 4}),
        ("temperature", {"sampling": Sampling(max_tokens=4, seed=5, temperature=0.5)}),
        ("seed", {"sampling": Sampling(max_tokens=4, seed=6)}),
        ("policy", {"policy": "other"}),
        ("shard_prompts", {"shard_prompts": 3}),
        ("slots", {"settings": {"slots": 3}}),
    ],
)
def test_resume_with_another_setting_names_it(engine, tokenizer, prompts, tmp_path, monkeypatch, field, changes):
    interrupted(engine, tokenizer, prompts, tmp_path, 2, monkeypatch)
    assert refused(engine, tokenizer, prompts, tmp_path, resume=True, **changes).startswith(f"{field}: ")


def test_resume_with_other_data_or_another_model_is_refused(engine, tokenizer, prompts, tmp_path, monkeypatch):
    interrupted(engine, tokenizer, prompts, tmp_path, 2, monkeypatch)
    changed = [*prompts[:-1], replace(prompts[-1], answer="0")]
    assert refused(engine, tokenizer, changed, tmp_path, resume=True).startswith("data: ")
    engine.fingerprint = "e" * 64
    assert refused(engine, tokenizer, prompts, tmp_path, resume=True).startswith("policy: ")


def test_resume_onto_a_corrupted_shard_names_it(engine, tokenizer, prompts, tmp_path, monkeypatch):
    interrupted(engine, tokenizer, prompts, tmp_path, 3, monkeypatch)
    (tmp_path / shard_name(0)).write_bytes(b"rubbish")
    assert shard_name(0) in refused(engine, tokenizer, prompts, tmp_path, resume=True)


def test_a_folder_with_something_in_it_is_refused(engine, tokenizer, prompts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(engine, tokenizer, prompts, tmp_path).startswith("out: ")
    assert refused(engine, tokenizer, prompts, tmp_path, resume=True).startswith("table: ")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(engine, tokenizer, prompts, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(engine, tokenizer, prompts, tmp_path / "file" / "t").startswith("out: cannot write")
    assert refused(engine, tokenizer, prompts, tmp_path / "file").startswith("out: cannot write")


def test_a_read_only_folder_is_refused(engine, tokenizer, prompts, tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    assert refused(engine, tokenizer, prompts, tmp_path) == f"out: cannot write to {tmp_path}: Permission denied"


def test_a_full_disk_is_one_line_and_costs_one_shard(engine, tokenizer, prompts, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def failing(handle):
        calls.append(1)
        if len(calls) == 4:  # manifest, shard 0, manifest, shard 1
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="^out: .*No space left"):
        collect(engine, tokenizer, prompts, out=tmp_path, **SETTINGS)
    assert list(read_manifest(tmp_path)["shards"]) == [shard_name(0)]


def test_a_second_run_on_the_same_folder_is_refused(engine, tokenizer, prompts, tmp_path, monkeypatch):
    generate, errors = engine.generate, []

    def meanwhile(requests):
        if not errors:
            with pytest.raises(UserError) as caught:
                collect(engine, tokenizer, prompts, out=tmp_path, resume=True, **SETTINGS)
            errors.append(str(caught.value))
        return generate(requests)

    monkeypatch.setattr(engine, "generate", meanwhile)
    collect(engine, tokenizer, prompts, out=tmp_path, **SETTINGS)
    assert errors == [f"out: another run is writing to {tmp_path}"]


@pytest.mark.parametrize(("field", "changes"), [("samples", {"samples": 0}), ("shard_prompts", {"shard_prompts": 0})])
def test_counts_below_one_are_refused(engine, tokenizer, prompts, tmp_path, field, changes):
    assert refused(engine, tokenizer, prompts, tmp_path, **changes).startswith(f"{field}: ")


def test_prompts_that_cannot_be_sampled_are_refused_by_row(engine, tokenizer, prompts, tmp_path):
    out = tmp_path / "t"
    assert refused(engine, tokenizer, [], out).startswith("data: ")
    assert refused(engine, tokenizer, [prompts[0], replace(prompts[1], id="long", ids=(1,) * 64)], out).startswith(
        "prompt: row 'long'"
    )
    assert refused(engine, tokenizer, [replace(prompts[0], ids=(1,) * 62)], out).startswith("max_tokens: row 'p0'")
    assert refused(engine, tokenizer, [prompts[0], prompts[0]], out).startswith("data: two rows have the id 'p0'")
    assert refused(engine, tokenizer, prompts, out, beta=math.inf).startswith("beta: an infinite one does not guide")
    stopping = {"sampling": Sampling(max_tokens=4, stop=("x",)), "prefixes": {("p0", 0): NO_PREFIX}}
    assert refused(engine, tokenizer, prompts, out, **stopping).startswith(
        "stop: a text that begins in what was rolled"
    )
    assert not out.exists()


def test_what_the_engine_cannot_do_is_refused_before_anything_is_written(
    engine, tokenizer, prompts, tmp_path, monkeypatch
):
    def check(request):
        raise UserError(f"temperature: not {request.sampling.temperature}")

    monkeypatch.setattr(engine, "check", check)
    assert refused(engine, tokenizer, prompts, tmp_path / "t").startswith("temperature: not 1")
    assert not (tmp_path / "t").exists()


def test_times_are_in_the_manifest_alone(engine, tokenizer, prompts, tmp_path):
    for name in ("a", "b"):
        collect(engine, tokenizer, prompts, out=tmp_path / name, **SETTINGS)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a", "b")]
    assert manifests[0] | {"seconds": 0} == manifests[1] | {"seconds": 0}


def test_nothing_is_drawn_on_a_stderr_that_is_no_terminal(engine, tokenizer, prompts, tmp_path, capfd):
    collect(engine, tokenizer, prompts, out=tmp_path, **SETTINGS)
    assert capfd.readouterr() == ("", "")


def test_rows_of_data_become_prompts():
    class Tokenizer:
        chat_template = "x"
        bos_token_id = None

        def apply_chat_template(self, messages, add_generation_prompt, return_dict):
            return {"input_ids": [len(message["content"]) for message in messages]}

    (prompt,) = prompts_for([{"id": "7", "problem": "2+2", "answer": "4"}], Tokenizer(), "What is {problem}?")
    assert prompt.messages == [{"role": "user", "content": "What is 2+2?"}]
    assert (prompt.id, prompt.ids, prompt.answer) == ("7", (12,), "4")


COLLECTION = textwrap.dedent(
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.rollouts.collect import Prompt, collect
    from posttrain.rollouts.engine import Completion, Sampling
    from posttrain.rollouts.transformers import TransformersEngine


    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "#### " + "".join(map(str, ids))


    def run(out, resume):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, eos_token_id=1, **shape))
        question = [{"role": "user", "content": "?"}]
        prompts = [Prompt(str(i), question, tuple(range(2, 3 + i % 9)), "11") for i in range(60)]
        collect(
            TransformersEngine(model, fingerprint="x", slots=8),
            Tokenizer(),
            prompts,
            samples=4,
            sampling=Sampling(max_tokens=40),
            out=out,
            policy="random",
            shard_prompts=4,
            resume=resume,
        )
    """
)


@pytest.fixture
def run_here():
    """The collection of COLLECTION, in this process."""
    threads = torch.get_num_threads()
    namespace = {}
    exec(COLLECTION, namespace)
    yield namespace["run"]
    torch.set_num_threads(threads)


def kill_at_a_random_moment(out, chance, attempt, kills, seconds):
    """Starts the collection, or resumes it, and kills it in the first third of its share of the sampling: it may be that much
    faster than the whole one was."""
    command = f"{COLLECTION}\nrun({str(out)!r}, resume={attempt > 0})"
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.DEVNULL)
    before = len(list(out.glob("shard-*")))
    while len(list(out.glob("shard-*"))) == before and process.poll() is None:
        time.sleep(0.001)
    time.sleep(chance.random() * seconds / (3 * kills))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def kill_and_resume(tmp_path, run_here, kills):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(whole, resume=False)
    chance = random.Random(0)
    for attempt in range(kills):
        kill_at_a_random_moment(cut, chance, attempt, kills, read_manifest(whole)["seconds"])
    assert len(read_manifest(cut)["shards"]) < 15
    run_here(cut, resume=True)
    assert len(shards_of(whole)) == 15 and shards_of(cut) == shards_of(whole)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, run_here):
    kill_and_resume(tmp_path, run_here, kills=1)


@pytest.mark.slow
def test_a_run_killed_five_times_resumes_to_the_same_bytes(tmp_path, run_here):
    kill_and_resume(tmp_path, run_here, kills=5)
