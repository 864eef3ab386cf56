"""All of it composed: a trained policy, its guide and its probe in one `posttrain serve`, asked by OpenAI's client, are right as
often as offline, and in the same order."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from posttrain.decoding.guide import load_guide
from posttrain.evaluation.arms import Arm, policy_arm, reranked_arm
from posttrain.evaluation.benchmarks import Problems, load_all
from posttrain.evaluation.harness import Model, evaluate
from posttrain.evaluation.intervals import paired_comparison
from posttrain.models.load import Policy, load_model
from posttrain.pipelines import dqo, qprobe
from posttrain.pipelines.dqo import DQOTraining
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.rollout import RolloutConfig, rollout
from posttrain.pipelines.value_training import ValueTraining, train_value
from posttrain.rewards.math import grade
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.table import RolloutTable, read_table
from posttrain.rollouts.transformers import TransformersEngine
from tests.serving.conftest import KEY, REAL_VLLM, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS, K, BETA, MAX_TOKENS = 200, 4, 0.1, 192
GUIDANCE, RERANK = {"guidance": {"beta": BETA}}, {"rerank": {"k": K}}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guide": GUIDANCE,
    "probe": RERANK,
    "both": {**GUIDANCE, **RERANK},
}
SIGMAS = 3  # of the difference between two binomial shares


def silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Composed:
    """policy, guide, probe: folders; arms: what the harness's samples of `task` say of every combination."""

    policy: Path
    guide: Path
    probe: Path
    task: Problems
    arms: dict[str, Arm]


def sampled(policy: Policy, prompts: int, out: Path, seed: int) -> RolloutTable:
    sampling = Sampling(1.0, max_tokens=MAX_TOKENS, seed=seed)
    plan = RolloutConfig("arithmetic", "train", prompts, samples=8, sampling=sampling)
    return rollout(policy, plan, plan.rows(), out, resume=False, say=silent)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Composed:
    root = tmp_path_factory.mktemp("composed")
    base = load_model("tiny", "cpu", "float32")
    # Better than the base, and not so good that nothing is left to do.
    training = DQOTraining(critic_warmup_steps=5, epochs=1)
    dqo.train(base, sampled(base, 60, root / "base", 1), training, root / "policy", say=silent)

    policy = load_model(str(root / "policy"), "cpu", "float32")
    table = sampled(policy, 60, root / "train", 2)
    value = ValueTraining(head="shared", learning_rate=3e-3, epochs=3)  # of all heads the cheapest, and vLLM has it
    train_value(policy, [table], value, root / "guide")
    fitted, _ = qprobe.fit(policy, table, QProbeConfig(str(root), layers=(2,)), root / "features")
    fitted.probe.save_pretrained(root / "probe")

    [task] = load_all(["arithmetic"], {"n": K, "max_tokens": MAX_TOKENS}, PROMPTS)
    guide = load_guide(root / "guide", policy)
    arms: dict[str, Arm] = {}
    for (plain, best), own in ((("plain", "probe"), {}), (("guide", "both"), {"beta": BETA, "guide": guide.name})):
        engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint, guide=guide)
        model = Model(policy.name, engine, policy.tokenizer, engine.settings, **own)
        evaluate([task], model, root / "offline" / plain, until="grade", show=False, say=silent)
        found = read_table(root / "offline" / plain / "arithmetic" / "rollouts")
        scores = qprobe.score(policy, fitted.probe, found, root / "features").tolist()
        lengths = [[len(ids) for ids in row] for row in found.rectangle("completion_ids")]
        arms[plain] = policy_arm(plain, plain, found, 0.0)
        arms[best] = reranked_arm(best, best, scores, found.rectangle("correct"), lengths, 0.0)
    return Composed(root / "policy", root / "guide", root / "probe", task, arms)


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=REAL_VLLM)])
def client(request: pytest.FixtureRequest, composed: Composed) -> Iterator[openai.OpenAI]:
    options = ("--engine", request.param, "--guide", str(composed.guide), "--probe", str(composed.probe))
    with (
        started(*options, model=str(composed.policy)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client,
    ):
        yield client


def right(client: openai.OpenAI, task: Problems, fields: dict[str, Any]) -> np.ndarray:
    """Whether each problem is answered rightly, [prompts]; seeds are others than the harness's."""

    def ask(seed: int, problem: str) -> str:
        answer = client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": problem}],
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            seed=seed,
            extra_body=fields,
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(10_000, 10_000 + PROMPTS), [row["problem"] for row in task.rows]))
    return np.array([found.correct for found in grade(completions=texts, golds=[row["answer"] for row in task.rows])])


def test_every_combination_is_as_right_as_offline_and_in_the_same_order(composed: Composed, client) -> None:
    found = {name: right(client, composed.task, fields) for name, fields in COMBINATIONS.items()}
    arms = composed.arms
    for name, arm in arms.items():
        draws = PROMPTS * (K if name in ("plain", "guide") else 1)
        share = (arm.accuracy * draws + found[name].sum()) / (draws + PROMPTS)
        error = np.sqrt(share * (1 - share) * (1 / draws + 1 / PROMPTS))
        assert found[name].mean() == pytest.approx(arm.accuracy, abs=SIGMAS * error), name
    ordered = 0
    for one, other in itertools.combinations(COMBINATIONS, 2):
        offline = paired_comparison(arms[one].per_problem, arms[other].per_problem)
        shares = [arms[name].accuracy for name in (one, other)]
        least = SIGMAS * np.sqrt(sum(share * (1 - share) for share in shares) / PROMPTS)  # what chance may hide here
        if offline.low <= 0 <= offline.high or abs(offline.difference) < least:
            continue
        assert (found[one].mean() - found[other].mean()) * offline.difference > 0, (one, other)
        ordered += 1
    assert ordered >= 2, "nothing here has an order"
