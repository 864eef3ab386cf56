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


def test_an_arm_is_a_row_with_its_interval_and_cost(capsys):
    print_arms([Arm("base", "one sample", np.array([1.0, 0.0, 0.0, 1.0]), 61.4, 5.25)])
    *header, row = capsys.readouterr().out.splitlines()
    assert row.split()[:4] == ["one", "sample", "50.0", "%"] and row.split()[-2:] == ["61", "5.2"]
    assert "seconds to sample," in header[0] and "learn and choose" in header[1]


def test_a_row_fits_eighty_columns(capsys):
    print_arms([Arm("qprobe", "Q-Probe, best of 64", np.array([1.0, 0.0]), 98765, 12345.6)])
    assert all(len(line.rstrip()) <= 80 for line in capsys.readouterr().out.splitlines())
