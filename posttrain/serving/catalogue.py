"""What one server serves: a policy, guides and probes by name, and the limits of a request."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import ValueGuide, load_guide
from posttrain.decoding.guides import Guides
from posttrain.decoding.rerank import Reranker
from posttrain.decoding.vllm import VLLMGuide
from posttrain.errors import UserError, nearest
from posttrain.models.load import Policy
from posttrain.models.probe import Probe
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.rollouts.vllm import VLLMEngine
from posttrain.serving.errors import ApiError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Limits:
    """requests: answered at the same time, waiting ones included; completions: sampled for one request (prompts * n, or k);
    body: bytes. Errors: UserError naming the field that is below 1."""

    requests: int = 256
    completions: int = 64
    body: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("requests", "completions", "body"):
            if getattr(self, name) < 1:
                raise UserError(f"max-{name}: must be at least 1, got {getattr(self, name)}")


@dataclass
class Catalogue:
    """Names as clients use them. `name` is the model's, of a local one the last part of its path.

    vllm: what samples, with its guide; None: the policy's model, by the transformers engine, with all of the guides.
    """

    policy: Policy
    guides: Mapping[str, ValueGuide | VLLMGuide] = field(default_factory=dict)
    rerankers: Mapping[str, Reranker] = field(default_factory=dict)
    slots: int = 64
    limits: Limits = field(default_factory=Limits)
    vllm: VLLMEngine | None = None

    def __post_init__(self) -> None:
        path = Path(self.policy.name).expanduser()
        self.name = path.name if path.exists() else self.policy.name
        guides = {name: guide for name, guide in self.guides.items() if isinstance(guide, ValueGuide)}
        self.engine = self.vllm or TransformersEngine(
            self.policy.model,
            self.policy.tokenizer,
            fingerprint=self.policy.fingerprint,
            slots=self.slots,
            guide=Guides(guides) if guides else None,
        )

    @classmethod
    def load(
        cls,
        policy: Policy,
        guides: Mapping[str, str],
        probes: Mapping[str, str],
        guidance: Guidance | None = None,
        slots: int = 64,
        limits: Limits | None = None,
    ) -> "Catalogue":
        """guides, probes: name -> folder. Errors: UserError for one that is damaged or was trained for another policy."""
        return cls(
            policy,
            {name: load_guide(folder, policy, guidance) for name, folder in guides.items()},
            {
                name: Reranker(policy, Probe.from_pretrained(folder, policy.fingerprint).to(policy.model.device))
                for name, folder in probes.items()
            },
            slots,
            limits or Limits(),
        )

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(404, f"model: there is no {name!r} here, only {self.name!r}", "model", "model_not_found")

    def guide_name(self, name: str | None, field: str) -> str:
        """field: of the request, `guidance.guide` or `rerank.guide`, for errors."""
        return _named("guide", name, self.guides, field)

    def probe_name(self, name: str | None, field: str) -> str:
        return _named("probe", name, self.rerankers, field)


def _named(kind: str, name: str | None, known: Mapping[str, object], field: str) -> str:
    if not known:
        raise ApiError(400, f"{field}: this server has none; start it with --{kind} DIR", field, f"no_{kind}")
    if name is None:
        if len(known) > 1:
            raise ApiError(400, f"{field}: missing; it must be one of {', '.join(known)}", field)
        return next(iter(known))
    if name not in known:
        raise ApiError(
            404,
            f"{field}: there is no {name!r} here{nearest(name, known)}; one of {', '.join(known)}",
            field,
            f"{kind}_not_found",
        )
    return name


def named_folders(field: str, options: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR`, whose name is then that of the folder. Errors: UserError for a name that is taken or no name."""
    folders: dict[str, str] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not (equals and NAME.fullmatch(name)):
            name, folder = Path(option).name, option
        if not NAME.fullmatch(name):
            raise UserError(f"{field}: {name!r} is no name (letters, digits, dots, dashes); give NAME=DIR")
        if name in folders:
            raise UserError(f"{field}: {name} names two folders, {folders[name]} and {folder}; give NAME=DIR")
        folders[name] = folder
    return folders
