import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.evaluation import grades, harness_report
from posttrain.evaluation.harness import evaluate, regrade, render_prompts
from posttrain.evaluation.harness_report import write_reports
from posttrain.evaluation.run_folder import read_run
from posttrain.rollouts.table import read_manifest, read_table
from tests.evaluation.stand_ins import Adder, Characters, adder, tasks_of, write_data

REPORTS = ("report.json", "report.md", "report.html")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take most of a small evaluation's time."""
    monkeypatch.setattr(harness_report, "figures", lambda *_: [])


def quiet(_):
    pass


def reports_of(out):
    return {name: (out / name).read_bytes() for name in REPORTS}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_leaves_its_file(evaluated):
    out = evaluated()
    assert sorted(path.name for path in out.iterdir()) == [
        "arms.json",
        "report.html",
        "report.json",
        "report.md",
        "run.json",
        "sums",
        "times.json",
    ]
    assert sorted(path.name for path in (out / "sums").iterdir()) == ["grades.jsonl", "prompts.jsonl", "rollouts"]
    table = read_table(out / "sums" / "rollouts")
    assert len(table) == 12 * 4
    head, *grades_ = lines_of(out / "sums" / "grades.jsonl")
    assert [line["id"] for line in grades_] == [f"p{i}" for i in range(12)]
    assert [line["verdict"] for line in grades_] == table.by_prompt("verdict")
    assert head["table"] and head["grader"]
    (first, *_) = lines_of(out / "sums" / "prompts.jsonl")
    assert first["rendered"].startswith("<|im_start|>user\n0+0=?\n") and first["tokens"] == len(first["rendered"])


@pytest.mark.parametrize(
    ("until", "there"),
    [
        ("render", {"prompts.jsonl"}),
        ("generate", {"prompts.jsonl", "rollouts"}),
        ("grade", {"prompts.jsonl", "rollouts", "grades.jsonl"}),
    ],
)
def test_a_run_may_stop_after_any_stage_and_go_on(tmp_path, data, evaluated, until, there):
    whole, out = evaluated("whole"), tmp_path / "parts"
    evaluate(tasks_of(data), adder(), out, until=until, say=quiet)
    assert {path.name for path in (out / "sums").iterdir()} == there and not (out / "report.json").exists()
    evaluate(tasks_of(data), adder(), out, resume=True, say=quiet)
    assert reports_of(out) == reports_of(whole)


def test_one_full_prompt_is_shown(tmp_path, data):
    said = []
    evaluate(tasks_of(data), adder(), tmp_path / "run", until="render", say=said.append)
    assert "<|im_start|>user\n0+0=?\nPlease reason step by step" in said[1] and said[1].endswith(
        "<|im_start|>assistant\n"
    )


def test_a_thought_that_the_template_opens_and_nothing_closes_has_no_answer(tmp_path, data, monkeypatch):
    whole = Characters.apply_chat_template
    monkeypatch.setattr(
        Characters,
        "apply_chat_template",
        lambda *args, **given: {"input_ids": [*whole(*args, **given)["input_ids"], *map(ord, "<think>\n")]},
    )
    out = tmp_path / "run"
    evaluate(tasks_of(data), adder(), out, say=quiet)
    regrade(out, again=True, say=quiet)
    _, *lines = lines_of(out / "sums" / "grades.jsonl")
    assert {verdict for line in lines for verdict in line["verdict"]} == {"no_answer"}


def test_grading_again_generates_nothing_and_leaves_the_table_alone(tmp_path, data, monkeypatch):
    engine, out = Adder(), tmp_path / "run"
    evaluate(tasks_of(data), adder(engine), out, say=quiet)
    before, asked = reports_of(out), len(engine.asked)
    shards = {path: path.read_bytes() for path in (out / "sums" / "rollouts").iterdir()}
    monkeypatch.setattr(grades, "grader_fingerprint", lambda: "another grader")
    regrade(out, again=True, say=quiet)
    assert lines_of(out / "sums" / "grades.jsonl")[0]["grader"] == "another grader"
    write_reports(out, say=quiet)
    assert reports_of(out) == before and len(engine.asked) == asked == 48
    assert {path: path.read_bytes() for path in shards} == shards


def test_grades_of_another_grader_are_made_anew(evaluated, monkeypatch):
    out, said = evaluated(), []
    monkeypatch.setattr(grades, "grader_fingerprint", lambda: "another grader")
    write_reports(out, say=said.append)
    assert said == ["sums: graded by another version of the grader, or not by this run; grading all 12 problems again"]


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_torn_last_line_is_dropped_and_its_problem_graded_again(evaluated, cut):
    out, said = evaluated(), []
    path = out / "sums" / "grades.jsonl"
    whole, before = path.read_bytes(), reports_of(out)
    path.write_bytes(whole[:-cut])
    write_reports(out, say=said.append)
    assert path.read_bytes() == whole and reports_of(out) == before
    assert said == ["sums: grades.jsonl ended in a torn line; it was dropped, and its problem is graded again"]


