import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from posttrain.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached by others; give --api-key"),
        (["--api-key", ""], "api-key: is empty"),
        (["--port", "99999"], "port: must be between"),
        (["--slots", "0"], "slots: must be at least 1, got 0"),
        (["--drain", "-1"], "drain: must not be negative"),
        (["--max-requests", "0"], "max-requests: must be at least 1, got 0"),
        (["--candidates", "0"], "candidates: must be at least 1"),
        (["--guide", "a=x", "--guide", "a=y"], "guide: a names two folders"),
        (["--port", "0", "--guide", "nowhere"], "guide: nowhere has no config.json"),
        (["--port", "0", "--probe", "nowhere"], "probe: nowhere has no config.json"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_API_KEY", raising=False)
    assert main(["serve", "--model", "tiny", *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_a_server_says_when_it_is_ready_and_ends_well_on_sigterm():
    command = [sys.executable, "-m", "posttrain", "serve", "--model", "tiny", "--port", "0", "--threads", "1"]
    environment = {**os.environ, "POSTTRAIN_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "model tiny, guides: none, probes: none\n"
            url = process.stdout.readline().removeprefix("ready: ").strip()
            body = json.dumps({"prompt": "1+1=", "max_tokens": 5}).encode()
            headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as answer:
                assert len(json.load(answer)["choices"]) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
