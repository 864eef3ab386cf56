"""Many streaming clients at once against `posttrain serve`, on each engine; some leave in the middle of an answer."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import KEY, REAL_VLLM, started, wait_until
from tests.soak.sizes import size

CLIENTS = size(24, 200)
SECONDS = size(4, 60)  # of load, after as many of warming up
LEAVES = 0.1  # part of the answers that a client does not hear to the end
GROWTH = 64 << 20  # bytes that the server's memory may grow by, from the end of warming up to the end of the load
HEADERS = {"Authorization": f"Bearer {KEY}"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(600, 1200))]


def memory(pid: int) -> int:
    """Resident bytes of a process and those it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(resident[1]) * 1024 + sum(memory(int(child)) for child in children)


def check_stream(lines: list[str], usage: bool) -> None:
    """Server-sent events, from the role to the one [DONE]."""
    assert all(not line or line.startswith("data: ") for line in lines), lines
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.count("[DONE]") == 1 and events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    if usage:
        told = chunks.pop()
        assert told["choices"] == [] and told["usage"]["completion_tokens"] >= 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]


async def client(http: httpx.AsyncClient, number: int, end: float, counts: Counter[str]) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        usage, leaves = draw.random() < 0.5, draw.random() < LEAVES
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"{draw.randrange(99)}+{draw.randrange(99)}=?"}],
            "max_tokens": draw.randrange(1, 65),
            "seed": draw.randrange(2**31),
            "stream": True,
            **({"stream_options": {"include_usage": True}} if usage else {}),
        }
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert json.loads(await answer.aread())["error"]["type"] == "rate_limit_error"
                counts["refused"] += 1
            else:
                assert answer.status_code == 200, await answer.aread()
                lines = []
                async for line in answer.aiter_lines():
                    lines.append(line)
                    if leaves and len(lines) > 4:
                        break
                if leaves:
                    counts["left"] += 1
                else:
                    check_stream(lines, usage)
                    counts["finished"] += 1
        await asyncio.sleep(0.2 if answer.status_code == 429 else 0)


async def load(url: str, seconds: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, limits=limits, timeout=120) as http:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(http, number, end, counts) for number in range(CLIENTS)))
    return counts


def idle(url: str) -> bool:
    metrics = httpx.get(f"{url}/metrics", headers=HEADERS).text.splitlines()
    return {"posttrain_running 0.0", "posttrain_waiting 0.0"} <= set(metrics)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=REAL_VLLM)])
def test_many_streaming_clients(engine: str) -> None:
    """No error but 429s, every stream that was heard to its end well-formed, and as much memory as before."""
    with started("--engine", engine, "--max-requests", str(CLIENTS * 3 // 4)) as running:
        asyncio.run(load(running.url, 0.1))  # until vLLM's first step, which takes seconds, is made
        asyncio.run(load(running.url, SECONDS))
        before = memory(running.process.pid)
        begun = time.monotonic()
        counts = asyncio.run(load(running.url, SECONDS))
        seconds, grown = time.monotonic() - begun, memory(running.process.pid) - before
        told = f"{dict(counts)} in {seconds:.1f} s; memory {before >> 20} MiB, then {grown / 2**20:+.1f} MiB"
        print(told)
        assert counts["finished"] >= CLIENTS // 2 and counts["refused"] and counts["left"], told
        assert grown < GROWTH, told
        wait_until(lambda: idle(running.url))  # who left last is seen after the step under way
        assert httpx.get(f"{running.url}/health").status_code == 200
