import subprocess
import sys

import pytest
from safetensors import SafetensorError

from posttrain.cli import main as cli
from posttrain.errors import UserError


def test_help_lists_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_help_speaks_to_users(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Value-based post-training of language models" in shown and "sub-command" not in shown


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"posttrain {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rolout"], "command: no command 'rolout' (did you mean rollout?)"),
        (["rollout"], "the following arguments are required"),
        (["rollout", "--samples", "many"], "--samples: invalid int value: 'many'"),
        (
            ["pipeline", "x", "--sed", "1"],
            "--sed: no such option (did you mean --seed?); see posttrain pipeline --help",
        ),
        (["pipeline", "x", "--sed=1"], "--sed: no such option (did you mean --seed?)"),
        (["rollout", "--modle", "tiny"], "--modle: no such option (did you mean --model?)"),
        (["eval", "gsm8k", "--max-token", "9"], "--max-token: no such option (did you mean --max-tokens?)"),
        (["grade", "1", "2", "--zzz"], "--zzz: no such option; see"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def dispatch(_):
        raise UserError("out: nowhere")

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "posttrain: error: out: nowhere\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "system: No space left on device"),
        (PermissionError(13, "Permission denied", "a/file"), "a/file: Permission denied"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "system: No space left on device (os error 28)",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "system: torch could not write a file; is the disk full?"),
    ],
)
def test_what_cannot_be_written_is_one_line(error, said, monkeypatch, capsys):
    def dispatch(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == f"posttrain: error: {said}\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), SafetensorError("invalid header"), ValueError("x")]
)
def test_a_bug_is_not_hidden(error, monkeypatch):
    def dispatch(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    with pytest.raises(type(error)):
        cli.main([])


def test_the_version_is_the_package_s():
    import posttrain

    shown = subprocess.run([sys.executable, "-m", "posttrain", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == posttrain.__version__
