"""Stand-ins for replicas of a rollout service, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import httpx

PRINT = "f" * 64
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("fake_replica.py")
CLIENT = httpx.Client(timeout=30, trust_env=False)  # one: to make it takes longer than to ask


class Fake:
    """A stand-in's process; killed, it comes back on the same port."""

    def __init__(self, delay=0.0):
        self.port, self.delay = 0, delay
        self.start()

    def start(self, fingerprint=PRINT):
        command = [sys.executable, str(SCRIPT), str(self.port), fingerprint, str(self.delay)]
        here = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def tell(self, **state):
        return CLIENT.post(f"{self.url}/fake", json=state).json()

    @property
    def state(self):
        return CLIENT.get(f"{self.url}/fake").json()
