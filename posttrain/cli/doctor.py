"""Is everything here that a run needs? Versions, devices, engines, disk and hub, each with what mends it.

Exit code 1 if something is broken. That there is no GPU, or no network, is worth a note only.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    from posttrain.cli.tables import print_table
    from posttrain.doctor import examine

    findings = list(examine())
    print_table(("what", "state", "found"), [(each.name, each.state, each.found) for each in findings], keys=2)
    for each in findings:
        if each.state != "ok":
            print(f"{each.name}: {each.fix}")
    return int(any(each.state == "broken" for each in findings))
