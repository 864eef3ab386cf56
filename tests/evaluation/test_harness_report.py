import json
import re
from dataclasses import replace

import pytest

from posttrain.evaluation import harness_report
from posttrain.evaluation.harness_report import (
    _measured,
    browser,
    build_report,
    common_prefix,
    markdown,
    overview,
    script_safe,
    write_html,
    write_reports,
)
from tests.evaluation.test_results import result_of

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 & {{ 7 * 7 }} | `"


def run_of(*results):
    return {
        "model": "m",
        "fingerprint": "f" * 64,
        "settings": {},
        "versions": {},
        "seed": 0,
        "context": 9,
        "benchmarks": {},
    }


@pytest.fixture
def hostile(tmp_path):
    """A page about completions, answers and problems that try to break it."""
    result = result_of(["=-"], rows=[{"problem": HOSTILE, "answer": HOSTILE, "rendered": HOSTILE, "id": HOSTILE}])
    result.completions[0][:] = [HOSTILE, HOSTILE]
    result.extracted[0][:] = [HOSTILE, HOSTILE]
    report = build_report(run_of(result), [result])
    write_html(tmp_path / "report.html", report, [result])
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_text_of_a_model_never_becomes_part_of_the_page(hostile):
    assert "<img" not in hostile and "alert(1)</script>" not in hostile
    assert hostile.count("<script") == 2 and "49" not in re.findall(r"{{.*?}}", hostile)


def test_the_browser_s_data_is_what_was_sampled(hostile):
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', hostile, re.DOTALL)[1])
    sample = data["problems"][0]["samples"][0]
    assert sample[:5] == [HOSTILE, HOSTILE, "boxed", "equal", "right"]
    assert data["prefix"] + data["problems"][0]["prompt"] == HOSTILE


def test_a_guided_page_says_by_what(tmp_path):
    result = result_of(["=-"])
    run = run_of(result)
    assert markdown(build_report(run, [result])).startswith("# Evaluation of m\n")
    run["settings"] = {"beta": 0.3, "guidance": {"law": "cd", "value_model": "0123456789abcdef01"}}
    report = build_report(run, [result])
    write_html(tmp_path / "report.html", report, [result])
    title = "Evaluation of m, guided by CD (0123456789abcdef) at beta 0.3"
    assert f"<title>{title}</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert markdown(report).startswith(f"# {title}\n")


def test_of_lazy_guidance_the_kl_is_not_known(tmp_path):
    lines, shown = {}, {}
    for kl in ([[0.5, 1.5]], [[None, None]]):
        result = replace(result_of(["=-"]), kl=kl)
        report = build_report(run_of(result), [result])
        lines[kl[0][0]] = next(line for line in markdown(report).splitlines() if line.startswith("- KL to"))
        assert _measured(report, result).arms[0].name == "guided"
        json.dumps(report, allow_nan=False)
        columns, [row] = overview(report)
        shown[kl[0][0]] = dict(zip(columns, row, strict=True))["KL, nats"]
        write_html(tmp_path / "report.html", report, [result])
        assert shown[kl[0][0]] in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert shown == {0.5: "1.000", None: "not known"}
    assert "KL, nats" not in overview(build_report(run_of(), [result_of(["=-"])]))[0]
    assert lines[None].endswith(": not known (lazy guidance)") and ": 1.000" in lines[0.5]
    assert _measured(report, result).arms[0].measures == {}


def test_the_page_asks_nobody_for_anything(evaluated):
    page = (evaluated() / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))
    assert "@import" not in page and "default-src 'none'" in page and "url(http" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_has_its_figures_tables_and_samples(evaluated):
    page = (evaluated() / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "by level" in page and "pass@4" in page and "mG-Pass@k" in page
    assert '"\\u003c|im_start|\\u003euser' in page


def test_a_page_has_room_for_so_many_completions_only(monkeypatch):
    result = result_of(["=="] * 10)
    monkeypatch.setattr(harness_report, "BROWSED", 30)
    shown = browser(result)
    assert (len(shown["problems"]), shown["of"]) == (3, 10)
    monkeypatch.setattr(harness_report, "BROWSED", 1)
    assert len(browser(result)["problems"]) == 1


def test_few_shot_examples_are_in_the_page_once():
    assert (
        common_prefix(["abcd", "abef", "abc"]) == "ab"
        and common_prefix(["x"]) == "x"
        and common_prefix(["", "x"]) == ""
    )


def test_json_in_a_script_stays_in_it():
    text = script_safe({"a": HOSTILE})
    assert "<" not in text and json.loads(text) == {"a": HOSTILE}


def test_all_three_reports_tell_the_same(evaluated):
    out = evaluated()
    report = json.loads((out / "report.json").read_text())
    score = f"{100 * report['benchmarks']['sums']['metrics']['pass@1']['value']:.1f} %"
    assert score in (out / "report.md").read_text() and score in (out / "report.html").read_text()
    assert report["manifest"]["benchmarks"]["sums"]["generation"]["temperature"] == 0.6


def test_every_metric_is_defined(evaluated):
    report = json.loads((evaluated() / "report.json").read_text())
    names = {re.sub(r"\d+", "k", re.sub(r" \(.*", "", name)) for name in report["benchmarks"]["sums"]["metrics"]}
    assert names - {"pass@k"} <= set(report["definitions"]) and "pass@1" in report["definitions"]


def test_one_sample_per_problem_is_not_told_of_majorities(evaluated):
    report = json.loads((evaluated(n=1, temperature=0.0) / "report.json").read_text())
    assert "maj@k" not in report["definitions"] and report["benchmarks"]["sums"]["curves"] == {}


def test_several_benchmarks_have_a_macro_mean_that_says_where_n_differs():
    one, two = result_of(["==", "=-"]), result_of(["=", "-"])
    two.benchmark.__dict__["name"] = "other"
    report = build_report(run_of(), [one, two])
    assert report["macro mean"]["value"] == (0.75 + 0.5) / 2
    text = markdown(report)
    assert "Macro mean of pass@1: 62.5 %" in text and "n differs: 2, 1" in text


def test_markdown_tables_hold_whatever_stands_in_them():
    result = result_of(["=-", "=="], rows=[{"subject": "a|b"}, {"subject": "c"}])
    assert "| a\\|b | 1 |" in markdown(build_report(run_of(), [result]))


@pytest.mark.slow
def test_the_same_evaluation_writes_the_same_report(evaluated):
    out = evaluated()
    before = (out / "report.html").read_bytes()
    write_reports(out, say=lambda _: None)
    assert (out / "report.html").read_bytes() == before
