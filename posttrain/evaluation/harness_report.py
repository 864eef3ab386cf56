"""The report of an evaluation: the same numbers as JSON, Markdown and one self-contained HTML page. It knows no time."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.arms_file import Measured, fingerprints, write_arms
from posttrain.evaluation.compare import TOKEN_DEFINITIONS, compare
from posttrain.evaluation.metrics import DEFINITIONS, macro_mean
from posttrain.evaluation.plots import budget_curves, length_histogram, metric_curves
from posttrain.evaluation.report import Figure, trusted, write_page
from posttrain.evaluation.results import SCORER, Result, flat, load_results, summarise
from posttrain.provenance import write_json, write_text

BROWSED = 3_000_000  # characters of completions per benchmark in the page
GROUPS = {
    "equal": "right",
    "different": "wrong",
    "no_answer": "no answer",
    "error": "not graded",
    "timeout": "not graded",
}
GUIDED_BY = ", guided by "
LAWS = {"qsharp": "Q#", "cd": "CD", "ipl": "IPL"}
OWN_DEFINITIONS = {
    SCORER: "a scorer that every run has: mean log-probability of a completion's tokens; as a weight, its exponential",
    "lm-eval strict-match": "lm-eval 0.4.13's gsm8k_cot metric: the first number after 'The answer is', as a string",
    "lm-eval flexible-extract": "lm-eval 0.4.13's gsm8k_cot metric: the last number, as a string",
    "lm-eval exact_match": "lm-eval 0.4.13's minerva_math metric: the answer in Minerva's closing phrase, normalised, by SymPy",
}


def write_reports(out: Path, baseline: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """`report.json`, `report.md` and `report.html` in the evaluation's folder; with a comparison where a baseline is given.

    Errors: UserError naming `dir`, `table` or `compare`.
    """
    run, results = load_results(out, say)
    report = build_report(run, results)
    if baseline is not None:
        report["comparison"] = compare((run, results), load_results(baseline, say))
        report["definitions"].update({name: DEFINITIONS[name] for name in ("difference", "p-value", "detectable")})
        report["definitions"].update(TOKEN_DEFINITIONS)
    write_arms(out, [_measured(report, result) for result in results])
    write_json(out / "report.json", report)
    write_text(out / "report.md", markdown(report))
    write_html(out / "report.html", report, results)
    return report


def _measured(report: dict[str, Any], result: Result) -> Measured:
    """What pages over several runs read. Its arm knows no seconds, as the report knows no time."""
    tokens = float(np.mean(flat(result.tokens)))
    kls = flat(result.kl)
    measures = {"kl": float(np.mean(kls))} if kls and None not in kls else {}
    title = title_of(report).removeprefix("Evaluation of ")
    arm = Arm("guided" if kls else "model", title, result.accuracy, tokens, 0.0, (), measures)
    problems = fingerprints([(row["problem"], row["answer"]) for row in result.rows])
    return Measured(result.benchmark.name, problems, (arm,))


def build_report(run: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Everything but the completions, as JSON takes it."""
    summaries = {result.benchmark.name: summarise(result) for result in results}
    report: dict[str, Any] = {
        "model": run["model"],
        "fingerprint": run["fingerprint"],
        "benchmarks": summaries,
        "definitions": definitions(summaries),
        "manifest": {**run, "benchmarks": {result.benchmark.name: result.manifest for result in results}},
    }
    if len(results) > 1 and all(summary["problems"] > 1 for summary in summaries.values()):
        mean, error = macro_mean(
            [summary["metrics"]["pass@1"]["value"] for summary in summaries.values()],
            [summary["standard_error"]["se"] for summary in summaries.values()],
        )
        report["macro mean"] = {"value": mean, "standard_error": error, "n": [s["n"] for s in summaries.values()]}
        report["definitions"]["macro mean"] = DEFINITIONS["macro mean"]
    return report


def title_of(report: dict[str, Any]) -> str:
    """Who is measured, and by what it is guided."""
    title, settings = f"Evaluation of {report['model']}", report["manifest"]["settings"]
    if "guidance" not in settings:
        return title
    guidance = settings["guidance"]
    return f"{title}{GUIDED_BY}{LAWS[guidance['law']]} ({guidance['value_model'][:16]}) at beta {settings['beta']:g}"


