"""The curl lines of the README and the docs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from posttrain.serving.catalogue import Catalogue
from tests.serving.conftest import serving

PAGES = ("README.md", "docs/serving.md")
TEXT = "".join((Path(__file__).parents[2] / page).read_text() for page in PAGES)
LINES = re.findall(r"^(curl .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture(scope="module")
def url(policy, folders):
    catalogue = Catalogue.load(policy, {"value": str(folders.root / "q")}, {"probe": str(folders.root / "mean")})
    with serving(catalogue, key=None) as running:
        yield running.url


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("line", LINES)
def test_a_curl_line_of_the_docs_works(url, line):
    assert "http://127.0.0.1:8000" in line
    words = shlex.split(line.replace("http://127.0.0.1:8000", url))
    answer = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0, answer.stderr
    assert "error" not in answer.stdout and answer.stdout.strip()
    if "guidance" in line:
        assert '"kl"' in answer.stdout
        assert answer.stdout.endswith("data: [DONE]\n\n") == ("stream" in line)
    if "rerank" in line:
        assert '"scores"' in answer.stdout


def test_there_are_curl_lines():
    assert len(LINES) == 7
