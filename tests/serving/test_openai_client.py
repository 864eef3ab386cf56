"""What OpenAI's own client sees."""

import openai
import pytest

from tests.serving.conftest import both_engines

pytestmark = both_engines
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "23+48-17=?"}]}
PLAIN = {"model": "tiny", "prompt": "<|user|>23+48-17=?<|assistant|>"}


def test_a_chat_is_answered_as_the_engine_answers(client, catalogue):
    answer = client.chat.completions.create(**ASKED, temperature=0)
    ids = catalogue.policy.tokenizer(PLAIN["prompt"])["input_ids"]
    expected = catalogue.policy.model.generate(input_ids=_tensor(ids), do_sample=False, max_new_tokens=400)[
        0, len(ids) :
    ]
    text = catalogue.policy.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.choices[0].message.content == text and text
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(expected))


def _tensor(ids):
    import torch

    return torch.tensor([ids])


def test_a_completion_continues_the_text_and_ends_at_its_length(client):
    whole = client.completions.create(**PLAIN, temperature=0, max_tokens=300).choices[0].text
    cut = client.completions.create(**PLAIN, temperature=0, max_tokens=9).choices[0]
    assert cut.finish_reason == "length" and cut.text == whole[:9]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    law = {"seed": 5, "n": n, "temperature": 1.2}
    whole = client.chat.completions.create(**ASKED, **law)
    chunks = list(client.chat.completions.create(**ASKED, **law, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_a_streamed_completion_comes_in_pieces(client):
    whole = client.completions.create(**PLAIN, seed=1, max_tokens=30).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**PLAIN, seed=1, max_tokens=30, stream=True)]
    assert "".join(pieces) == whole and len(pieces) > 5


@pytest.mark.slow
def test_the_same_seed_says_the_same_and_every_sample_something_else(client):
    first, again = (client.chat.completions.create(**ASKED, seed=3, n=6, temperature=1.5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts and len(set(texts)) > 2
    alone = client.chat.completions.create(**ASKED, seed=3, temperature=1.5)
    assert alone.choices[0].message.content == texts[0]
    unseeded = {client.chat.completions.create(**ASKED, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


def test_logprobs_of_a_chat_are_those_of_the_model(client, catalogue):
    import torch

    answer = client.chat.completions.create(**ASKED, seed=2, logprobs=True, top_logprobs=3)
    shown = answer.choices[0].logprobs.content
    tokenizer = catalogue.policy.tokenizer
    prompt = tokenizer(PLAIN["prompt"])["input_ids"]
    ids = [tokenizer.convert_tokens_to_ids(one.token) for one in shown]
    with torch.inference_mode():
        law = catalogue.policy.model(_tensor(prompt + ids)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [one.logprob for one in shown] == pytest.approx([law[i, id].item() for i, id in enumerate(ids)], abs=1e-4)
    for row, one in zip(law, shown, strict=True):
        best = row.topk(3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert one.top_logprobs[0].token == tokenizer.decode([best.indices[0]])
    assert "".join(one.token for one in shown[:-1]) == answer.choices[0].message.content


def test_logprobs_of_a_completion_name_offsets(client):
    choice = client.completions.create(**PLAIN, seed=2, logprobs=2, max_tokens=12).choices[0]
    shown = choice.logprobs
    assert [choice.text[at : at + 1] for at in shown.text_offset] == shown.tokens
    assert all(
        len(top) == 2 and max(top.values()) >= logprob - 1e-6
        for top, logprob in zip(shown.top_logprobs, shown.token_logprobs, strict=True)
    )


def test_streamed_logprobs_are_the_same_ones(client):
    law = {"seed": 2, "logprobs": 1, "max_tokens": 12, "stop": ["=", "zz"]}
    whole = client.completions.create(**PLAIN, **law).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**PLAIN, **law, stream=True)]
    assert [t for c in chunks for t in c.tokens] == whole.tokens
    assert [o for c in chunks for o in c.text_offset] == whole.text_offset


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(client):
    whole = client.chat.completions.create(**ASKED, temperature=0).choices[0].message.content
    stop = whole[4:7]
    assert whole.index(stop) > 0
    law = {"temperature": 0, "stop": [stop, "never"]}
    cut = client.chat.completions.create(**ASKED, **law).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    pieces = client.chat.completions.create(**ASKED, **law, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == cut.message.content


def test_several_prompts_have_n_choices_each(client):
    both = client.completions.create(
        model="tiny", prompt=[PLAIN["prompt"], "<|user|>9-2=?<|assistant|>"], n=2, temperature=0, max_tokens=8
    )
    texts = [choice.text for choice in both.choices]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_token_ids_are_a_prompt(client, catalogue):
    ids = catalogue.policy.tokenizer(PLAIN["prompt"])["input_ids"]
    law = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    texts = {
        client.completions.create(prompt=prompt, **law).choices[0].text for prompt in (PLAIN["prompt"], ids, [ids])
    }
    assert len(texts) == 1


def test_the_models_are_listed_with_their_guides_and_probes(client, server):
    [model] = client.models.list()
    assert model.id == "tiny" and model.guides == [*server.guides] and model.probes == ["mean", "late"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("kind", "settings", "param"),
    [
        (openai.NotFoundError, {"model": "gpt"}, "model"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"max_tokens": 100_000}, "max_tokens"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "1+" * 400}]}, "prompt"),
        (openai.BadRequestError, {"n": 17}, "n"),
    ],
)
def test_errors_are_the_client_s_own(client, kind, settings, param):
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**{**ASKED, **settings})
    assert refused.value.param == param


def test_a_wrong_key_is_refused(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