def definitions(summaries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of every number that the report shows."""
    names = [
        "pass@1",
        "interval",
        "standard error",
        "between",
        "within",
        "tokens",
        "truncation",
        "answer found",
        "grader error",
    ]
    shown = {name for summary in summaries.values() for name in summary["metrics"]}
    if any(summary["n"] > 1 for summary in summaries.values()):
        names[1:1] = ["pass@k", "maj@k", "best-of-k", "weighted majority", "worst@k", "mG-Pass@k"]
    if any("kl" in summary for summary in summaries.values()):
        names.insert(names.index("tokens"), "KL")
    found = {name: DEFINITIONS[name] for name in [*names, "accuracy, finished"]}
    if any(SCORER in name for name in shown):
        found[SCORER] = OWN_DEFINITIONS[SCORER]
    return {**found, **{name: OWN_DEFINITIONS[name] for name in sorted(shown) if name in OWN_DEFINITIONS}}


def markdown(report: dict[str, Any]) -> str:
    """The report for a README or a pull request."""
    lines = [f"# {title_of(report)}", "", f"Fingerprint `{report['fingerprint'][:16]}`.", ""]
    lines += table_lines(*overview(report))
    if "macro mean" in report:
        lines += ["", macro_line(report)]
    if "comparison" in report:
        lines += ["", f"## Against {report['comparison']['baseline']}", ""]
        lines += table_lines(COMPARED, compared(report["comparison"]))
        lines += ["", "Accuracy within b tokens:", ""]
        lines += table_lines(BUDGETS, budget_rows(report["comparison"]))
        lines += ["", "Settings that differ:", ""]
        lines += [
            f"- {name}: {_short(here)} / {_short(there)}"
            for name, (here, there) in report["comparison"]["differs"].items()
        ]
    for name, summary in report["benchmarks"].items():
        lines += ["", f"## {name}", "", f"{summary['title']}.", ""]
        lines += [f"**{warning}.**" for warning in summary["warnings"]] + [""] * bool(summary["warnings"])
        lines += table_lines(("metric", "score", "95 % interval"), metric_rows(summary))
        lines += ["", *(f"- {fact}: {value}" for fact, value in facts(summary))]
        for field, groups in summary["breakdown"].items():
            lines += ["", *table_lines((field, "problems", "pass@1", "95 % interval"), breakdown_rows(groups))]
    lines += ["", "## What the numbers mean", ""]
    lines += [f"- **{name}**: {meaning}" for name, meaning in report["definitions"].items()]
    manifest = json.dumps(report["manifest"], indent=1, ensure_ascii=False)
    return "\n".join([*lines, "", "## What made this", "", "```json", manifest, "```", ""])


COMPARED = (
    "benchmark",
    "metric",
    "problems",
    "run",
    "baseline",
    "difference",
    "95 % interval",
    "p-value",
    "detectable",
    "token ratio",
    "its interval",
)
BUDGETS = ("benchmark", "b", "run", "baseline", "difference", "95 % interval")


def overview(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and one row per benchmark; with the KL where there is guidance."""
    benchmarks = report["benchmarks"]
    guided = any("kl" in summary for summary in benchmarks.values())
    columns = ("benchmark", "problems", "n", "pass@1", "95 % interval", *(("KL, nats",) if guided else ()))
    return (*columns, "tokens", "truncated", "answer found"), [
        (
            name,
            str(summary["problems"]),
            str(summary["n"]),
            percent(summary["metrics"]["pass@1"]["value"]),
            interval(summary["metrics"]["pass@1"]),
            *((f"{summary['kl']['value']:.3f}" if summary["kl"] else "not known",) if guided else ()),
            f"{summary['tokens']['mean']:.1f}",
            percent(summary["shares"]["truncation"]),
            percent(summary["shares"]["answer_found"]),
        )
        for name, summary in benchmarks.items()
    ]


def macro_line(report: dict[str, Any]) -> str:
    macro = report["macro mean"]
    samples = (
        f", n = {macro['n'][0]}" if len(set(macro["n"])) == 1 else f"; n differs: {', '.join(map(str, macro['n']))}"
    )
    return (
        f"Macro mean of pass@1: {percent(macro['value'])}, standard error {100 * macro['standard_error']:.1f}{samples}."
    )


def compared(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per benchmark and metric."""
    return [
        (
            name,
            metric,
            str(entry["problems"]),
            percent(found["run"]),
            percent(found["baseline"]),
            f"{100 * found['difference']:+.1f}",
            signed_interval(found["low"], found["high"]),
            f"{found['p_value']:.2g}",
            f"{100 * found['detectable']:.1f}" if found["detectable"] is not None else "-",
            f"{entry['tokens']['ratio']:.3f}" if entry["tokens"]["ratio"] is not None else "-",
            f"{entry['tokens']['ratio_low']:.3f} to {entry['tokens']['ratio_high']:.3f}"
            if entry["tokens"]["ratio_high"] is not None
            else "-",
        )
        for name, entry in comparison["benchmarks"].items()
        for metric, found in entry["metrics"].items()
    ]


def budget_rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per benchmark and token budget."""
    return [
        (
            name,
            str(point["tokens"]),
            percent(point["run"]),
            percent(point["baseline"]),
            f"{100 * point['difference']:+.1f}",
            signed_interval(point["difference_low"], point["difference_high"]),
        )
        for name, entry in comparison["benchmarks"].items()
        for point in entry["budgets"]
    ]


def budget_figures(report: dict[str, Any]) -> list[Figure]:
    comparison = report["comparison"]
    titles = {"run": report["model"], "baseline": comparison["baseline"]}
    if titles["run"] == titles["baseline"]:
        titles = {name: f"{title}, the {name}" for name, title in titles.items()}
    return [
        Figure(budget_curves(entry["budgets"], titles), f"{name}: accuracy within b tokens, with 95 % intervals.")
        for name, entry in comparison["benchmarks"].items()
    ]


def metric_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, percent(found["value"]), interval(found)) for name, found in summary["metrics"].items()]


