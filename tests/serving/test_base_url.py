"""`posttrain eval --base-url` against a real server of `posttrain serve`."""

import json

import pytest

from posttrain.cli.main import main
from posttrain.rollouts.table import read_table
from tests.serving.conftest import KEY

EVAL = ("eval", "arithmetic", "--model", "tiny", "--limit", "6", "--temperature", "0", "--n", "1")


@pytest.mark.slow
def test_an_endpoint_is_measured_as_the_model_behind_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    endpoint = ("--base-url", f"{server.url}/v1", "--api-key-env", "ENDPOINT_KEY", "--slots", "4")
    assert main([*EVAL, *endpoint, "--out", str(tmp_path / "endpoint")]) == 0
    assert main([*EVAL, "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "model")]) == 0
    found, expected = (read_table(tmp_path / name / "arithmetic" / "rollouts") for name in ("endpoint", "model"))
    for column in ("prompt_id", "completion", "correct", "finish_reason"):
        assert found.column(column) == expected.column(column), column
    assert [len(ids) for ids in found.column("completion_ids")] == [
        len(ids) for ids in expected.column("completion_ids")
    ]
    assert {id for ids in found.column("completion_ids") for id in ids} == {-1}
    assert found.column("logprobs") == [None] * 6
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("endpoint", "model")]
    summaries = [report["benchmarks"]["arithmetic"] for report in reports]
    assert summaries[0]["metrics"]["pass@1"] == summaries[1]["metrics"]["pass@1"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    run = json.loads((tmp_path / "endpoint" / "run.json").read_text())
    assert run["fingerprint"] == f"unknown at {server.url}/v1"
    assert run["settings"]["completion_ids"] == "unknown (-1), as many as the endpoint counted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key-env", "NOWHERE"], "--api-key-env: the environment has no NOWHERE"),
        ([], "api-key: missing or wrong"),
        (["--engine", "vllm"], "--engine: not with --base-url"),
        (["--dtype", "float32"], "--dtype: not with --base-url"),
    ],
)
def test_a_mistake_is_one_line(server, tmp_path, capsys, options, message):
    assert main([*EVAL, "--base-url", server.url, *options, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_text_prompt_is_not_asked_of_a_chat_endpoint(tmp_path, capsys):
    (tmp_path / "plain.yaml").write_text("data: arithmetic\nsplit: test\nprompt: '{problem}'\nchat: false\n")
    options = ("--base-url", "http://127.0.0.1:1", "--out", str(tmp_path / "run"))
    assert main(["eval", str(tmp_path / "plain.yaml"), *EVAL[2:], *options]) == 2
    assert "base-url: plain has a plain text prompt" in capsys.readouterr().err


@pytest.mark.slow
def test_what_belongs_to_an_endpoint_or_a_service_needs_one(tmp_path, capsys):
    for options, message in (
        (["--api-key-env", "HOME"], "--api-key-env: it is the endpoint's; name one with --base-url URL"),
        (["--url", "http://127.0.0.1:1"], "--url: it is the service's; add --engine service"),
        (["--engine", "service"], "url: give at least one"),
        (
            ["--engine", "service", "--url", "http://127.0.0.1:1", "--dtype", "float32"],
            "--dtype: not with --engine service",
        ),
        (["--base-url", "nowhere"], "base-url: must be like http://"),
    ):
        assert main([*EVAL, *options, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
