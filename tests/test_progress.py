import os
import pty
import subprocess
import sys

CODE = """
from posttrain.progress import bar
with bar("rollout", 100) as shown:
    print(shown.shown)
    shown.skip(40)
    shown.advance(10, "12 tokens/s")
    import time; time.sleep(0.3)
"""


def test_on_a_terminal_it_says_how_far_and_how_long():
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=child, text=True, check=True, env=environment
    )
    os.close(child)
    shown = os.read(parent, 1 << 16).decode()
    assert done.stdout == "True\n" and "rollout" in shown and "50/100" in shown and "ETA" in shown
    assert "12 tokens/s" in shown


def test_elsewhere_it_is_quiet():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