def breakdown_rows(groups: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (str(group["value"]), str(group["problems"]), percent(group["pass@1"]), interval(group)) for group in groups
    ]


def facts(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What else is to be said of a benchmark."""
    error, tokens, shares = summary["standard_error"], summary["tokens"], summary["shares"]
    parts = [f"{name} {100 * error[name]:.2f}" for name in ("between", "within") if error[name] is not None]
    if error["se"] is not None:
        yield (
            "standard error of pass@1",
            f"{100 * error['se']:.2f} points" + (f" ({', '.join(parts)})" if parts else ""),
        )
    if "kl" in summary:
        yield "KL to the reference, nats per completion", _kl(summary["kl"])
    spread = f" ({tokens['low']:.1f} to {tokens['high']:.1f})" if tokens["low"] is not None else ""
    yield "completion tokens", f"mean {tokens['mean']:.1f}{spread}, p95 {tokens['p95']:.0f}"
    yield "truncated", percent(shares["truncation"])
    yield "answer found", percent(shares["answer_found"])
    yield "grader error or timeout", percent(shares["grader_error"])
    finished = shares["accuracy_finished"]
    yield "accuracy of the finished ones", percent(finished) if finished is not None else "-"
    for title, counted in (("verdicts", "verdicts"), ("answer found by", "rules"), ("stopped by", "stops")):
        if summary[counted]:
            yield title, ", ".join(f"{value} {count}" for value, count in summary[counted].items())


def _kl(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not known (lazy guidance)"
    spread = f" ({found['low']:.3f} to {found['high']:.3f})" if found["low"] is not None else ""
    return f"{found['value']:.3f}{spread}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(found: dict[str, Any]) -> str:
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"


def signed_interval(low: float | None, high: float | None) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}" if low is not None and high is not None else "-"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def write_html(path: Path, report: dict[str, Any], results: Sequence[Result]) -> None:
    from markupsafe import Markup

    benchmarks = []
    for result in results:
        summary = report["benchmarks"][result.benchmark.name]
        benchmarks.append(
            {
                "name": result.benchmark.name,
                "summary": summary,
                "facts": list(facts(summary)),
                "figures": trusted(figures(result, summary)),
                "samples": Markup(script_safe(browser(result))),
            }
        )
    write_page(
        path,
        "harness.html",
        title=title_of(report),
        lead=f"Fingerprint {report['fingerprint'][:16]}. Intervals are 95 %, over problems; every number is defined below.",
        overview=overview(report),
        columns={"compared": COMPARED, "budgets": BUDGETS},
        macro=macro_line(report) if "macro mean" in report else "",
        comparison=report.get("comparison"),
        compared=compared(report["comparison"]) if "comparison" in report else [],
        budgets=budget_rows(report["comparison"]) if "comparison" in report else [],
        budget_figures=trusted(budget_figures(report)) if "comparison" in report else [],
        benchmarks=benchmarks,
        percent=percent,
        interval=interval,
        short=_short,
        definitions=report["definitions"],
        manifest=report["manifest"],
    )


def figures(result: Result, summary: dict[str, Any]) -> list[Figure]:
    lengths: dict[str, list[int]] = {group: [] for group in GROUPS.values()}
    for verdicts, tokens in zip(result.verdicts, result.tokens, strict=True):
        for verdict, length in zip(verdicts, tokens, strict=True):
            lengths[GROUPS[verdict]].append(length)
    found = [Figure(length_histogram({k: v for k, v in lengths.items() if v}), "Completion lengths by verdict.")]
    if summary["curves"]:
        found.insert(
            0, Figure(metric_curves(summary["curves"]), "Scores against the number of samples, with 95 % intervals.")
        )
    return found


def browser(result: Result) -> dict[str, Any]:
    """What the sample browser shows: problems in order, until their completions fill the space that a page has for them."""
    rendered = [row["rendered"] for row in result.rows]
    prefix = common_prefix(rendered)  # few-shot examples need to be there once only
    problems: list[dict[str, Any]] = []
    room = BROWSED
    for i, row in enumerate(result.rows):
        room -= sum(map(len, result.completions[i])) + len(rendered[i]) - len(prefix)
        if room < 0 and problems:
            break
        samples = zip(
            result.completions[i], result.extracted[i], result.rules[i], result.verdicts[i], result.tokens[i],
            result.finish_reasons[i], result.stops[i], strict=True,
        )  # fmt: skip
        problems.append(
            {
                "id": row["id"],
                "problem": row["problem"],
                "gold": row["answer"],
                "prompt": rendered[i][len(prefix) :],
                "samples": [[*sample[:3], sample[3], GROUPS[sample[3]], *sample[4:]] for sample in samples],
            }
        )
    return {"prefix": prefix, "problems": problems, "of": len(result.rows)}


def common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def script_safe(value: Any) -> str:
    """JSON that can stand in a script element: no text of a model can close it."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
