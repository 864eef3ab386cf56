import copy
import math
from dataclasses import replace

import pytest
import torch
import transformers

from posttrain.errors import UserError
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine


def run(model, requests, slots=16, **settings):
    engine = TransformersEngine(model, fingerprint="x", slots=slots, **settings)
    return {completion.request_id: completion for completion in engine.generate(requests)}


def teacher_forced(model, request, completion, temperature=1.0, top_p=1.0):
    """Log-probs of a completion by one forward over all of it and a truncation by sorting."""
    ids = torch.tensor([request.prompt_ids + completion.ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float() / temperature
    ordered = logits.softmax(-1).sort(dim=-1, descending=True)
    cut = ordered.values.cumsum(-1) - ordered.values >= top_p
    dropped = torch.zeros_like(cut).scatter(1, ordered.indices, cut)
    logprobs = logits.masked_fill(dropped, -math.inf).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)


class Recorder:
    """Shapes of the batches that a model sees: prompts, then tokens; only the latter come with a mask."""

    def __init__(self, model, monkeypatch):
        self.prefilled, self.decoded = [], []
        forward = model.forward

        def recording(*args, **kwargs):
            shape = tuple(kwargs["input_ids"].shape)
            if kwargs["attention_mask"] is None:
                self.prefilled.append(shape)
            else:
                self.decoded.append(shape[0])
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", recording)


def test_greedy_ids_equal_generate_for_a_ragged_batch(model, ragged_requests):
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=48)) for r in ragged_requests(16, temperature=0)]
    width = max(len(r.prompt_ids) for r in requests)
    padded = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
    generated = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=48, do_sample=False)
    completions = run(model, requests, slots=5)
    for request, row in zip(requests, generated[:, width:].tolist(), strict=True):
        expected = row[: row.index(1) + 1] if 1 in row else row
        assert list(completions[request.id].ids) == expected


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_log_probs_equal_a_teacher_forced_forward(model, ragged_requests, law):
    requests = ragged_requests(12, **law)
    completions = run(model, requests, slots=5)
    for request in requests:
        completion = completions[request.id]
        expected = teacher_forced(model, request, completion, **law)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_bfloat16_log_probs_are_near_a_teacher_forced_forward(llama, ragged_requests):
    model = copy.deepcopy(llama).bfloat16()
    requests = ragged_requests(6)
    completions = run(model, requests)
    errors = torch.cat(
        [teacher_forced(model, r, completions[r.id]) - torch.tensor(completions[r.id].logprobs) for r in requests]
    )
    assert float(errors.abs().mean()) < 0.1


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_tokens_do_not_depend_on_the_number_of_slots(model, ragged_requests, slots):
    requests = ragged_requests(12)
    expected = run(model, requests, slots=12)
    found = run(model, requests, slots=slots)
    assert {i: c.ids for i, c in found.items()} == {i: c.ids for i, c in expected.items()}


def test_eager_attention_gives_the_same_tokens(llama, ragged_requests):
    eager = copy.deepcopy(llama)
    eager.set_attn_implementation("eager")
    requests = ragged_requests(8)
    assert {i: c.ids for i, c in run(eager, requests).items()} == {i: c.ids for i, c in run(llama, requests).items()}


def test_the_models_attention_is_left_as_it_was(llama, ragged_requests):
    run(llama, ragged_requests(2))
    assert llama.config._attn_implementation == "sdpa"


def test_a_seed_decides_its_own_request_only(llama, ragged_requests):
    requests = ragged_requests(6, max_tokens=20)
    reseeded = [replace(requests[0], sampling=replace(requests[0].sampling, seed=99)), *requests[1:]]
    before, after = run(llama, requests), run(llama, reseeded)
    assert before[0].ids != after[0].ids
    assert all(before[i].ids == after[i].ids for i in range(1, 6))


def test_samples_of_one_prompt_differ_and_a_longer_request_begins_like_a_shorter_one(llama):
    requests = [
        Request(i, (5, 6, 7), Sampling(max_tokens=tokens, seed=seed))
        for i, (tokens, seed) in enumerate([(8, 1), (8, 2), (20, 1)])
    ]
    completions = run(llama, requests, eos_ids=())
    assert completions[0].ids != completions[1].ids
    assert completions[2].ids[:8] == completions[0].ids


