"""What each of Q#'s heads buys, and for how much: accuracy, KL and seconds of guided decoding on the embedded model, beside what
the same seconds buy without a guide (a majority vote over more samples).

    python -m benchmarks.qsharp_heads --out runs/benchmark_qsharp_heads [--seed 0] [--prompts 500] [--threads 2]

Every head learns from the same completions, and is measured on the same problems with the same noise. A V-type value model of
two layers is trained whole; so is the Q-type one; a shared head is all there is to train. Seconds are those of sampling, of one
completion of every problem.
"""

import argparse
from pathlib import Path

import torch

from posttrain.cli.tables import print_table
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import load_guide
from posttrain.evaluation.arms import policy_arm, sampled_arms
from posttrain.models.load import load_model
from posttrain.pipelines.rollout import RolloutConfig, rollout
from posttrain.pipelines.value_training import ValueTraining, train_value
from posttrain.rollouts.engine import Sampling

BASE_SAMPLES = 8
BETAS = (0.1, 0.3)
TRAINED = {
    "v": ValueTraining(head="v", layers=2, learning_rate=1e-3, head_learning_rate=3e-3, epochs=4),
    "q": ValueTraining(head="q", layers=2, learning_rate=1e-3, head_learning_rate=3e-3, epochs=4),
    "shared": ValueTraining(head="shared", head_learning_rate=3e-3, epochs=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_qsharp_heads"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=500, help="problems that are measured on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = load_model("tiny")
    sampling = Sampling(max_tokens=192, seed=args.seed)
    train_plan = RolloutConfig("arithmetic", "train", 300, samples=8, sampling=sampling)
    train = rollout(policy, train_plan, train_plan.rows(), args.out / "train", resume=True)

    plan = RolloutConfig("arithmetic", "test", args.prompts, samples=BASE_SAMPLES, sampling=sampling)
    rows = plan.rows()
    test = rollout(policy, plan, rows, args.out / "test", resume=True, say=lambda _: None)
    lengths = [[len(ids) for ids in sample] for sample in test.rectangle("completion_ids")]
    seconds = test.manifest["seconds"]
    arms = sampled_arms(test.rectangle("correct"), test.rectangle("extracted"), lengths, seconds)
    lines = [("one sample", arms["base"], "", seconds / BASE_SAMPLES), ("majority of 8", arms["majority"], "", seconds)]
    for head, training in TRAINED.items():
        folder = args.out / head / "value"
        made = train_value(policy, [train], training, folder, args.seed)
        for candidates in (20, 5):
            guide = load_guide(folder, policy, Guidance(candidates=candidates))
            for beta in BETAS:
                guided = rollout(
                    policy,
                    RolloutConfig("arithmetic", "test", args.prompts, samples=1, sampling=sampling, beta=beta),
                    rows,
                    args.out / head / f"guided-{candidates}-{beta:g}",
                    resume=True,
                    say=lambda _: None,
                    guide=guide,
                )
                title = f"{head}, {candidates} candidates, beta {beta:g}"
                trained = f"{made['seconds']:.0f}"
                lines.append((title, policy_arm(title, title, guided, 0), trained, guided.manifest["seconds"]))
    print_table(
        ("arm", "accuracy", "95 % interval", "KL, nats", "tokens", "training, s", "sampling, s"),
        [
            (
                title,
                f"{100 * arm.accuracy:.1f} %",
                f"{100 * arm.interval[0]:.1f} - {100 * arm.interval[1]:.1f}",
                f"{arm.measures['kl']:.2f}" if "kl" in arm.measures else "",
                f"{arm.tokens:.0f}",
                trained,
                f"{cost:.1f}",
            )
            for title, arm, trained, cost in lines
        ],
    )


if __name__ == "__main__":
    main()
