"""A real server in this process: the embedded model, two guides and two probes that know nothing, on a free port. And one of
vLLM's engine, in processes of its own, with one of the guides."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn

from posttrain.decoding.guidance import Guidance
from posttrain.models.features import FeatureSpec
from posttrain.models.load import Policy, load_model
from posttrain.models.probe import Probe, ProbeCard
from posttrain.models.value import new_value_model
from posttrain.rollouts.transformers import Batch
from posttrain.serving.app import create_app
from posttrain.serving.catalogue import Catalogue, Limits

KEY = "a key"
LIMITS = Limits(requests=8, completions=16, body=100_000)
REAL_VLLM = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
both_engines = pytest.mark.parametrize(
    "server", ["transformers", pytest.param("vllm", marks=REAL_VLLM)], indirect=True, scope="module"
)


@pytest.fixture(scope="session")
def policy() -> Policy:
    return load_model("tiny", "cpu", "float32")


@pytest.fixture(scope="session")
def folders(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Guides and probes as they are given on the command line."""
    root = tmp_path_factory.mktemp("served")
    for name, settings in {"q": {"head": "q", "layers": 1}, "own": {"head": "shared"}}.items():
        value = new_value_model(policy, zero_init=False, **settings)
        value.head.out.weight.data *= 40  # strong opinions
        value.save_pretrained(root / name)
    torch.manual_seed(0)
    for name, layer in (("mean", 1), ("late", 2)):
        card = ProbeCard(
            dim=policy.model.config.hidden_size, feature=FeatureSpec(layer, "mean"), policy=policy.fingerprint
        )
        probe = Probe(card)
        torch.nn.init.normal_(probe.first.weight)
        probe.save_pretrained(root / name)
    return SimpleNamespace(root=root, guides=("q", "own"), probes=("mean", "late"))


@pytest.fixture(scope="session")
def catalogue(policy: Policy, folders: SimpleNamespace) -> Catalogue:
    named = [{name: str(folders.root / name) for name in names} for names in (folders.guides, folders.probes)]
    return Catalogue.load(policy, *named, limits=LIMITS, slots=8)


@pytest.fixture(scope="session")
def lazy_catalogue(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """One guide, V-type and lazy."""
    folder = tmp_path_factory.mktemp("v")
    value = new_value_model(policy, "v", layers=1, zero_init=False)
    value.head.weight.data *= 40
    value.save_pretrained(folder)
    return Catalogue.load(policy, {"v": str(folder)}, {}, Guidance(lazy=True), slots=4)


@contextmanager
def serving(catalogue: Catalogue, key: str | None = KEY) -> Iterator[SimpleNamespace]:
    """A server on a thread: its url, its service, and `stop`, which drains."""
    app = create_app(catalogue, key)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=20)
    )
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        wait_until(lambda: server.started)

        def stop() -> None:
            server.should_exit = True

        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            yield SimpleNamespace(url=url, service=app.state.service, stop=stop, thread=thread)
        finally:
            stop()
            thread.join(30)
        assert not thread.is_alive()


@contextmanager
def started(*options: str, model: str = "tiny") -> Iterator[SimpleNamespace]:
    """`posttrain serve` in a process of its own, vLLM within it (unless the environment says otherwise: two more would take
    longer to start): its url and the process."""
    command = [sys.executable, "-m", "posttrain", "serve", "--model", model, "--port", "0", *options]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ, "POSTTRAIN_API_KEY": KEY}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            line = ""
            while not line.startswith("ready: "):
                line = process.stdout.readline()
                assert line, (log.seek(0), log.read()[-4000:])[1]
            yield SimpleNamespace(url=line.removeprefix("ready: ").strip(), process=process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
        finally:
            process.kill()


@pytest.fixture(scope="session")
def vllm_server(folders: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The same limits; starting it takes most of the time."""
    limits = ("--max-requests", "8", "--max-completions", "16", "--max-body", "100000", "--slots", "8")
    probes = (f"--probe={name}={folders.root / name}" for name in folders.probes)
    with started("--engine", "vllm", f"--guide=q={folders.root / 'q'}", *probes, *limits) as running:
        running.engine, running.guides = "vllm", ("q",)
        yield running


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, folders: SimpleNamespace) -> Iterator[SimpleNamespace]:
    if getattr(request, "param", "transformers") == "vllm":
        yield request.getfixturevalue("vllm_server")
        return
    with serving(request.getfixturevalue("catalogue")) as running:
        running.engine, running.guides = "transformers", folders.guides
        yield running


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Any:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: SimpleNamespace) -> Any:
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as http:
        yield http


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty milliseconds a token."""
    step = Batch.step

    def waiting(self: Batch) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Batch, "step", waiting)


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