def test_only_what_is_missing_is_graded(evaluated, monkeypatch):
    out, graded = evaluated(), []
    path = out / "sums" / "grades.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:9]))
    real = grades.grade

    def counting(*, completions, golds):
        graded.extend(golds)
        return real(completions=completions, golds=golds)

    monkeypatch.setattr(grades, "grade", counting)
    write_reports(out, say=quiet)
    assert path.read_bytes() == b"".join(lines) and len(graded) == 4 * 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 17, 47])
def test_an_interrupted_generation_goes_on_and_generates_no_finished_shard_twice(tmp_path, data, evaluated, after):
    whole, out = evaluated("whole", n=4), tmp_path / "cut"

    class Dying(Adder):
        def answer(self, request):
            if len(self.asked) > after:
                raise Killed
            return super().answer(request)

    with pytest.raises(Killed):
        evaluate(tasks_of(data, n=4), adder(Dying()), out, shard_prompts=2, say=quiet)
    engine = Adder()
    evaluate(tasks_of(data, n=4), adder(engine), out, resume=True, shard_prompts=2, say=quiet)
    assert len(engine.asked) == 48 - after // 8 * 8
    ours, theirs = (json.loads((folder / "report.json").read_text())["benchmarks"] for folder in (out, whole))
    assert ours == theirs


def test_benchmarks_can_be_added_to_an_evaluation(tmp_path, data, evaluated):
    out = evaluated()
    other = write_data(tmp_path / "others.jsonl", 5)
    evaluate(tasks_of(other), adder(), out, resume=True, say=quiet)
    assert list(json.loads((out / "report.json").read_text())["benchmarks"]) == ["sums", "others"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 1}),
        ("model", {"model": "other"}),
        ("fingerprint", {"fingerprint": "b" * 64}),
        ("dtype", {"dtype": "bfloat16"}),
        ("sums.temperature", {"temperature": 0.9}),
        ("sums.max_tokens", {"max_tokens": 300}),
        ("sums.problems_sha256", {"gold": "1"}),
    ],
)
def test_resuming_with_another_setting_names_it_and_changes_nothing(tmp_path, data, evaluated, field, change):
    out = evaluated()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if "gold" in change:
        data.write_text(data.read_text().replace('"answer": "8"', '"answer": "9"'))
    engine = Adder()
    engine.fingerprint = change.get("fingerprint", engine.fingerprint)
    model = adder(engine, **({"dtype": change["dtype"]} if "dtype" in change else {}))
    if "model" in change:
        model = type(model)(change["model"], engine, model.tokenizer, model.settings)
    overrides = {name: change[name] for name in ("temperature", "max_tokens") if name in change}
    with pytest.raises(UserError) as caught:
        evaluate(tasks_of(data, **overrides), model, out, seed=change.get("seed", 0), resume=True, say=quiet)
    assert str(caught.value).startswith(f"{field}: ") or (
        field == "sums.problems_sha256" and "sha256" in str(caught.value)
    )
    assert "\n" not in str(caught.value) and engine.asked == []
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_in_it_needs_resume(data, evaluated):
    out = evaluated()
    with pytest.raises(UserError, match=r"^out: .* is not empty; --resume"):
        evaluate(tasks_of(data), adder(), out, say=quiet)


def test_what_does_not_fit_the_context_is_refused_before_anything_is_written(tmp_path, data):
    engine = Adder()
    engine.context = 450
    with pytest.raises(UserError, match=r"^max_tokens: sums row 'p\d+' has 1\d\d tokens and asks for 400 more"):
        evaluate(tasks_of(data), adder(engine), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists() and engine.asked == []


def test_how_many_rows_do_not_fit_is_said_at_once(data):
    """By the longest of them: what it names as fitting fits all."""
    task, engine = tasks_of(data)[0], Adder()
    lengths = [len(prompt.ids) for prompt in render_prompts(task, adder())]
    engine.context = 400 + sorted(lengths)[4]
    beyond = sum(length > sorted(lengths)[4] for length in lengths)
    longest = f"sums row 'p{lengths.index(max(lengths))}' has {max(lengths)} tokens"
    message = rf"^max_tokens: {longest} .* at most (\d+) fit \({beyond} of 12 rows do not fit, this is the longest\)"
    with pytest.raises(UserError, match=message) as caught:
        render_prompts(task, adder(engine))
    fits = int(re.search(message, str(caught.value))[1])
    assert len(render_prompts(tasks_of(data, max_tokens=fits)[0], adder(engine))) == 12


def test_a_missing_chat_template_is_refused(tmp_path, data):
    model = adder()
    tokenizer = Characters()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="^model: its tokenizer has no chat template"):
        evaluate(tasks_of(data), type(model)("adder", Adder(), tokenizer), tmp_path / "run", say=quiet)


