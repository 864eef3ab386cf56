"""A page over several runs: what can be compared is, by problem, and what cannot is said to be."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from posttrain.errors import UserError
from posttrain.evaluation.arms_file import problems_of, read_arms
from posttrain.evaluation.intervals import paired_comparison
from posttrain.evaluation.runs import comparable, read_runs
from posttrain.evaluation.runs_report import pairs, write_runs_report
from posttrain.record import begin, recording
from tests.browser import CHROMIUM, browser
from tests.evaluation.recorded import HOSTILE, arm, arms, dqo, page, qsharp, table

PROBLEMS = [f"{i} + {i}" for i in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [qsharp(root / "guided", PROBLEMS), dqo(root / "trained", PROBLEMS), dqo(root / "other", PROBLEMS[:30])]


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, write_runs_report(folders, out)


def test_arms_come_back_as_they_were(folders):
    (found,) = read_arms(folders[0])
    assert [arm.title for arm in found.arms][:2] == ["one sample", "majority of 8"]
    assert found.arms[3].measures == {"kl": 0.89} and len(found.arms[3].per_problem) == 40
    assert found.problems == problems_of(table(folders[0], PROBLEMS)) and len(set(found.problems)) == 40


def test_problems_are_the_same_whatever_the_prompt(folders, tmp_path):
    plain = table(tmp_path, PROBLEMS)
    asked = table(tmp_path, PROBLEMS)
    asked.manifest["settings"]["template"] = "Solve {problem}"  # the braces are then the problem's own
    assert problems_of(plain) == read_arms(folders[1])[0].problems != problems_of(asked)


@pytest.mark.slow
def test_runs_on_the_same_problems_are_paired_and_others_are_not(written, folders):
    out, found = written
    assert [(each.problems, len(each.arms[1])) for each in found] == [(40, 6), (30, 4)]
    rows = found[0].paired[1]
    assert not any("oracle" in cell for row in rows for cell in row[:2])
    row = next(row for row in rows if row[0] == "trained: DQO, beta 0.03" and row[1] == "one sample")
    arms = {arm.title: arm.per_problem for each in comparable(read_runs(folders[:2])) for arm in each.arms}
    expected = paired_comparison(arms[row[0]], arms[row[1]])
    assert (row[2], row[4]) == (f"{100 * expected.difference:+.1f}", f"{expected.p_value:.2g}")
    assert "measured on 2 lists of problems, which are not compared" in (out / "report.md").read_text()


def test_every_arm_is_compared_with_the_model_alone_and_with_the_best(folders):
    (found,) = read_arms(folders[0])
    named = [(arm.name, other.name) for arm, other in pairs(found.arms)]
    assert named == [
        *(("majority", "base"), ("qsharp", "base"), ("cd", "base")),
        *(("majority", "qsharp"), ("cd", "qsharp")),
    ]
    assert list(pairs(found.arms[:1])) == []


def test_trainings_stand_under_their_method(written):
    text = (written[0] / "report.md").read_text()
    for title in ("## Sampling", "## Q#, value model", "## DQO"):
        assert title in text
    assert "| guided: round-1/value | 100 | 0.01 | 0.4 | 0.9 | 0.05 | 0.5 |" in text
    assert "| guided: train | 3 | 768 | 0.5 | 61 | 900 |" in text
    page = (written[0] / "report.html").read_text()
    assert "Q#, value model: eval auc." in page and "DQO: explained variance." in page


def test_the_page_stands_alone_and_shows_values_and_no_markup_of_a_model(written):
    page = (written[0] / "report.html").read_text()
    assert HOSTILE not in page and "{{ 7*7 }}" in page and "&lt;script&gt;" in page
    assert re.findall(r"(?:src|href)=.(?!#)", page) == [] and "<link" not in page
    assert '<span title="0.000" style="--v:0.000">makes </span>' in page


def test_a_run_at_work_and_a_failed_one_are_told(tmp_path):
    with pytest.raises(UserError), recording(["dqo"]):
        begin(tmp_path / "failed", {}, ["none"])
        (tmp_path / "failed" / "train").mkdir()
        raise UserError("data: there is no prompt to sample")
    assert write_runs_report([tmp_path / "failed"], tmp_path / "report") == []
    text = (tmp_path / "report" / "report.md").read_text()
    assert "failed: data: there is no prompt to sample" in text and "has measured nothing yet" in text


def test_two_benchmarks_that_ask_the_same_problems_both_stand_there(tmp_path):
    names = ("gsm8k", "gsm8k_hash")
    for seed, name in enumerate(names):
        page(tmp_path / "run" / name, {"model": arm("model", "tiny", 0.3 + 0.4 * seed, 40, 60, seed)}, PROBLEMS)
        for path in (tmp_path / "run" / name).glob("arms.json"):
            (measured,) = json.loads(path.read_text())
            path.write_text(json.dumps([{**measured, "title": name}]))
    (tmp_path / "run" / "STATUS").write_text("finished\nstarted: 2026-01-01\npid: 1\n")
    (found,) = comparable(read_runs([tmp_path / "run"]))
    assert found.title == "gsm8k, gsm8k_hash"
    assert [each.title for each in found.arms] == ["gsm8k: tiny", "gsm8k_hash: tiny"]
    assert found.arms[0].accuracy < found.arms[1].accuracy


def test_what_a_pipeline_has_set_aside_is_not_the_runs(folders, tmp_path):
    run = shutil.copytree(folders[0], tmp_path / "run")
    stage = run / "qsharp-0123456789ab"
    stage.mkdir()
    shutil.copyfile(run / "samples.jsonl", stage / "samples.jsonl")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"part": "qsharp-0123456789ab/round-1/value", "step": 1, "loss": 1.0}\n')
    (found,) = read_runs([run])
    assert stage.name in found.samples and f"{stage.name}/round-1/value" in found.curves()
    (stage / "stage.json").write_text('{"key": "0123456789abcdef"}')
    (found,) = read_runs([run])
    assert list(found.samples) == ["."] and not any(part.startswith(stage.name) for part in found.curves())


def test_of_a_pipeline_at_work_every_stage_has_its_arms_and_what_is_set_aside_none(tmp_path):
    for name, accuracy in (("grpo-lambda", 0.7), ("longer", 0.8), ("longer-0123456789ab", 0.9)):
        page(tmp_path / name, arms(40, arm("grpo_lambda", "GRPO-lambda", accuracy, 40, 40, 5)), PROBLEMS)
        (tmp_path / name / "stage.json").write_text('{"key": "0123456789abcdef", "method": "grpo-lambda"}')
    (tmp_path / "STATUS").write_text("running\nstarted: 2026-01-01\npid: 1\n")
    (found,) = comparable(read_runs([tmp_path]))
    titles = ["one sample", "majority of 8", "oracle of 8", "GRPO-lambda", "longer: GRPO-lambda"]
    assert [each.title for each in found.arms] == titles
    assert found.arms[3].accuracy < found.arms[4].accuracy < 0.87


def test_only_a_runs_base_and_what_others_guide_stand_at_no_kl(tmp_path):
    for name, title, measures in (
        ("model", "tiny", {}),
        ("guided", "tiny, guided by Q# (0123456789abcdef) at beta 0.3", {"kl": 1.5}),
        ("model", "runs/dqo/policy", {}),
    ):
        page(tmp_path / title[:9].replace("/", "-"), {name: arm(name, title, 0.5, 40, 60, 0, **measures)}, PROBLEMS)
    (tmp_path / "STATUS").write_text("finished\nstarted: 2026-01-01\npid: 1\n")
    (found,) = write_runs_report([tmp_path], tmp_path / "report")
    assert {row[0][:9]: row[-1] for row in found.arms[1]} == {"tiny": "0.00", "tiny, gui": "1.50", "runs/dqo/": ""}


def test_of_several_runs_too_who_is_guided_stands_at_no_kl_and_is_what_others_are_compared_with(tmp_path):
    title = "tiny, guided by Q# (0123456789abcdef) at beta 0.3"
    page(tmp_path / "guided", {"guided": arm("guided", title, 0.9, 40, 60, 0, kl=1.5)}, PROBLEMS)
    page(tmp_path / "trained", {"model": arm("model", "runs/dqo/policy", 0.8, 40, 60, 1)}, PROBLEMS)
    page(tmp_path / "plain", {"model": arm("model", "tiny", 0.5, 40, 60, 2)}, PROBLEMS)
    (found,) = write_runs_report([tmp_path / name for name in ("guided", "trained", "plain")], tmp_path / "report")
    assert [row[-1] for row in found.arms[1]] == ["1.50", "", "0.00"]
    assert {row[1] for row in found.paired[1][:2]} == {"plain: tiny"}


def test_a_base_that_a_table_alone_has_too_is_still_one(folders, tmp_path):
    (own,) = read_arms(folders[0])
    page(tmp_path / "table", {"model": replace(own.arms[0], name="model")}, PROBLEMS)
    (found,) = write_runs_report([tmp_path / "table", folders[0]], tmp_path / "report")
    assert found.arms[1][0][0] == "one sample" and found.arms[1][0][-1] == "0.00"


def test_the_sweeps_of_two_stages_are_two_lines(folders, tmp_path):
    run = shutil.copytree(folders[0], tmp_path / "run")
    point = {"law": "Q#", "beta": 0.1, "kl": 0.9, "accuracy": 0.8, "interval": [0.7, 0.9]}
    for stages, laws in ((("v", "q"), ["v: Q#", "q: Q#"]), (("v",), ["Q#"])):
        (run / "summary.json").write_text(json.dumps({"frontier": {stage: [point] for stage in stages}}))
        (found,) = read_runs([run])
        assert list(found.sweeps) == laws


def test_a_separator_of_lines_in_a_text_is_no_damage(folders, tmp_path):
    run = shutil.copytree(folders[0], tmp_path / "run")
    text = (run / "samples.jsonl").read_text(encoding="utf-8")
    (run / "samples.jsonl").write_text(text.replace("makes", "ma\u2028k\u0085es"), encoding="utf-8")
    (found,) = read_runs([run])
    assert "ma\u2028k\u0085es" in json.dumps(found.samples, ensure_ascii=False)


def test_what_is_no_run_is_one_line(folders, tmp_path):
    for given, message in (
        ([tmp_path / "none"], "run: no such folder: .*/none"),
        ([tmp_path], "run: .* is no run's folder: it has neither STATUS nor arms.json"),
        ([folders[0], folders[0]], "run: .*/guided is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            write_runs_report(given, tmp_path / "report")
    broken = shutil.copytree(folders[0], tmp_path / "broken")
    for name in ("arms.json", "samples.jsonl", "summary.json"):
        good = (broken / name).read_text()
        (broken / name).write_text(good[:-5])
        with pytest.raises(UserError, match=f"run: .*{name} is damaged"):
            write_runs_report([broken], tmp_path / "report")
        (broken / name).write_text(good)
    arms = json.loads((broken / "arms.json").read_text())
    arms[0]["problems"].pop()
    (broken / "arms.json").write_text(json.dumps(arms))
    with pytest.raises(UserError, match="arms.json is damaged"):
        write_runs_report([broken], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_light_and_dark_on_a_phone_and_a_desk(written, tmp_path):
    with browser(tmp_path / "profile") as page:
        for scheme, width in (("light", 1280), ("dark", 390)):
            page.colours(scheme)
            page.resize(width, 800)
            page.open(f"file://{written[0]}/report.html")
            assert page.run("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways
            colours = page.run(
                "[...document.querySelectorAll('.valued span')].slice(0, 6).map(s => getComputedStyle(s).backgroundColor)"
            )
            assert len(set(colours)) == len(colours) > 3
            light = page.run("getComputedStyle(document.body).backgroundColor")
            assert (light == "rgb(255, 255, 255)") == (scheme == "light")
            assert page.run("document.querySelectorAll('figure svg').length") > 8
        assert page.complaints == []
