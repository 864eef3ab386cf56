import importlib
import json
from pathlib import Path

import pytest

from posttrain.data.load import load_rows
from posttrain.data.prompts import messages_for, plain_text
from posttrain.evaluation.benchmarks import find
from posttrain.evaluation.lm_eval_bridge import (
    METRICS,
    Judge,
    available,
    boxed,
    filtered,
    final_answer,
    gsm8k_score,
    normalise,
    scores,
)

GSM8K = (
    "So 5 * 3 = 15. The answer is 15.",
    "The answer is 1,234.50. Then the answer is 7.",
    "the answer is 15.",
    "The answer is $15.",
    "The answer is -3",
    "The answer is 15",
    "We get 12 + 3 = 15 dollars",
    "It costs $1,000.",
    "#### 18\nThe answer is 18.",
    "First 3. Second -4, third .5",
    "12.",
    "2/3 of them, so 0.67",
    "$$ ... ,, .. ",
    "no number",
    "",
    "The answer is .",
    "The answer is 5\n",
    "Answer: 15.\n\nQ",
    "٣ apples",
    "The answer is 18.00.",
)
GOLDS = ("15", "1,234.50", "18", "-3", "1000", "0.5", "12", "5")

STATED = (
    "$24$",
    "$x=5$",
    "$\\frac12$",
    "$0.5$",
    "$[2,5)$",
    "$(3,\\frac{\\pi}{2})$",
    "$\\left(3, \\frac{\\pi}{2}\\right)$",
    "$10\\text{ cm}$",
    "$2\\pi cm$",
    "$\\sqrt2$",
    "$\\sqrt[3]8$",
    "$1,234$",
    "$0,1$",
    "$32\\%$",
    "$\\$32,\\!348$",
    "$\\text{Evelyn}$",
    "Evelyn",
    "$52_8$",
    "an integer",
    "$x^2-1$",
    "$(x-1)(x+1)$",
    "$\\boxed{7}$",
    "$\\dfrac{3}{4}$",
    "$90^\\circ$",
    "$864 \\mbox{ inches}^2$",
    "",
    "$",
    "$\\frac{",
    "$5$ or $6$",
    "$2^{10}$",
    "$1024$",
    "7 square feet",
)
MINERVA = (
    *(f"Work. Final Answer: The final answer is {answer}. I hope it is correct." for answer in STATED),
    "The answer is 24.",
    "Final Answer: The final answer is $24$",
    "Final Answer: The final answer is $24$. ",
    "Final Answer: The final answer is\n$24$. I hope it is correct.",
    "Final Answer: The final answer is $1$. I hope it is correct. Final Answer: The final answer is $2$. I hope it is correct.",
    "Final Answer: The final answer is nothing\nFinal Answer: The final answer is $24$. I hope it is correct!",
    "Final Answer: The final answer isI hope it is correct.",
    "",
)  # fmt: skip
SOLUTIONS = (
    "so $\\boxed{24}$", "\\boxed{\\frac{1}{2}}", "\\boxed{[2,5)}", "\\boxed{(3,\\frac{\\pi}{2})}", "$\\boxed 7$ it is", "\\boxed{1234}",
    "\\boxed{x^2-1}", "\\boxed{\\text{Evelyn}}", "\\boxed{2\\pi}", "\\boxed{1024}", "first \\boxed{1} then \\boxed{52_8}", "\\boxed{0,1}",
)  # fmt: skip