@pytest.mark.parametrize("content", [None, {}, {"run.json": "{"}, {"run.json": "[]"}])
def test_a_folder_without_an_evaluation_is_refused(tmp_path, content):
    folder = tmp_path / "empty"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match="^dir: "):
        write_reports(folder, say=quiet)


def test_an_unfinished_generation_has_no_report(tmp_path, data):
    evaluate(tasks_of(data), adder(), tmp_path / "run", until="render", say=quiet)
    with pytest.raises(UserError, match="^table: "):
        write_reports(tmp_path / "run", say=quiet)


def test_stop_texts_end_completions_and_are_counted(tmp_path, data):
    out = tmp_path / "run"
    evaluate(tasks_of(data, stop=("Q:", "</s>")), adder(), out, say=quiet)
    rows = list(read_table(out / "sums" / "rollouts").rows())
    assert not any("Q:" in row["completion"] for row in rows)
    assert all("Q:" in Characters().decode(row["completion_ids"]) for row in rows)
    assert json.loads((out / "report.json").read_text())["benchmarks"]["sums"]["stops"] == {"Q:": 48}


def test_leftovers_of_killed_writes_are_removed(data, evaluated):
    out = evaluated()
    for path in (out / ".report.html.x1_", out / "sums" / ".grades.jsonl.abc"):
        path.write_text("half")
    (out / ".mine").write_text("")
    evaluate(tasks_of(data), adder(), out, resume=True, say=quiet)
    assert [path.name for path in out.rglob(".*")] == [".mine"]


def test_times_are_in_times_json_and_the_tables_manifests_alone(tmp_path, evaluated):
    folders = [evaluated(name) for name in ("a", "b")]
    files = [{path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} for out in folders]
    assert {str(path) for path in files[0] if files[0][path] != files[1][path]} <= {
        "times.json",
        "sums/rollouts/manifest.json",
    }
    assert set(json.loads((folders[0] / "times.json").read_text())["sums"]) == {"generate", "grade"}


@pytest.mark.slow
def test_the_key_covers_what_can_change_a_completion(data, evaluated, tmp_path):
    def key(name, **changes):
        evaluate(tasks_of(data, **changes), adder(), tmp_path / name, say=quiet)
        return json.loads((tmp_path / name / "report.json").read_text())["manifest"]["benchmarks"]["sums"]["key"]

    assert key("a") == key("b")
    assert len({key("a2"), key("c", temperature=0.5), key("d", max_tokens=300), key("e", prompt="{problem}")}) == 4


def test_the_manifest_says_what_was_measured(evaluated):
    run = read_run(evaluated())
    assert run["model"] == "adder" and run["fingerprint"] == "a" * 64 and run["settings"] == {"engine": "stand-in"}
    assert run["benchmarks"]["sums"]["data_rows"] == 12 and "python" in run["versions"]


SLOW_RUN = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    from posttrain.evaluation import grades
    from posttrain.evaluation.harness import evaluate
    from tests.evaluation.stand_ins import Adder, adder, tasks_of

    grades.CHUNK = 8
    evaluate(
        tasks_of(Path(sys.argv[1])), adder(Adder(0.005)), Path(sys.argv[2]), resume="--resume" in sys.argv, shard_prompts=3
    )
    """
)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_report_is_the_same(tmp_path):
    data = write_data(tmp_path / "sums.jsonl", 60)
    script = tmp_path / "run.py"
    script.write_text(SLOW_RUN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out, *arguments):
        command = [sys.executable, str(script), str(data), str(out), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    lasted = time.monotonic() - began
    chance, out, kills, shards = random.Random(0), tmp_path / "cut", 0, {}
    while kills < 10:
        process = start(out, "--resume")
        try:
            process.wait(chance.uniform(0.3, 1.0) * lasted)
            for path in [*REPORTS, "sums/grades.jsonl"][: chance.randrange(5)]:  # finished: take some of its end away
                (out / path).unlink(missing_ok=True)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        folder = out / "sums" / "rollouts"
        if (folder / "manifest.json").is_file():
            for name in read_manifest(folder)["shards"]:
                written = (folder / name).stat().st_mtime_ns
                assert shards.setdefault(name, written) == written  # no finished shard is generated twice
    assert start(out, "--resume").wait() == 0
    assert reports_of(out) == reports_of(tmp_path / "whole")
    assert 0 < len(shards) <= len(read_manifest(folder)["shards"]) == 20
