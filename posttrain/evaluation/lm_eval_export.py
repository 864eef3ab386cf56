"""A run as lm-eval's sample log (`--log_samples`, 0.4.13): one line per problem and filter, for tools that read those.

A benchmark with an lm-eval task has that task's filters and metrics; every benchmark has the filter `posttrain`, whose answers
and `exact_match` are our grader's. With several samples per problem a metric is their mean.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.data.prompts import plain_text
from posttrain.errors import UserError
from posttrain.evaluation.lm_eval_bridge import filtered, final_answer, normalise
from posttrain.evaluation.results import Result, load_results
from posttrain.provenance import write_text
from posttrain.rollouts.table import read_table


def export(out: Path, folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Writes `samples_<task>.jsonl` for every benchmark of an evaluation, and says where.

    Errors: UserError naming `dir`, `table`, or `to` when the folder is not one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"to: {folder} is not a folder")
    _, results = load_results(out, say)
    written = []
    for result in results:
        path = folder / f"samples_{result.benchmark.lm_eval or result.benchmark.name}.jsonl"
        table = read_table(out / result.benchmark.name / "rollouts")
        messages = [group[0] for group in table.by_prompt("prompt")]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records(result, messages))
        write_text(path, "".join(lines))
        written.append(path)
    return written


def records(result: Result, messages: list[list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
    """The log's lines; messages: of every problem's prompt."""
    benchmark = result.benchmark
    arguments = {
        "until": list(benchmark.stop),
        "do_sample": benchmark.temperature > 0,
        "temperature": benchmark.temperature,
        "top_p": benchmark.top_p,
        "max_gen_toks": benchmark.max_tokens,
    }
    for index, row in enumerate(result.rows):
        prompt = row["rendered"] if benchmark.chat else plain_text(messages[index])
        doc = {name: value for name, value in row.items() if name not in ("rendered", "tokens", "ids_sha256")}
        common = {
            "doc_id": index,
            "doc": doc,
            "target": row["answer"],
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": arguments}},
            "resps": [result.completions[index]],
            "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _sha256(prompt),
            "target_hash": _sha256(row["answer"]),
        }
        for name, answers, metrics in filters(result, index):
            yield {**common, "filtered_resps": answers, "filter": name, "metrics": list(metrics), **metrics}


def filters(result: Result, index: int) -> Iterator[tuple[str, list[str], dict[str, float]]]:
    """Filter, what it takes out of every completion of a problem, and its metrics."""
    completions = result.completions[index]
    for metric in result.lm_eval:
        score = sum(result.lm_eval[metric][index]) / len(completions)
        if result.benchmark.lm_eval == "gsm8k_cot":
            yield metric, [filtered(metric, text) for text in completions], {"exact_match": score}
        else:
            yield "none", [normalise(final_answer(text)) for text in completions], {metric: score}
    answers = [answer if answer is not None else "[invalid]" for answer in result.extracted[index]]
    yield "posttrain", answers, {"exact_match": sum(result.correct[index]) / len(completions)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
