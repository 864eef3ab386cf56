import re

import numpy as np

from posttrain.cli.tables import print_arms, print_table
from posttrain.evaluation.arms import Arm


def test_names_to_the_left_and_numbers_to_the_right(capsys):
    print_table(("figure", "value"), [("accuracy", "0.5"), ("tokens", "1234")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == ["figure    value", "accuracy    0.5", "tokens     1234"]


def test_a_cell_is_text(capsys):
    print_table(("row", "prompt"), [("[red]x[/red]", "[/bold] :smile:")])
    assert capsys.readouterr().out.split()[2:] == ["[red]x[/red]", "[/bold]", ":smile:"]


COLUMNS = ("benchmark", "metric", *(f"column {number}" for number in range(8)))
ROW = ("gsm8k", "pass@1", *(f"{number}.123456 to 9" for number in range(8)))


def test_a_wide_table_is_whole_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(COLUMNS, [ROW])
    assert re.split(" {2,}", capsys.readouterr().out.splitlines()[1].rstrip()) == [*ROW]


def test_a_wide_table_goes_on_below_in_a_terminal(capsys, monkeypatch):
    for name, value in {"COLUMNS": "80", "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    print_table(COLUMNS, [ROW], keys=2)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines)
    assert all(line.startswith("gsm8k") and "pass@1" in line for line in lines[1::2])
    assert [cell for line in lines[1::2] for cell in re.findall(r"\S+ to 9", line)] == [*ROW[2:]]


def test_an_arm_is_a_row_with_its_interval_and_cost(capsys):
    print_arms([Arm("base", "one sample", np.array([1.0, 0.0, 0.0, 1.0]), 61.4, 5.25)])
    *header, row = capsys.readouterr().out.splitlines()
    assert row.split()[:4] == ["one", "sample", "50.0", "%"] and row.split()[-2:] == ["61", "5.2"]
    assert "seconds to sample," in header[0] and "learn and choose" in header[1]


def test_a_row_fits_eighty_columns(capsys):
    print_arms([Arm("qprobe", "Q-Probe, best of 64", np.array([1.0, 0.0]), 98765, 12345.6)])
    assert all(len(line.rstrip()) <= 80 for line in capsys.readouterr().out.splitlines())
