"""What a rollout service has vLLM add to its workers (`worker_extension_cls`), which may be processes of their own."""

from typing import Any

import torch

from posttrain.rollouts.vllm import repack_tied_head

RECORDS = 4096  # of guided requests, at most; well above what runs at a time


class PolicyWorker:
    def reload_policy(self, folder: str) -> None:
        """New weights of the policy; a value model beside it stays what it is."""
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        repack_tied_head(worker.get_model())

    def take_account(self, record: str, ids: list[int]) -> tuple[float, float]:
        """Of a guided completion, once: its KL, and the log-probability of its tokens under the reference."""
        worker: Any = self
        records = worker.get_model().records
        found = records.pop(record)
        while len(records) > RECORDS:  # of requests that nobody waits for any more
            del records[next(iter(records))]
        steps = [found[position] for position in range(len(ids))]
        candidates = torch.stack([step.ids[row] for step, row in steps])
        reference = torch.stack([step.reference[row] for step, row in steps])
        hits = candidates == torch.tensor(ids, device=candidates.device).unsqueeze(-1)
        kl = torch.stack([step.kl[row] for step, row in steps]).sum()
        return float(kl), float(reference.masked_fill(~hits, 0).sum())
