"""`posttrain rollout-service` with the real vLLM, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Service:
    """Started at once, to start several side by side; killed, it comes back on the same port. `ready` waits for it."""

    def __init__(self, log: Path, *options: str, model: str = "tiny") -> None:
        self.log, self.options, self.model, self.port = log, options, model, "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "posttrain", "rollout-service", "--model", self.model, "--port", self.port]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def ready(self) -> str:
        """Its URL."""
        line = self.process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), self.log.read_text()[-3000:]
        url = line.removeprefix("ready: ").strip()
        self.port = url.rpartition(":")[2]
        return url

    def kill(self) -> None:
        """With all of its processes: vLLM's engine is one of its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.process.stdout.close()