@pytest.fixture(scope="module")
def lm_eval_tasks() -> Path:
    package = pytest.importorskip("lm_eval")
    return Path(package.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def minerva(lm_eval_tasks):
    return importlib.import_module("lm_eval.tasks.minerva_math.utils")


def task_of(path, rows, tmp_path):
    """An lm-eval task on rows of ours."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
    }
    config = {**load_yaml(path), **source}
    config.pop("tag", None)
    return ConfigurableTask(config=config)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_gsm8k_cot_scores_are_lm_eval_s(lm_eval_tasks, tmp_path, no_hub):
    """Its own task object: filters, metric, target."""
    from lm_eval.api.instance import Instance

    rows = [{"question": "?", "answer": f"because\n#### {gold}"} for gold in GOLDS]
    task = task_of(lm_eval_tasks / "gsm8k" / "gsm8k-cot.yaml", rows, tmp_path)
    assert tuple(ensemble.name for ensemble in task._filters) == METRICS["gsm8k_cot"]
    checked = set()
    for doc, gold in zip(task.test_docs(), GOLDS, strict=True):
        instances = [Instance("generate_until", doc, ("?", {}), 0) for _ in GSM8K]
        for instance, text in zip(instances, GSM8K, strict=True):
            instance.resps.append(text)
        for ensemble in task._filters:
            ensemble.apply(instances)
            for instance, text in zip(instances, GSM8K, strict=True):
                taken = instance.filtered_resps[ensemble.name]
                theirs = task.process_results(doc, [taken])["exact_match"]
                assert filtered(ensemble.name, text) == taken
                assert gsm8k_score(ensemble.name, text, gold) == theirs, (ensemble.name, text, gold)
                checked.add((ensemble.name, float(theirs)))
    assert len(checked) == 4  # both filters have both outcomes


def test_minerva_s_extraction_and_normal_form_are_lm_eval_s(minerva):
    for text in MINERVA:
        assert final_answer(text) == minerva.get_unnormalized_answer(text)
        assert normalise(final_answer(text)) == minerva.normalize_final_answer(minerva.get_unnormalized_answer(text))
    for solution in SOLUTIONS:
        assert boxed(solution) == minerva.remove_boxed(minerva.last_boxed_only_string(solution))


@pytest.mark.slow
def test_minerva_scores_are_lm_eval_s(minerva):
    assert available("minerva_math")
    judge, found = Judge(), set()
    try:
        for solution in SOLUTIONS:
            doc = {
                "answer": minerva.normalize_final_answer(minerva.remove_boxed(minerva.last_boxed_only_string(solution)))
            }
            ours = scores("minerva_math", {"solution": solution, "answer": ""}, MINERVA, judge)["exact_match"]
            for text, score in zip(MINERVA, ours, strict=True):
                stated = minerva.normalize_final_answer(minerva.get_unnormalized_answer(text))
                assert score == minerva.is_equiv(stated, doc["answer"]), (text, solution)
                found.add((score, stated == doc["answer"]))
    finally:
        judge.close()
    assert (1.0, False) in found and (1.0, True) in found and (0.0, False) in found


def test_normal_forms_of_real_golds_are_lm_eval_s(minerva, data_dir, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DATA", str(data_dir))
    for row in load_rows("math500"):
        theirs = minerva.remove_boxed(minerva.last_boxed_only_string(row["solution"]))
        assert boxed(row["solution"]) == theirs
        assert normalise(theirs) == minerva.normalize_final_answer(theirs)


@pytest.mark.slow
def test_the_8_shot_prompt_is_lm_eval_s(lm_eval_tasks, tmp_path, no_hub):
    rows = [{"question": "What is {1} + 1?", "answer": "#### 2"}]
    task = task_of(lm_eval_tasks / "gsm8k" / "gsm8k-cot.yaml", rows, tmp_path)
    preset = find("gsm8k_cot_8shot")
    messages = messages_for({"problem": "What is {1} + 1?"}, preset.prompt, exemplars=load_rows(preset.fewshot))
    assert plain_text(messages) == task.fewshot_context(next(iter(task.test_docs())), 8)
    assert list(preset.stop) == task.config.generation_kwargs["until"]


@pytest.mark.slow
def test_the_4_shot_prompt_is_lm_eval_s_but_for_two_typing_errors(lm_eval_tasks, minerva, tmp_path, no_hub):
    rows = [{"problem": "What is 1 + 1?", "solution": "\\boxed{2}"}]
    task = task_of(lm_eval_tasks / "minerva_math" / "minerva_math500.yaml", rows, tmp_path)
    for name in ("math_4shot", "math500_4shot"):
        preset = find(name)
        prompt = plain_text(messages_for(rows[0], preset.prompt, exemplars=load_rows(preset.fewshot)))
        repaired = prompt.replace("{\\sqrt{5-x}}$.}", "{\\sqrt{5-x}}$.").replace("480\\\n", "480\\\\\n")
        repaired = repaired.replace("6x-4y&=a,\\\n", "6x-4y&=a,\\\\\n")
        assert repaired == task.fewshot_context(next(iter(task.test_docs())), 4)
        assert list(preset.stop) == task.config.generation_kwargs["until"]


def test_huge_answers_cost_no_time():
    text = "Final Answer: The final answer is " * 20_000 + "9" * 200_000
    assert final_answer(text) == "[invalidanswer]"
    assert len(normalise("x " * 100_000)) >= 100_000
    assert gsm8k_score("flexible-extract", "9" * 1_000_000, "9") == 0


@pytest.mark.slow
def test_what_cannot_be_computed_is_different_and_the_judge_goes_on():
    judge = Judge()
    try:
        assert judge.equivalent("\\frac{1}{2}", "0.5")
        assert not judge.equivalent("9^{9^{9^{9}}}", "1")
        assert judge.equivalent("\\frac{2}{4}", "0.5")
    finally:
        judge.close()
