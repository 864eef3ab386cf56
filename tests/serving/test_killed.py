"""Servers of vLLM that are killed with -9: nothing of them stays behind."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [("serve", "--engine", "vllm"), ("rollout-service",)], ids=" ".join)
def test_the_engine_ends_with_the_server(command: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    words = [sys.executable, "-m", "posttrain", *command, "--model", "tiny", "--port", "0", "--slots", "4"]
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        processes: list[psutil.Process] = []
        try:
            line = ""
            while not line.startswith("ready: "):
                line = server.stdout.readline()
                assert line, (tmp_path / "log").read_text()[-3000:]
            processes = psutil.Process(server.pid).children(recursive=True)
            assert any("EngineCore" in " ".join(process.cmdline()) for process in processes)
            server.kill()
            _, alive = psutil.wait_procs(processes, timeout=60)
            assert not alive
        finally:
            server.kill()
            for process in processes:
                if process.is_running():
                    process.kill()