def test_requests_with_different_settings_share_a_batch(llama, ragged_requests):
    laws = [{}, {"temperature": 0}, {"top_k": 3}, {"temperature": 0.6, "top_p": 0.5}]
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=20, **laws[r.id % 4])) for r in ragged_requests(8)]
    together = run(llama, requests)
    for request in requests:
        alone = run(llama, [request])[request.id]
        assert together[request.id].ids == alone.ids
        torch.testing.assert_close(
            torch.tensor(together[request.id].logprobs), torch.tensor(alone.logprobs), atol=1e-4, rtol=0
        )


def test_equal_prompts_are_read_once(llama, monkeypatch):
    requests = [Request(i, tuple(range(2, 2 + 10 + i % 2)), Sampling(max_tokens=5, seed=i)) for i in range(8)]
    recorder = Recorder(llama, monkeypatch)
    together = run(llama, requests)
    assert recorder.prefilled == [(2, 10)]
    monkeypatch.undo()
    assert {i: c.ids for i, c in together.items()} == {r.id: run(llama, [r])[r.id].ids for r in requests}


def test_a_request_leaves_and_the_next_enters_while_others_run(llama, monkeypatch):
    lengths = [30, *[5] * 9]
    requests = [Request(i, (3, 4), Sampling(max_tokens=n, seed=i)) for i, n in enumerate(lengths)]
    recorder = Recorder(llama, monkeypatch)
    engine = TransformersEngine(llama, fingerprint="x", slots=4, eos_ids=())
    order = [completion.request_id for completion in engine.generate(requests)]
    assert order[-1] == 0 and sorted(order) == list(range(10))
    assert len(recorder.decoded) == 30  # the longest request's own steps, whatever runs beside it
    assert max(recorder.decoded) == 4


def test_a_finished_batch_costs_no_more_than_its_running_rows(llama, monkeypatch):
    requests = [Request(i, (3, 4), Sampling(max_tokens=n, seed=i)) for i, n in enumerate([1, 2, 3, 10])]
    recorder = Recorder(llama, monkeypatch)
    run(llama, requests, slots=4, eos_ids=())
    assert recorder.decoded == [4, 3, 2] + [1] * 7


def test_prompts_of_very_different_length_are_read_apart(llama, monkeypatch):
    recorder = Recorder(llama, monkeypatch)
    requests = [Request(i, (3,) * n, Sampling(max_tokens=1)) for i, n in enumerate([4, 100, 5, 101])]
    run(llama, requests, slots=4)
    assert recorder.prefilled == [(2, 4), (2, 100)]


def test_every_token_of_the_context_can_be_used(llama):
    completion = run(llama, [Request(0, (3,) * 200, Sampling(max_tokens=56))], eos_ids=())[0]
    assert len(completion.ids) == 56


def test_one_token_prompt_and_one_token_completion(llama):
    completion = run(llama, [Request(0, (9,), Sampling(temperature=0, max_tokens=1))], eos_ids=())[0]
    with torch.no_grad():
        assert completion.ids == (int(llama(torch.tensor([[9]])).logits[0, -1].argmax()),)
    assert completion.finish_reason == "length" and len(completion.logprobs) == 1


def test_stop_ids_of_a_request_replace_the_models_own(llama):
    free = run(llama, [Request(0, (5, 6), Sampling(max_tokens=30, seed=3))], eos_ids=())[0]
    stop = free.ids[7]
    first = free.ids.index(stop)
    stopped = run(
        llama, [Request(0, (5, 6), Sampling(max_tokens=30, seed=3, stop_ids=(stop,)))], eos_ids=(free.ids[0],)
    )[0]
    assert stopped.ids == free.ids[: first + 1]
    assert stopped.finish_reason == "stop" and free.finish_reason == "length"


def test_a_stop_id_as_the_last_allowed_token_is_a_stop(llama):
    free = run(llama, [Request(0, (5, 6), Sampling(temperature=0, max_tokens=1))], eos_ids=())[0]
    stopped = run(llama, [Request(0, (5, 6), Sampling(temperature=0, max_tokens=1))], eos_ids=free.ids)[0]
    assert stopped.finish_reason == "stop"


