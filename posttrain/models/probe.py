"""The probe: a linear map, or a small MLP, from one feature vector to one score Q, and the folder it is kept in.

A probe folder holds `config.json` (the card below) and `model.safetensors`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.config import build
from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec
from posttrain.provenance import versions, write_json


@dataclass(frozen=True)
class ProbeCard:
    """What a probe reads and how it was trained.

    feature and policy (a fingerprint) name the hidden states it reads; both None for embeddings that came from
    elsewhere. beta is the KL coefficient of training, in units of the reward; None for losses that have none.
    """

    dim: int
    hidden: int | None = None
    feature: FeatureSpec | None = None
    policy: str | None = None
    loss: str | None = None
    beta: float | None = None
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for name, size in (("dim", self.dim), ("hidden", self.hidden)):
            if size is not None and size < 1:
                raise UserError(f"{name}: must be at least 1, got {size}")


class Probe(nn.Module):
    """Q(phi) = theta . (phi - mean) / std + b, or one hidden ReLU layer between (`card.hidden` units).

    The output layer starts at zero, so an untrained probe leaves the base policy as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, card: ProbeCard) -> None:
        super().__init__()
        self.card = card
        self.first = nn.Linear(card.dim, card.hidden or 1)
        self.second = nn.Linear(card.hidden, 1) if card.hidden else None
        output = self.second or self.first
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.register_buffer("mean", torch.zeros(card.dim))
        self.register_buffer("std", torch.ones(card.dim))

    def forward(self, features: Tensor) -> Tensor:
        """Scores [...] of features [..., d], in float32 whatever the features are stored in."""
        # Standardising the weights instead of the features saves two passes over [batch, d].
        weight = self.first.weight / self.std
        scores = F.linear(features.to(weight.dtype), weight, self.first.bias - weight @ self.mean)
        if self.second is not None:
            scores = self.second(F.relu(scores))
        return scores.squeeze(-1)

    def spread(self, deviations: Tensor) -> Tensor:
        """sum_j (theta_j x_j / std_j)^2 [...] of a linear probe; deviations x [..., d]: features less their mean, or the
        difference of two. How far a score hangs on single features."""
        return deviations.square() @ (self.first.weight[0] / self.std).square()

    @torch.no_grad()
    def score(self, features: Tensor, block: int = 8192) -> Tensor:
        """Scores [rows] of stored features [rows, d], a block at a time."""
        return torch.cat([self(part) for part in features.split(block)])

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Sets mean and std to those of these rows [rows, d]; a constant feature is only centred."""
        std, mean = torch.std_mean(features.float(), 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))

    def check_policy(self, fingerprint: str) -> None:
        """Errors: UserError unless this probe was trained on the hidden states of the policy with this fingerprint."""
        if self.card.policy is None or self.card.feature is None:
            raise UserError("probe: it reads embeddings from elsewhere, not this policy's hidden states")
        if self.card.policy != fingerprint:
            raise UserError(f"probe: it reads the policy {self.card.policy}, but this one is {fingerprint}")

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / "model.safetensors.partial"
            save_file(self.state_dict(), partial)
            partial.replace(folder / "model.safetensors")
            write_json(folder / "config.json", self.card)
        except (OSError, SafetensorError) as error:
            raise UserError(f"probe: cannot write to {folder}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path, fingerprint: str | None = None) -> "Probe":
        """Errors: UserError for a missing or damaged file, weights that are not finite, or another policy."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"probe: {folder} has no {name}; give a folder that save_pretrained wrote")
        try:
            values = json.loads((folder / "config.json").read_text())
            tensors = load_file(folder / "model.safetensors")
        except (ValueError, OSError, SafetensorError) as error:
            raise UserError(f"probe: {folder} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"probe: {folder / 'config.json'} must be a mapping of field to value")
        if "model_type" in values:
            found = "value model" if values["model_type"] == "posttrain_value" else f"{values['model_type']!r} model"
            raise UserError(f"probe: {folder} holds a {found}, not a probe; a value model is given as a guide")
        try:
            probe = cls(build(ProbeCard, values))
            probe.load_state_dict(tensors)
        except UserError as error:
            raise UserError(f"probe: {folder / 'config.json'}: {error}") from None
        except RuntimeError:
            raise UserError(f"probe: {folder}: the weights do not have the shapes that config.json says") from None
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"probe: {folder / 'model.safetensors'} holds weights that are not finite")
        if fingerprint is not None:
            probe.check_policy(fingerprint)
        return probe.eval()
