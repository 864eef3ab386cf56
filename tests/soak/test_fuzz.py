"""Fuzzed requests to a real server, made from its own OpenAPI document: right ones, wrong ones, and bytes that are no JSON."""

import json
from collections import Counter
from types import SimpleNamespace

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.serving.conftest import KEY, catalogue, folders, policy, server  # noqa: F401
from tests.serving.test_app import ASKED, CHAT, PLAIN, is_error_object
from tests.soak.sizes import size

CASES = size(60, 1200)
HEADERS = {"Authorization": f"Bearer {KEY}"}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(600, 7200))]


def fuzz(cases: int) -> settings:
    """Without shrinking: the first example that fails says enough."""
    phases = [Phase.explicit, Phase.generate]
    return settings(max_examples=cases, phases=phases, suppress_health_check=list(HealthCheck))


def test_requests_from_the_openapi_document(server: SimpleNamespace) -> None:  # noqa: F811
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    assert {operation.path for operation in posts} == {CHAT, PLAIN}
    statuses: Counter[int] = Counter()
    share = CASES * 9 // 10 // (2 * len(posts))  # the rest goes to the questions without a body
    for operation in operations:
        for mode in schemathesis.GenerationMode if operation in posts else [schemathesis.GenerationMode.POSITIVE]:
            cases = operation.as_strategy(generation_mode=mode)

            @fuzz(share if operation in posts else max(1, CASES // 10 // len(operations)))
            @given(case=cases)
            def asked(case: schemathesis.Case) -> None:
                response = case.call_and_validate(headers=HEADERS, checks=CHECKS, timeout=60)
                statuses[response.status_code] += 1
                if response.status_code >= 400:
                    error = json.loads(response.content)["error"]
                    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in error["message"]

            asked()
    print(f"{sum(statuses.values())} requests: {dict(statuses)}")
    assert sum(statuses.values()) >= CASES * 3 // 4 and statuses[400] and statuses[200]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_bytes_that_are_no_request(server: SimpleNamespace) -> None:  # noqa: F811
    """A good request with a piece cut out, doubled or replaced."""
    good = json.dumps({**ASKED, "guidance": {"guide": "q", "beta": 0.1}, "max_tokens": 1}).encode()
    places = st.integers(0, len(good))

    @fuzz(CASES)
    @given(
        places, places, st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"{", b"[" * 3000, b"-1", b"1e999"]))
    )
    def asked(start: int, end: int, piece: bytes) -> None:
        headers = {**HEADERS, "Content-Type": "application/json"}
        answer = httpx.post(
            server.url + CHAT,
            content=good[: min(start, end)] + piece + good[max(start, end) :],
            headers=headers,
            timeout=60,
        )
        assert answer.status_code == 200 or (answer.status_code in (400, 404) and is_error_object(answer))

    asked()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
