"""One self-contained HTML page: the table of arms, figures, completions one can read, and what made it all. No network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.arms_file import measured, write_arms
from posttrain.evaluation.metrics import DEFINITIONS
from posttrain.provenance import plain, write_text
from posttrain.rollouts.table import RolloutTable

MEASURES = {"majority": "majority of its samples", "kl": "KL, nats", "tokens_per_second": "tokens/s"}
SHOWN = 24  # problems whose completions stand in the page
SAMPLES = "samples.jsonl"  # those, a line for each problem
TokenValues = Sequence[
    Sequence[Sequence[tuple[str, float]]]
]  # [problems][samples][tokens]: its text, the value after it


@dataclass(frozen=True)
class Figure:
    """`svg` is trusted: it is drawn by us."""

    svg: str
    caption: str


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    arms: Mapping[str, Arm],
    figures: Sequence[Figure],
    table: RolloutTable,
    scores: Sequence[Sequence[float]] | None,
    definitions: Sequence[str],
    manifest: Mapping[str, Any],
    values: TokenValues | None = None,
) -> None:
    """The page, and beside it what pages over several runs read: the arms, measured on the table's problems, and the samples.

    scores: of the table's completions [prompts][samples], the best is marked as chosen; definitions: names in DEFINITIONS;
    values: of the tokens of the first problems' completions.
    """
    problems = _problems(table, scores, values)
    write_arms(path.parent, [measured(arms, table)])
    write_text(path.parent / SAMPLES, "".join(json.dumps(plain(each), ensure_ascii=False) + "\n" for each in problems))
    write_page(
        path,
        "report.html",
        title=title,
        lead=lead,
        arms=list(arms.values()),
        measures={
            name: title for name, title in MEASURES.items() if any(name in arm.measures for arm in arms.values())
        },
        figures=trusted(figures),
        problems=problems,
        range=value_range(problems),
        definitions={name: DEFINITIONS[name] for name in definitions},
        manifest=manifest,
    )


def write_page(path: Path, template: str, *, manifest: Mapping[str, Any], **values: Any) -> None:
    """A template of this folder, which extends `page.html`; every value is escaped that is not marked as trusted."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent))
    text = pages.get_template(template).render(
        manifest=json.dumps(plain(manifest), indent=1, ensure_ascii=False), **values
    )
    write_text(path, text)


def trusted(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [{"svg": Markup(figure.svg), "caption": figure.caption} for figure in figures]


def value_range(problems: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The lowest and the highest value of any token shown, between which its colour lies; of returns within [0, 1], these."""
    values = [value for each in problems for sample in each["samples"] for _, value in sample["values"] or ()]
    return min([0.0, *values]), max([1.0, *values])


def _problems(
    table: RolloutTable, scores: Sequence[Sequence[float]] | None, values: TokenValues | None
) -> list[dict[str, Any]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.rows():
        if row["group"] not in groups and len(groups) == SHOWN:
            break
        groups.setdefault(row["group"], []).append(row)
    problems = []
    for index, rows in enumerate(groups.values()):
        ranked = scores[index] if scores is not None else None
        best = max(range(len(rows)), key=ranked.__getitem__) if ranked is not None else None
        problems.append(
            {
                "problem": rows[0]["prompt"][-1]["content"],
                "gold": rows[0]["answer"],
                "right": sum(row["correct"] for row in rows),
                "samples": [
                    {
                        **{
                            name: row[name]
                            for name in ("completion", "verdict", "correct", "extracted", "finish_reason")
                        },
                        "tokens": len(row["completion_ids"]),
                        "score": ranked[i] if ranked is not None else None,
                        "chosen": i == best,
                        "values": values[index][i] if values is not None and index < len(values) else None,
                    }
                    for i, row in enumerate(rows)
                ],
            }
        )
    return problems
