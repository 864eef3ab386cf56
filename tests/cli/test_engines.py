"""--engine and --url of the commands with a configuration: what is refused before anything is loaded."""

import pytest

from posttrain.cli.main import main

SERVICE = ("--engine", "service", "--url", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("command", "text", "options", "message"),
    [
        ("qprobe", "", ("--engine", "service"), "urls: give at least one, as in --url http://127.0.0.1:8000"),
        ("dqo", "", ("--url", "http://127.0.0.1:1"), "urls: they are the service's; with them goes engine: service"),
        ("dqo", "", ("--engine", "service", "--url", "nowhere"), "urls: must be like http://127.0.0.1:8000"),
        ("dqo", "engine: rays", (), "engine: must be one of transformers, vllm, service, ray, got 'rays'"),
        ("qsharp", "", SERVICE, "value.head: a v head reads every candidate as one more token"),
        (
            "qsharp",
            "guidance: {outside: zero_tilt}\nvalue: {head: q}",
            SERVICE,
            "guidance.outside: must be mask in vLLM",
        ),
        # The configuration's service is left, its addresses with it: what is refused is another thing.
        ("dqo", "engine: service\nurls: [http://x:1]\ndata: none", ("--engine", "transformers"), "data: no data set"),
        ("grpo-lambda", "", ("--engine", "vllm"), "--engine: invalid choice: 'vllm'"),
        ("grpo-lambda", "training: {trl: {use_vllm: true}}", SERVICE, "training.trl.use_vllm: with engine: service"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, command, text, options, message):
    (tmp_path / "config.yaml").write_text(f"out: {tmp_path}/run\n{text}\n")
    assert main([command, "--config", str(tmp_path / "config.yaml"), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"posttrain: error: {message}") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()
