"""Folders of runs as the commands leave them, of made-up numbers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.report import write_report
from posttrain.record import begin, log, recording
from posttrain.rollouts.table import SCHEMA, RolloutTable

HOSTILE = "<script>alert(1)</script> & </pre>{{ 7*7 }}"


def table(folder: Path, problems: list[str], samples: int = 2) -> RolloutTable:
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            "group": group,
            "sample": sample,
            "prompt": [{"role": "user", "content": f"Solve {{{problem}}}"}],
            "completion": f"{problem} makes {sample}. {HOSTILE}",
            "completion_ids": list(range(20)),
            "finish_reason": "stop",
            "answer": str(group),
            "extracted": str(sample),
            "verdict": "equal" if sample else "different",
            "correct": bool(sample),
        }
        for group, problem in enumerate(problems)
        for sample in range(samples)
    ]
    return RolloutTable(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        {"settings": {"template": "Solve {{{problem}}}", "source": "sums/test"}},
        folder,
    )


def arm(name: str, title: str, accuracy: float, problems: int, tokens: float, seed: int, **measures: float) -> Arm:
    scores = np.random.default_rng(seed).binomial(4, accuracy, problems) / 4
    return Arm(name, title, scores, tokens, 1.0, (), measures)


def arms(problems: int, *more: Arm) -> dict[str, Arm]:
    found = [
        arm("base", "one sample", 0.5, problems, 61, 0),
        arm("majority", "majority of 8", 0.5, problems, 486, 1),
        arm("oracle", "oracle of 8", 0.95, problems, 486, 2),
        *more,
    ]
    return {each.name: each for each in found}


def page(folder: Path, found: dict[str, Arm], problems: list[str], values: bool = False) -> None:
    texts = f"makes {HOSTILE}".split(" ")
    valued = [[[(f"{text} ", i / len(texts)) for i, text in enumerate(texts)]] * 2] * 3
    write_report(
        folder / "report.html",
        title="a run",
        lead="",
        arms=found,
        figures=[],
        table=table(folder, problems),
        scores=None,
        definitions=(),
        manifest={},
        values=valued if values else None,
    )


def qsharp(folder: Path, problems: list[str]) -> Path:
    with recording(["qsharp", "--config", "recipes/qsharp/arithmetic.yaml"]):
        begin(folder, {"beta": 0.1}, ["none"])
        for shard in range(3):
            figures = {"completions": 256, "accuracy": 0.48 + shard / 50, "tokens": 61.0, "tokens_per_second": 900.0}
            log(folder / "train", shard, figures)
        for step in range(10, 101, 10):
            log(folder / "round-1" / "value", step, {"loss": 1 / step, "grad_norm": 0.5, "epoch": step / 20})
            if step % 50 == 0:
                log(
                    folder / "round-1" / "value",
                    step,
                    {"eval_loss": 0.4, "eval_auc": 0.8 + step / 1000, "eval_calibration_error": 0.05},
                )
        count = len(problems)
        guided = arm("qsharp", "Q#, round 1, beta 0.1", 0.9, count, 73, 3, kl=0.89)
        rest = arm("cd", "CD at the KL of Q#, beta 0.05", 0.85, count, 72, 4, kl=0.9)
        page(folder, arms(count, guided, rest), problems, values=True)
        points = [
            {
                "law": law,
                "beta": beta,
                "kl": 0.3 / beta,
                "accuracy": accuracy,
                "interval": [accuracy - 0.05, accuracy + 0.03],
            }
            for law, beta, accuracy in (("Q#", 1.0, 0.7), ("Q#", 0.3, 0.9), ("CD", 1.0, 0.6), ("CD", 0.3, 0.85))
        ]
        (folder / "summary.json").write_text(json.dumps({"frontier": points}))
    return folder


def dqo(folder: Path, problems: list[str]) -> Path:
    with recording(["dqo", "--config", "recipes/dqo/arithmetic.yaml"]):
        begin(folder, {"seed": 1}, ["none"])
        for step in range(10, 81, 10):
            figures = {"loss": 1 - step / 100, "kl": step / 1e4, "explained_variance": step / 100, "ess": 0.9}
            log(folder / "policy", step, {**figures, "log_ratio_right": step / 10, "log_ratio_wrong": -step / 10})
        page(folder, arms(len(problems), arm("dqo", "DQO, beta 0.03", 0.8, len(problems), 58, 5)), problems)
    return folder
