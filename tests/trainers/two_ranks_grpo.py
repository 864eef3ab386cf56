"""A few steps of GRPO-lambda on two gloo ranks with six completions each, in groups of four: the middle one straddles them.
Completions are our engine's; at the end all ranks sample the same prompt.

torchrun --nproc_per_node 2 tests/trainers/two_ranks_grpo.py OUT
"""

import json
import sys
from pathlib import Path

from test_grpo_lambda import arguments, data, verdicts

from posttrain.models.load import load_model
from posttrain.pipelines.ranks import leave, part
from posttrain.trainers.engine_rollouts import engine_rollouts
from posttrain.trainers.grpo_lambda import GRPOLambdaConfig, GRPOLambdaTrainer


def main(out: Path) -> None:
    policy = load_model("tiny", "cpu")
    args = arguments(
        GRPOLambdaConfig, out, per_device_train_batch_size=6, max_steps=3, gate_fraction=0.34, ddp_backend="gloo"
    )
    report: dict[str, list] = {"rewards": [], "correct": [], "lengths": [], "finished": []}

    class Recording(GRPOLambdaTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, ids):
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
            report["rewards"].append(rewards[:, 0].tolist())
            report["correct"].append(verdicts(completions, [row["answer"] for row in inputs]))
            report["lengths"].append([len(x) for x in ids])
            report["finished"].append([x[-1] in self.eos_token_ids for x in ids])
            return rewards

    rollouts = engine_rollouts()
    trainer = Recording(
        policy.model, verdicts, args, data(24), processing_class=policy.tokenizer, rollout_func=rollouts
    )
    trainer.train()
    report["same_prompt"] = rollouts([data(1)[0]["prompt"]] * 4, trainer)["completion_ids"]
    keys = ("accuracy", "gate/fraction", "gate/accuracy", "reward")
    log = [{key: entry.get(key) for key in keys} for entry in trainer.state.log_history if "reward" in entry]
    (out / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps({**report, "log": log}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
    leave(0)
