"""The report stands alone, and no text of a model becomes markup."""

from html.parser import HTMLParser

import pyarrow as pa
import pytest

from posttrain.evaluation.arms import sampled_arms
from posttrain.evaluation.plots import accuracy_curves
from posttrain.evaluation.report import SHOWN, Figure, write_report
from posttrain.rollouts.table import SCHEMA, RolloutTable

HOSTILE = "<script>alert(1)</script><img src=http://x/y onerror=z> & </pre>{{ 7*7 }}"


def table(tmp_path, prompts=2, samples=2, completion=HOSTILE):
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            "prompt_id": f"p{group}",
            "sample": sample,
            "group": group,
            "prompt": [{"role": "user", "content": f"problem {group} {completion}"}],
            "completion": f"completion {group}.{sample} {completion}",
            "completion_ids": [1, 2, 3],
            "finish_reason": "stop",
            "answer": completion,
            "extracted": completion if sample else None,
            "verdict": "equal" if sample else "no_answer",
            "reward": float(sample),
            "correct": bool(sample),
        }
        for group in range(prompts)
        for sample in range(samples)
    ]
    return RolloutTable(pa.Table.from_pylist(rows, schema=SCHEMA), {}, tmp_path)


def write(tmp_path, rollouts, scores=None, **values):
    correct, lengths = rollouts.rectangle("correct"), [[3, 3]] * len(rollouts.rectangle("correct"))
    arms = sampled_arms(correct, rollouts.rectangle("extracted"), lengths, 1.0)
    values = {"title": HOSTILE, "lead": HOSTILE, "manifest": {"note": HOSTILE}, **values}
    figures = [Figure(accuracy_curves(arms), HOSTILE)]
    path = tmp_path / "report.html"
    write_report(path, arms=arms, figures=figures, table=rollouts, scores=scores, definitions=("pass@1",), **values)
    return path.read_text()


class Reader(HTMLParser):
    """Tags, where they point, and the classes of samples."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.samples = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("href", "src", "srcset", "xlink:href", "action") if name in values]
        assert not any(name.startswith("on") for name in values)
        if "sample" in (values.get("class") or "").split():
            self.samples.append(values["class"])


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(tmp_path, table(tmp_path, completion="plain"), title="t", lead="l", manifest={})
    reader = Reader(page)
    assert reader.links and all(link.startswith("#") for link in reader.links)
    assert not reader.tags & {"script", "iframe", "object", "embed", "link", "base"}
    assert "@import" not in page and "url(http" not in page
    assert "default-src 'none'" in page


def test_what_a_model_writes_is_text(tmp_path):
    page = write(tmp_path, table(tmp_path))
    assert not Reader(page).tags & {"script", "img"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7*7 }}" in page


def test_the_best_scored_completion_is_marked(tmp_path):
    page = write(tmp_path, table(tmp_path), scores=[[0.5, 0.1], [0.2, 0.3]])
    assert Reader(page).samples == ["sample chosen", "sample", "sample", "sample chosen"]


def test_without_scores_nothing_is_marked(tmp_path):
    assert set(Reader(write(tmp_path, table(tmp_path))).samples) == {"sample"}


def test_only_so_many_problems_are_shown(tmp_path):
    page = write(tmp_path, table(tmp_path, prompts=SHOWN + 3))
    assert len(Reader(page).samples) == 2 * SHOWN
    assert f"completion {SHOWN - 1}.0" in page and f"completion {SHOWN}.0" not in page


@pytest.mark.parametrize(
    "shown", ["50.0&nbsp;%", "mean over problems of c/n", "one sample", "no_answer", "3 tokens, stop"]
)
def test_the_numbers_and_verdicts_are_there(tmp_path, shown):
    assert shown in write(tmp_path, table(tmp_path))
