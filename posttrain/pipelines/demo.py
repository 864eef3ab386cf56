"""The main job on the embedded model: every method of the toolkit on one task, one table, one report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.evaluation.arms import Arm, policy_arm
from posttrain.evaluation.plots import token_plane
from posttrain.evaluation.report import Figure, write_report
from posttrain.models.load import load_model
from posttrain.pipelines import baselines, dqo, grpo_lambda, qprobe, qsharp
from posttrain.pipelines.dqo import DQOTraining
from posttrain.pipelines.grpo_lambda import GRPOLambdaRunConfig, GRPOLambdaTraining
from posttrain.pipelines.qprobe import QProbeConfig, QProbeRun
from posttrain.pipelines.qsharp import QSharpConfig, QSharpRun
from posttrain.pipelines.rollout import rollout
from posttrain.pipelines.value_training import ValueTraining
from posttrain.provenance import write_json
from posttrain.trainers.baselines import BaselineTraining
from posttrain.trainers.probe import ProbeConfig

LEAD = (
    "The embedded model solves multi-step arithmetic. It learned from careful writers, who carry, and from hurried ones, who "
    "drop the carry the same wrong way every time: so a majority vote hardly helps. Q-Probe re-ranks its samples; Q# learns "
    "which token leads to a right answer and guides it there (CD: the same value model, by its mean); DQO writes what it learned into "
    "the weights, beside rejection sampling, which trains on the right samples alone. GRPO learns online, from the start; with a "
    "plain penalty on length, and with GRPO-lambda's, which acts only where a group is mostly right."
)
# Half the policy's size, and well past what it takes to know which chains come out right.
VALUE = ValueTraining(head="v", layers=2, learning_rate=1e-3, head_learning_rate=3e-3, epochs=4.0)
TRAINED_SAMPLES = 2  # of a trained policy per test problem
ONLINE: dict[str, grpo_lambda.ArmName] = {"grpo": "grpo", "grpo_plain": "plain", "grpo_lambda": "grpo_lambda"}
ORDER = (
    *("base", "majority", "oracle", "qprobe", "qsharp", "qsharp_2", "cd", "qsharp_best", "qsharp_vote"),
    *("rejection", "dqo", *ONLINE),
)


@dataclass(frozen=True)
class Sizes:
    """How much is sampled, swept and trained."""

    train_prompts: int
    test_prompts: int
    sweep: tuple[float, ...]
    online: GRPOLambdaTraining


GRPO = GRPOLambdaTraining(steps=12, prompts_per_step=8, learning_rate=5e-4, gate_fraction=0.5, penalty_warmup_steps=2)
FULL = Sizes(train_prompts=300, test_prompts=500, sweep=(0.3, 1.0), online=GRPO)
FAST = Sizes(train_prompts=120, test_prompts=150, sweep=(), online=replace(GRPO, steps=6))


@dataclass(frozen=True)
class DemoRun:
    """What the methods left, measured on the same problems; the offline ones learned from the completions of `out`/train."""

    qprobe: QProbeRun
    qsharp: QSharpRun
    trained: dict[str, Arm]
    training: dict[str, dict[str, Any]]

    @property
    def arms(self) -> dict[str, Arm]:
        arms = {**self.qprobe.arms, **self.qsharp.arms, **self.trained}
        return {name: arms[name] for name in ORDER}

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {"qprobe": self.qprobe.manifest, "qsharp": self.qsharp.manifest, **self.training}


def demo(out: Path, seed: int = 0, say: Callable[[str], None] = print, fast: bool = False) -> DemoRun:
    """Samples, grades, learns, re-ranks, guides and measures; writes `summary.json` and `report.html` into `out`."""
    sizes = FAST if fast else FULL
    shared: dict[str, Any] = {
        "out": str(out),
        "seed": seed,
        "train_prompts": sizes.train_prompts,
        "test_prompts": sizes.test_prompts,
    }
    probe = qprobe.run(QProbeConfig(**shared, probe=ProbeConfig(seed=seed)), say)
    guided = qsharp.run(QSharpConfig(**shared, sweep=sizes.sweep, value=VALUE), say=say)
    assert guided is not None
    offline, made_offline = train_policies(probe, out, seed, say)
    online, made_online = train_online(probe, out, sizes.online, seed, say)
    result = DemoRun(probe, guided, offline | online, made_offline | made_online)
    summary = {name: arm.summary() for name, arm in result.arms.items()}
    write_json(out / "summary.json", {"arms": summary, "frontier": guided.points, "manifest": result.manifest})
    write_report(
        out / "report.html",
        title="posttrain demo",
        lead=LEAD,
        arms=result.arms,
        figures=[
            Figure(token_plane(result.arms), "Accuracy against what an answer costs. The bars are the intervals."),
            *qprobe.figures(probe),
            *qsharp.figures(guided),
            *grpo_lambda.training_figures({result.arms[name].title: made for name, made in made_online.items()}),
        ],
        table=probe.test,
        scores=probe.scores.tolist(),
        definitions=(
            "pass@1",
            "maj@k",
            "pass@k",
            "Q#",
            "CD",
            "reward model",
            "best-of-k",
            "weighted majority",
            "KL",
            "tokens",
            "seconds",
            "interval",
        ),
        manifest=result.manifest,
    )
    return result


def train_policies(
    probe: QProbeRun, out: Path, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, Arm], dict[str, dict[str, Any]]]:
    """Rejection sampling and DQO on the probe's training table, measured on its test problems: arms, and how they were trained."""
    policy, table, settings = probe.policy, probe.train, DQOTraining()
    plan = probe.config.plan(probe.config.test_split, probe.config.test_prompts, TRAINED_SAMPLES)
    rows = plan.rows()
    beside = baselines.run_baseline(
        "rejection", policy, table, BaselineTraining(), out / "rejection", plan, rows, seed, say
    )
    made = dqo.train(policy, table, settings, out / "dqo" / "policy", seed, say)
    learned = table.manifest["seconds"] + made["seconds"]
    arm, _ = baselines.measure("dqo", dqo.title(settings), out / "dqo", policy, plan, rows, learned)
    return {"rejection": beside.arm, "dqo": arm}, {"rejection": beside.training, "dqo": made}


def train_online(
    probe: QProbeRun, out: Path, settings: GRPOLambdaTraining, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, Arm], dict[str, dict[str, Any]]]:
    """GRPO, with a plain penalty and with GRPO-lambda's, from the probe's policy, measured on its test problems: as above."""
    folder = out / "online"
    arms = tuple(ONLINE.values())
    config = GRPOLambdaRunConfig(str(folder), arms=arms, validation_prompts=0, training=settings, seed=seed)
    rows = grpo_lambda.training_rows(config)
    plan = probe.config.plan(probe.config.test_split, probe.config.test_prompts, TRAINED_SAMPLES)
    test_rows = plan.rows()
    measured, training = {}, {}
    for name, arm in ONLINE.items():
        title = f"{grpo_lambda.ARMS[arm][0]}, {settings.steps} steps"
        say(title)
        training[name] = made = grpo_lambda.train(probe.policy, config, arm, rows, [])
        after = load_model(str(folder / arm), str(probe.policy.model.device), "float32")
        table = rollout(after, plan, test_rows, folder / f"{arm}-test", resume=True, say=lambda _: None)
        measured[name] = policy_arm(name, title, table, made["seconds"])
    return measured, training
