"""A server whose guide is lazy: the engine's answers, of whose law nothing is told."""

import httpx
import pytest

from posttrain.data.prompts import render
from posttrain.rollouts.engine import Request, Sampling
from tests.serving.conftest import serving

MESSAGES = [{"role": "user", "content": "23+48-17=?"}]
BODY = {"messages": MESSAGES, "seed": 7, "temperature": 1.3, "max_tokens": 24, "guidance": {"beta": 0.05}}


@pytest.fixture(scope="module")
def http(lazy_catalogue):
    with serving(lazy_catalogue, key=None) as running, httpx.Client(base_url=running.url, timeout=300) as http:
        yield http


def test_the_answer_is_the_engine_s_and_its_kl_is_null(http, lazy_catalogue):
    tokenizer = lazy_catalogue.policy.tokenizer
    told = http.post("/v1/chat/completions", json=BODY).json()["choices"][0]
    request = Request(0, tuple(render(tokenizer, MESSAGES)), Sampling(1.3, max_tokens=24, seed=7), 0.05, "v")
    [expected] = lazy_catalogue.engine.generate([request])
    assert told["message"]["content"] == tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert told["guidance"] == {"kl": None, "log_ratio": None} and told["logprobs"] is None
    with http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as streamed:
        *_, last, done = [line for line in streamed.iter_lines() if line]
    assert '"guidance": {"kl": null, "log_ratio": null}' in last and done == "data: [DONE]"
    assert http.get("/v1/models").json()["data"][0]["lazy"] == ["v"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs"),
        ({"guidance": {"explain": True}}, "guidance.explain"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_what_needs_the_whole_law_is_a_400_and_without_guidance_it_is_not(http, more, field):
    answer = http.post("/v1/chat/completions", json={**BODY, **more})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert answer.json()["error"]["message"].startswith(f"{field}: needs the whole guided law")
    free = {name: value for name, value in {**BODY, **more}.items() if name != "guidance"}
    assert http.post("/v1/chat/completions", json=free).status_code == 200
