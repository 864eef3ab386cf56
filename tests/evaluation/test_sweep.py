"""Several betas, two laws and the model itself, by a stand-in that gets better the more it is guided."""

import json
from dataclasses import replace

import pytest

from posttrain.errors import UserError
from posttrain.evaluation.sweep import COLUMNS, rows, sweep
from tests.evaluation.stand_ins import Adder, adder, tasks_of, write_data

BETAS = (0.1, 1.0)
RUNS = ["base", "qsharp-beta-0.1", "qsharp-beta-1.0", "cd-beta-0.1", "cd-beta-1.0"]


class GuidedAdder(Adder):
    """Right whenever it is guided; its KL is a law's own number over beta."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def answer(self, request):
        done = super().answer(request)
        if request.beta is None:
            return done
        problem = "".join(map(chr, request.prompt_ids)).partition("user\n")[2].partition("=")[0]
        text = f"\\boxed{{{sum(map(int, problem.split('+')))}}}"
        kl = {"qsharp": 0.5, "cd": 0.25, "ipl": 0.75}[self.law] / request.beta
        return replace(done, ids=tuple(map(ord, text)), logprobs=(-0.5,) * len(text), kl=kl, log_ratio=kl)


class Swept:
    """A sweep, the engines that it made and what it said."""

    def __init__(self, data, out, resume=False, **laws):
        self.engines, self.said = [], []
        tasks = tasks_of(data, n=2)
        self.found = sweep(tasks, self.model, BETAS, out, resume=resume, say=self.said.append, **laws)

    def model(self, law, beta):
        self.engines.append(GuidedAdder(law))
        guided = {"guidance": {"law": law, "value_model": "v" * 64}} if law else {}
        return replace(adder(self.engines[-1], **guided), beta=beta, guide="a guide" if law else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of data, and of a finished sweep over them."""
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def swept(folder):
    return Swept(write_data(folder / "sums.jsonl"), folder / "sweep")


@pytest.mark.slow
def test_both_laws_are_measured_at_every_beta_beside_the_model_alone(folder, swept):
    out = folder / "sweep"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(RUNS)
    entry = json.loads((out / "frontier.json").read_text())["sums"]
    alone = json.loads((out / "base" / "report.json").read_text())["benchmarks"]["sums"]
    assert entry["base"] == alone["metrics"]["pass@1"] and 0 < entry["base"]["value"] < 1
    found = [(point["law"], point["beta"], point["kl"], point["accuracy"]) for point in entry["points"]]
    assert found == [("Q#", 0.1, 5.0, 1.0), ("Q#", 1.0, 0.5, 1.0), ("CD", 0.1, 2.5, 1.0), ("CD", 1.0, 0.25, 1.0)]
    asked = [{request.beta for request in engine.asked} for engine in swept.engines]
    assert asked == [{None}, {0.1}, {1.0}, {0.1}, {1.0}]


def test_all_runs_have_the_same_noise(swept):
    seeds = [{request.sampling.seed for request in engine.asked} for engine in swept.engines]
    assert len(seeds[0]) == 24 and all(each == seeds[0] for each in seeds)


def test_the_table_has_one_line_for_each(swept):
    lines = rows(swept.found)
    assert all(len(line) == len(COLUMNS) for line in lines)
    titles = ["without guide", "Q#, beta 0.1", "Q#, beta 1", "CD, beta 0.1", "CD, beta 1"]
    assert [line[:3] for line in lines] == [
        ("sums", title, kl) for title, kl in zip(titles, ["0", "5.000", "0.500", "2.500", "0.250"], strict=True)
    ]


def test_the_page_defines_what_it_compares(folder, swept):
    page = (folder / "sweep" / "frontier.html").read_text()
    assert page.count("<svg") == 1 and "controlled decoding" in page and "E[exp(R / beta)]" in page
    for name in RUNS[1:]:
        law = "Q#" if "qsharp" in name else "CD"
        own = (folder / "sweep" / name / "report.html").read_text()
        assert f"guided by {law} (vvvvvvvvvvvvvvvv) at beta {float(name.rpartition('-')[2]):g}" in own


def test_of_preferences_there_is_one_law(tmp_path):
    swept = Swept(write_data(tmp_path / "sums.jsonl"), tmp_path / "sweep", laws=("ipl",))
    assert [line[1:3] for line in rows(swept.found)] == [
        ("without guide", "0"),
        ("IPL, beta 0.1", "7.500"),
        ("IPL, beta 1", "0.750"),
    ]
    page = (tmp_path / "sweep" / "frontier.html").read_text()
    assert page.count("<svg") == 1 and "pi_ref * exp(Q / beta)" in page and "controlled decoding" not in page


def test_a_prompt_is_shown_once(swept):
    assert sum("<|im_start|>user" in line for line in swept.said) == 1
    assert [line for line in swept.said if line.removesuffix(":") in RUNS] == [f"{name}:" for name in RUNS]


@pytest.mark.slow
def test_what_is_finished_is_kept(folder, swept):
    page = (folder / "sweep" / "frontier.html").read_bytes()
    again = Swept(folder / "sums.jsonl", folder / "sweep", resume=True)
    assert not any(engine.asked for engine in again.engines)
    assert again.found == swept.found and (folder / "sweep" / "frontier.html").read_bytes() == page


def test_a_sweep_in_a_full_folder_needs_resume(folder, swept):
    with pytest.raises(UserError, match=r"^out: .*base is not empty; --resume"):
        Swept(folder / "sums.jsonl", folder / "sweep")
