"""The two fields of ours: `guidance` and `rerank`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.data.prompts import render
from posttrain.decoding.guides import Guides
from posttrain.decoding.reward_model import value_scores
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine
from tests.serving.conftest import both_engines

MESSAGES = [{"role": "user", "content": "23+48-17=?"}]
LAW = {"messages": MESSAGES, "seed": 7, "temperature": 1.3, "max_tokens": 40}


def ask(http, **more):
    answer = http.post("/v1/chat/completions", json={**LAW, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def engine_says(catalogue, guide, temperature, **request):
    """The same request, asked of the transformers engine, whose only guide this is."""
    policy = catalogue.policy
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint="x", guide=catalogue.guides[guide])
    prompt = tuple(render(policy.tokenizer, MESSAGES))
    [completion] = engine.generate([Request(0, prompt, Sampling(temperature, max_tokens=40, seed=7), **request)])
    return completion


def text_of(catalogue, ids):
    return catalogue.policy.tokenizer.decode(ids, skip_special_tokens=True)


def ids_of(catalogue, choice):
    return [catalogue.policy.tokenizer.convert_tokens_to_ids(one["token"]) for one in choice["logprobs"]["content"]]


def close(found, expected):
    """Equal, numbers to within rounding: vLLM rounds by batch, and by what its cache holds."""
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-4)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == expected


@both_engines
@pytest.mark.parametrize("guide", ["q", "own"])
@pytest.mark.parametrize("more", [{}, {"candidates": 3}])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_guidance_is_that_of_the_named_guide(http, server, catalogue, guide, more, temperature):
    if guide not in server.guides:
        assert http.post("/v1/chat/completions", json={**LAW, "guidance": {"guide": guide}}).status_code == 404
        return
    field = {"beta": 0.05, "guide": guide, **({"top_k": more["candidates"]} if more else {})}
    answer = ask(http, temperature=temperature, guidance=field)["choices"][0]
    if temperature and server.engine == "vllm":  # whose seeds draw something else
        assert answer["guidance"]["kl"] > 0.01
        return
    expected = engine_says(catalogue, guide, temperature, beta=0.05, **more)
    assert answer["message"]["content"] == text_of(catalogue, expected.ids)
    assert answer["guidance"]["kl"] == pytest.approx(expected.kl, rel=1e-3) and expected.kl > 0.05


@both_engines
def test_without_guidance_the_answer_is_the_model_s(http, catalogue):
    answer = ask(http, temperature=0)["choices"][0]
    assert answer["message"]["content"] == text_of(catalogue, engine_says(catalogue, "q", 0.0).ids)
    assert "guidance" not in answer


@both_engines
def test_requests_of_different_guides_share_a_batch_and_stay_what_they_are(http, server):
    fields = [{"beta": beta, "guide": name} for beta in (0.05, 0.2) for name in server.guides]
    asked = [{}, *({"guidance": field} for field in fields)]
    alone = [ask(http, **more)["choices"][0]["message"] for more in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda more: ask(http, **more)["choices"][0]["message"], asked))
    assert together == alone and len({message["content"] for message in alone}) > 2


def test_a_guide_of_several_is_that_guide_alone(catalogue):
    policy = catalogue.policy
    prompt = tuple(render(policy.tokenizer, MESSAGES))
    requests = [
        Request(i, prompt[: 3 + i], Sampling(seed=i, max_tokens=4 + 3 * i), beta, guide)
        for i, (beta, guide) in enumerate([(0.05, "q"), (0.1, "own"), (None, None), (0.2, "q"), (1.0, "own")])
    ]

    def run(guide, requests):
        engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint="x", slots=3, guide=guide)
        return {done.request_id: (done.ids, pytest.approx(done.kl, abs=1e-4)) for done in engine.generate(requests)}

    together = run(Guides(catalogue.guides), requests)
    for request in requests:
        assert together[request.id] == run(catalogue.guides[request.guide or "q"], [request])[request.id]


@both_engines
def test_a_guided_stream_says_how_far_it_was_moved(client):
    body = {"guidance": {"beta": 0.05, "guide": "q"}}
    whole = client.chat.completions.create(model="tiny", **LAW, extra_body=body)
    *_, last = client.chat.completions.create(model="tiny", **LAW, extra_body=body, stream=True)
    assert close(last.choices[0].guidance, whole.choices[0].guidance)


@both_engines
@pytest.mark.parametrize("probe", ["mean", "late"])
def test_rerank_keeps_the_best_of_k_with_its_scores(http, catalogue, probe):
    told = ask(http, rerank={"k": 6, "probe": probe}, logprobs=True)
    samples = ask(http, n=6)["choices"]
    scores = told["rerank"]["scores"]
    best = scores.index(max(scores))
    assert told["rerank"]["chosen"] == best and told["rerank"]["probe"] == probe and len(set(scores)) > 2
    assert [choice["message"]["content"] for choice in told["choices"]] == [samples[best]["message"]["content"]]
    again = catalogue.rerankers[probe].score(
        render(catalogue.policy.tokenizer, MESSAGES), [ids_of(catalogue, told["choices"][0])]
    )
    assert again.item() == pytest.approx(scores[best], abs=0.02)  # features are float16


@both_engines
@pytest.mark.parametrize("guide", ["q", "own"])
def test_rerank_by_a_guide_keeps_what_its_value_model_expects_most_of(http, server, catalogue, guide):
    if guide not in server.guides:
        guide = server.guides[0]
    told = ask(http, temperature=1.9, rerank={"k": 6, "guide": guide})
    samples = ask(http, temperature=1.9, n=6, logprobs=True)["choices"]
    prompt = tuple(render(catalogue.policy.tokenizer, MESSAGES))
    rows = [(prompt, ids_of(catalogue, one)) for one in samples]
    scores = value_scores(catalogue.guides[guide].value, rows, catalogue.policy.model).tolist()
    assert told["rerank"]["scores"] == pytest.approx(scores, abs=1e-4) and len(set(scores)) > 1
    best = scores.index(max(scores))
    assert told["rerank"]["chosen"] == best and told["rerank"]["guide"] == guide and "probe" not in told["rerank"]
    assert [choice["message"] for choice in told["choices"]] == [samples[best]["message"]]


@both_engines
def test_a_guide_explains_every_token_when_asked(http, client, catalogue):
    field = {"beta": 0.05, "guide": "q", "top_k": 5}
    plain = ask(http, guidance=field)["choices"][0]
    told = ask(http, guidance={**field, "explain": True}, logprobs=True)["choices"][0]
    tokens = told["guidance"].pop("tokens")
    assert close({**told, "logprobs": None}, plain)  # nothing else changes
    assert [(t["token"], t["logprob"]) for t in tokens] == [
        (t["token"], t["logprob"]) for t in told["logprobs"]["content"]
    ]
    moved = sum(token["logprob"] - token["reference"] for token in tokens)
    assert moved == pytest.approx(plain["guidance"]["log_ratio"], abs=1e-4)
    for token in tokens:
        assert 1 <= len(token["candidates"]) <= 5
        names = [one["token"] for one in token["candidates"]]
        assert token["token"] in names and all(0 <= one["value"] <= 1 for one in token["candidates"] if len(names) > 1)
    *_, last = client.chat.completions.create(
        model="tiny", **LAW, extra_body={"guidance": {**field, "explain": True}}, stream=True
    )
    assert close(last.choices[0].guidance["tokens"], tokens)


@both_engines
def test_rerank_counts_all_that_it_sampled(http):
    sampled = ask(http, n=6)["usage"]
    assert ask(http, rerank={"k": 6, "probe": "mean"})["usage"] == sampled


@both_engines
def test_rerank_at_a_temperature_draws_the_same_with_the_same_seed(http):
    field = {"max_tokens": 4, "rerank": {"k": 4, "beta": 1e6, "probe": "mean"}}
    chosen, again = ([ask(http, **field, seed=seed)["rerank"]["chosen"] for seed in range(6)] for _ in range(2))
    assert chosen == again and len(set(chosen)) > 1


@both_engines
def test_rerank_streams_what_it_chose(client, server):
    body = {"rerank": {"k": 4, "probe": "late"}, "guidance": {"guide": server.guides[-1]}}
    whole = client.chat.completions.create(model="tiny", **LAW, extra_body=body)
    chunks = list(client.chat.completions.create(model="tiny", **LAW, extra_body=body, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert close(chunks[-1].rerank, whole.rerank)


@pytest.mark.parametrize(
    ("field", "status", "message"),
    [
        ({"guidance": {"beta": 0}}, 400, "guidance.beta: "),
        ({"guidance": {"beta": 1e-12, "guide": "q"}}, 400, "guidance.beta: "),
        ({"guidance": {"top_k": 21, "guide": "q"}}, 400, "guidance.top_k: at most 20"),
        ({"guidance": {}}, 400, "guidance.guide: missing; it must be one of q, own"),
        ({"guidance": {"guide": "../own"}}, 404, "guidance.guide: there is no '../own' here (did you mean own?)"),
        ({"guidance": {"bta": 1}}, 400, "guidance.bta: unknown field (did you mean beta?)"),
        ({"guidence": {}}, 400, "guidence: unknown field (did you mean guidance?)"),
        ({"rerank": {}}, 400, "rerank.k: "),
        ({"rerank": {"k": 17, "probe": "mean"}}, 400, "rerank.k: at most 16"),
        ({"rerank": {"k": -2}}, 400, "rerank.k: "),
        ({"rerank": {"k": 2, "beta": -1}}, 400, "rerank.beta: "),
        ({"rerank": {"k": 2, "probe": "meen"}}, 404, "rerank.probe: there is no 'meen' here (did you mean mean?)"),
        ({"rerank": {"k": 2, "guide": "own2"}}, 404, "rerank.guide: there is no 'own2' here (did you mean own?)"),
        ({"rerank": {"k": 2, "probe": "mean", "guide": "q"}}, 400, "rerank: "),
        ({"guidance": {"guide": "q", "explain": 1}}, 400, "guidance.explain: "),
        ({"rerank": {"k": 2, "probe": "mean"}, "n": 2}, 400, "n: must be 1 with rerank"),
    ],
)
def test_what_cannot_be_is_refused(http, field, status, message):
    answer = http.post("/v1/chat/completions", json={**LAW, **field})
    assert answer.status_code == status and answer.json()["error"]["message"].startswith(message)
