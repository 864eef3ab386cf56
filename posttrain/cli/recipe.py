"""Recipes: what there is, what one says, and whether it fits.

posttrain recipe list
posttrain recipe show NAME
posttrain recipe check NAME [--method METHOD] [--gpus N] [--gpu-memory GB]

NAME is one of the list, such as dqo/arithmetic, or a file of your own, of which --method says what takes it (dqo, say). `check`
refuses what its command would refuse, reckons what each GPU needs in every stage, and where that is more than there is, says what
to change. Exit code 1: it does not fit.
"""

import argparse
from typing import TYPE_CHECKING

from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.pipelines.recipe_memory import Knob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", choices=("list", "show", "check"))
    parser.add_argument("name", nargs="?", help="of `posttrain recipe list`, or a file")
    parser.add_argument("--method", help="the command that takes it, such as dqo; default: as the file's header says")
    parser.add_argument(
        "--gpus", type=int, help="of all machines together, 0 for none; default: as the recipe's launcher"
    )
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of each (default 80)")


def run(args: argparse.Namespace) -> int:
    if args.verb == "list":
        if args.name is not None:
            raise UserError("name: list has none; show NAME and check NAME do")
        _list()
        return 0
    if args.name is None:
        raise UserError(f"name: {args.verb} which recipe? see posttrain recipe list")
    if args.verb == "show":
        from posttrain.pipelines.recipe import find

        print(find(args.name).read_text(), end="")
        return 0
    return _check(args.name, args.method, args.gpus, args.gpu_memory)


def _list() -> None:
    from posttrain.cli.tables import print_table
    from posttrain.pipelines.recipe import names, read

    rows = [(name, recipe.config.model, recipe.config.data) for name in names() for recipe in (read(name),)]
    print_table(("recipe", "model", "data"), rows)


def _check(name: str, method: str | None, gpus: int | None, gigabytes: float) -> int:
    from posttrain.cli.tables import print_table
    from posttrain.pipelines import recipe_memory as needs
    from posttrain.pipelines.recipe import line_for, read, validate

    recipe = read(name, method)
    machine = needs.machine_for(recipe, gpus, gigabytes)
    validate(recipe, max(1, machine.gpus))
    stages = needs.reckon(recipe, machine)
    parts = dict.fromkeys(part for stage in stages.values() for part, size in stage.items() if size)
    rows = [(part, *(_gb(stage.get(part, 0)) for stage in stages.values())) for part in parts]
    totals = [_gb(sum(stage.values())) for stage in stages.values()]
    print(f"{recipe.name}: every field is right\nlaunch: {line_for(recipe, max(1, machine.gpus))}")
    print_table((f"GB {'on each GPU' if machine.gpus else 'of memory'}", *stages), [*rows, ("together", *totals)])
    print("reckoned, not measured; prompts of 256 tokens (arithmetic: 40), completions as long as they may be")
    host = needs.on_host(recipe, machine)
    if host:
        print(f"and {_gb(host)} GB of the machines' own memory, for the optimiser")
    peak = needs.peak(stages)
    if not machine.gpus:
        print(f"needs {_gb(peak)} GB")
        return 0
    if peak <= machine.usable:
        print(f"fits: {_gb(peak)} of {gigabytes:g} GB")
        return 0
    stage = max(stages, key=lambda stage: sum(stages[stage].values()))
    print(f"does not fit: {stage} needs {_gb(peak)} GB, and of {gigabytes:g} GB {_gb(machine.usable)} can be used")
    turned = needs.knobs(recipe, machine)
    print_table(("what to change", "GB then", "fits"), [_row(knob, machine.usable) for knob in turned])
    if not any(knob.peak <= machine.usable for knob in turned):
        steps = needs.way(recipe, machine)
        if steps and steps[-1].peak <= machine.usable:
            print_table(("one after the other", "GB then", "fits"), [_row(knob, machine.usable) for knob in steps])
        else:
            print("no settings make it fit: take a smaller model, more GPUs, or larger ones")
    return 1


def _row(knob: "Knob", usable: float) -> tuple[str, str, str]:
    return knob.change, _gb(knob.peak), "yes" if knob.peak <= usable else "no"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}" if size else ""