class Digits:
    """Token id 7 is the text "7 "."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f"{i} " for i in ids)


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(llama):
    request = Request(0, (5, 6), Sampling(max_tokens=30, seed=3))
    free = run(llama, [request], eos_ids=())[0]
    text = f"{free.ids[4]} {free.ids[5]} "
    stopping = replace(request, sampling=replace(request.sampling, stop=("never", text)))
    stopped = run(llama, [stopping], tokenizer=Digits(), eos_ids=())[0]
    assert stopped.ids == free.ids[:6]
    assert (stopped.finish_reason, stopped.stop) == ("stop", text)


def test_a_stop_text_needs_a_tokenizer(llama):
    with pytest.raises(UserError, match="^stop: "):
        run(llama, [Request(0, (5, 6), Sampling(max_tokens=2, stop=("\n",)))])


def test_end_ids_come_from_generation_config_and_tokenizer(llama):
    model = copy.deepcopy(llama)
    model.generation_config.eos_token_id = [1, 4]
    tokenizer = type("Tokenizer", (), {"eos_token_id": 6})()
    assert TransformersEngine(model, tokenizer, fingerprint="x").eos_ids == {1, 4, 6}


def test_an_abandoned_iterator_leaves_the_engine_usable(llama, ragged_requests):
    engine = TransformersEngine(llama.train(), fingerprint="x", slots=4)
    requests = ragged_requests(8)
    iterator = engine.generate(requests)
    first = next(iterator)
    iterator.close()
    assert llama.training
    again = {completion.request_id: completion for completion in engine.generate(requests)}
    llama.eval()
    assert len(again) == 8 and again[first.request_id] == first


def test_two_runs_of_a_training_model_leave_each_other_in_peace(llama, ragged_requests):
    """The one that ends first must not switch dropout on for the other, nor the last one leave it off."""
    llama = copy.deepcopy(llama)
    llama.config.attention_dropout = 0.5
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = {
        done.request_id: done for done in TransformersEngine(llama, fingerprint="x").generate(ragged_requests(8))
    }
    llama.train()
    llama.lm_head.eval()
    engine = TransformersEngine(llama, fingerprint="x", slots=8)
    first, second = (engine.generate(ragged_requests(8)) for _ in range(2))
    found = [[next(first)], [next(second)]]
    assert llama.training and not llama.lm_head.training
    found[0] += list(first)
    found[1] += list(second)
    assert llama.training and not llama.lm_head.training
    for completions in found:
        assert {done.request_id: done.ids for done in completions} == {
            number: done.ids for number, done in expected.items()
        }


def test_two_iterators_run_side_by_side(llama, ragged_requests):
    engine = TransformersEngine(llama, fingerprint="x", slots=4)
    requests = ragged_requests(6)
    pairs = zip(engine.generate(requests), engine.generate(requests), strict=True)
    assert all(left == right for left, right in pairs)


def test_ends_of_its_own_are_told_of(llama):
    usual, own = (TransformersEngine(llama, fingerprint="x", eos_ids=ends).settings for ends in (None, (5, 3)))
    assert "eos_ids" not in usual and own == {**usual, "eos_ids": [3, 5]}


def test_an_exception_in_the_middle_leaves_the_engine_usable(llama, ragged_requests, monkeypatch):
    engine = TransformersEngine(llama, fingerprint="x", slots=4)
    requests = ragged_requests(6)
    forward, calls = llama.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(engine.generate(requests))
    monkeypatch.undo()
    assert llama.config._attn_implementation == "sdpa"
    assert len(list(engine.generate(requests))) == 6


def test_generating_does_not_switch_gradients_off_for_the_caller(llama, ragged_requests):
    for _ in TransformersEngine(llama, fingerprint="x").generate(ragged_requests(2)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_logits_that_are_not_numbers_are_an_error(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"^model: .*NaN"):
        run(model, [Request(0, (3, 4), Sampling(max_tokens=3))])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [((), 5, "prompt"), ((3,) * 300, 5, "prompt"), ((3,) * 250, 7, "max_tokens"), ((3, 101), 5, "prompt")],
)
def test_a_bad_request_is_refused_before_any_generation(llama, monkeypatch, prompt, max_tokens, field):
    recorder = Recorder(llama, monkeypatch)
    engine = TransformersEngine(llama, fingerprint="x")
    with pytest.raises(UserError, match=f"^{field}: request 1"):
        engine.generate([Request(0, (3,), Sampling(max_tokens=2)), Request(1, prompt, Sampling(max_tokens=max_tokens))])
    assert recorder.prefilled == recorder.decoded == []


def test_no_requests_give_no_completions(llama):
    assert run(llama, []) == {}


def test_slots_below_one_are_refused(llama):
    with pytest.raises(UserError, match="^slots: "):
        TransformersEngine(llama, fingerprint="x", slots=0)


@pytest.mark.parametrize("kind", ["Mamba", "Bloom"])
def test_a_model_without_plain_attention_is_refused(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, n_layer=1, n_head=1
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(UserError, match="^model: "):
        TransformersEngine(model, fingerprint="x")
