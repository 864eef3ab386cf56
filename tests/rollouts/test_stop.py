import pytest

from posttrain.errors import UserError
from posttrain.rollouts.collect import collect, completion_text
from posttrain.rollouts.engine import Completion, Request, Sampling, first_stop
from posttrain.rollouts.transformers import TransformersEngine


class Letters:
    """Token ids as letters, two ids to a letter; id 1 is special."""

    eos_token_id = 1

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + token // 2 % 26) for token in ids if token != 1 or not skip_special_tokens)


def test_the_first_stop_text_counts():
    assert first_stop("abcd", ["cd", "b"]) == "b" and first_stop("abcd", ["x"]) is None and first_stop("a", []) is None


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match="^stop: "):
        Sampling(stop=("a", ""))


def test_stop_texts_need_a_tokenizer(llama):
    engine = TransformersEngine(llama, fingerprint="x")
    with pytest.raises(UserError, match="^stop: "):
        engine.generate([Request(0, (5,), Sampling(max_tokens=4, stop=("a",)))])


def test_a_completion_ends_with_the_token_that_completes_a_stop_text(llama):
    tokenizer = Letters()
    engine = TransformersEngine(llama, tokenizer, fingerprint="x", slots=4)
    free = {
        c.request_id: c
        for c in engine.generate([Request(i, (5, 6), Sampling(max_tokens=60, seed=i)) for i in range(8)])
    }
    stops = {i: tokenizer.decode(c.ids)[10:12] for i, c in free.items() if len(c.ids) > 20}
    assert len(stops) >= 3
    requests = [Request(i, (5, 6), Sampling(max_tokens=60, seed=i, stop=(text, "!"))) for i, text in stops.items()]
    for completion in engine.generate(requests):
        i = completion.request_id
        whole = tokenizer.decode(free[i].ids)
        assert completion.ids == free[i].ids[: len(completion.ids)]
        assert completion.finish_reason == "stop" and completion.stop == stops[i]
        assert tokenizer.decode(completion.ids).endswith(stops[i])
        assert completion_text(tokenizer, completion) == whole[: whole.index(stops[i])]


def test_without_a_stop_text_nothing_is_cut():
    assert completion_text(Letters(), Completion(0, (0, 2, 4), (0.0,) * 3, "stop")) == "abc"


def test_stop_texts_are_part_of_what_a_resumed_collection_must_share(engine, tokenizer, prompts, tmp_path):
    settings = {"samples": 1, "out": tmp_path / "t", "policy": "p"}
    collect(engine, tokenizer, prompts, sampling=Sampling(max_tokens=4, stop=("x",)), **settings)
    with pytest.raises(UserError, match="^stop: "):
        collect(engine, tokenizer, prompts, sampling=Sampling(max_tokens=4), resume=True, **settings)
