"""What can only be seen from outside of a server whose engine is vLLM: that clients who leave free it, and who has to wait."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import KEY, LIMITS, REAL_VLLM, wait_until

pytestmark = [*REAL_VLLM, pytest.mark.parametrize("server", ["vllm"], indirect=True, scope="module")]
LONG = {"model": "tiny", "prompt": "1", "n": 16, "max_tokens": 400, "temperature": 2.0, "seed": 1}


def figures(http):
    lines = (line.rpartition(" ") for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("posttrain_"): float(value) for name, _, value in lines}


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"guidance": {"beta": 0.1}}])
def test_a_client_that_leaves_frees_its_slots(server, http, more):
    body = json.dumps({**LONG, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert (
        http.post("/v1/completions", json={**LONG, **more, "max_tokens": 3}).status_code == 200
    )  # the first step takes seconds
    before = figures(http)["cancelled_requests_total"]
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: figures(http)["running"] == 8)
        assert figures(http)["waiting"] > 0  # sixteen are many
    wait_until(lambda: figures(http)["running"] + figures(http)["waiting"] == 0, seconds=20)
    assert figures(http)["cancelled_requests_total"] == before + 1
    assert http.post("/v1/completions", json={**LONG, "n": 1, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("temperature", [3.0, 0.001])
def test_a_temperature_that_vllm_has_not_is_a_mistake_of_the_client(http, temperature):
    answer = http.post("/v1/completions", json={**LONG, "temperature": temperature})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"
    assert "from 0.01 to 2" in answer.json()["error"]["message"]


def test_too_many_requests_are_told_to_come_back(http):
    """Twice as many as there may be: none is lost, and who is refused is told when to come back."""

    def ask(number):
        while True:
            answer = http.post("/v1/completions", json={**LONG, "n": 2, "max_tokens": 60, "seed": number})
            if answer.status_code != 429:
                return answer
            refusals.append(int(answer.headers["Retry-After"]))
            time.sleep(0.1)

    refusals = []
    with ThreadPoolExecutor(2 * LIMITS.requests) as pool:
        answers = list(pool.map(ask, range(2 * LIMITS.requests)))
    assert {answer.status_code for answer in answers} == {200}
    assert refusals and min(refusals) >= 1
    assert all(len(answer.json()["choices"]) == 2 for answer in answers)
    assert figures(http)["running"] == 0
