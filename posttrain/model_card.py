"""The card of a trained model: README.md in its folder, in the form that the hub reads and people do."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain.provenance import plain, versions, write_text


def write_card(
    folder: str | Path,
    method: str,
    base: str,
    *,
    tags: Sequence[str] = (),
    paper: str | None = None,
    data: str | None = None,
    measured_on: str | None = None,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    own: str | None = None,
    settings: Any = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the card of the model in `folder`, trained from `base` by `method`; the card's path.

    paper: an arXiv number. data: what it was trained on; measured_on: what the figures are of, as `data/split`. figures: title ->
    `accuracy`, its `interval` of 95 % and `tokens` per answer, of this model (`own` is its title) and of what stands beside it.
    settings: all that the training was told. notes: Markdown paragraphs on how it is used.
    """
    from huggingface_hub import EvalResult, ModelCardData  # half a second of import

    folder, figures = Path(folder), figures or {}
    measured = figures.get(own) if own else None
    results = None
    dataset, _, split = (measured_on or "").rpartition("/")
    if measured and re.fullmatch(r"([\w-]+/)?[\w.-]+", dataset):  # as the hub asks of a data set's id
        metric: dict[str, Any] = {"metric_value": measured["accuracy"], "metric_name": "pass@1"}
        results = [EvalResult("text-generation", dataset, dataset, "accuracy", dataset_split=split, **metric)]
    card = ModelCardData(
        base_model=base if _is_of_the_hub(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["posttrain", *tags],
        eval_results=results,
        model_name=folder.resolve().parent.name if results else None,
    )
    source = f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    parts = [
        f"---\n{card.to_yaml()}\n---",
        f"# {_cell(base)}, trained by {method}",
        f"Trained from `{base}` by {method}{source}{f' on {data}' if data else ''}, with "
        "[posttrain](https://pypi.org/project/posttrain/).",
        *([f"Measured on {measured_on}:"] if figures and measured_on else []),
        *([_table(figures, own)] if figures else []),
        f"```python\n{SNIPPET.format(folder=json.dumps(str(folder)))}```",
        *notes,
        *([f"## Settings\n\n```yaml\n{yaml.safe_dump(plain(settings), sort_keys=False)}```"] if settings else []),
        "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in versions().items()),
    ]
    path = folder / "README.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
"""


def _table(figures: Mapping[str, Mapping[str, Any]], own: str | None) -> str:
    lines = ["| | accuracy | 95 % interval | tokens per answer |", "|---|---|---|---|"]
    for title, found in figures.items():
        name = f"**{_cell(title)}**" if title == own else _cell(title)
        low, high = found["interval"]
        lines.append(
            f"| {name} | {100 * found['accuracy']:.1f} % | {100 * low:.1f} - {100 * high:.1f} | {found['tokens']:.0f} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _is_of_the_hub(base: str) -> bool:
    """Whether a model's name is `owner/name`, and not a file or folder of this machine."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
