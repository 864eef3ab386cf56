"""What samples for a pipeline: our engine on transformers, vLLM in this process, servers of `posttrain rollout-service`, or vLLM on a
Ray cluster."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.vllm import VLLMGuide
from posttrain.errors import UserError
from posttrain.models.load import Policy, model_folder, set_aside
from posttrain.pipelines.ranks import one_process
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.ray import RayEngine
from posttrain.rollouts.service import ServiceEngine, service_urls
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.rollouts.vllm import Precision, VLLMEngine, check_for_vllm

EngineName = Literal["transformers", "vllm", "service", "ray"]
KEY = "POSTTRAIN_API_KEY"


@dataclass(frozen=True)
class Sampler:
    """urls: of the service's replicas; dtype: of vLLM, None: the checkpoint's own. own: the service is this
    run's own, and is given the policy and the guide that it lacks; else it must have them.

    Errors: UserError naming `urls` or `dtype`.
    """

    engine: EngineName = "transformers"
    urls: tuple[str, ...] = ()
    dtype: str | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if self.engine == "service":
            service_urls(self.urls, "urls")
        elif self.urls:
            raise UserError("urls: they are the service's; with them goes engine: service")
        if self.engine in ("vllm", "ray"):
            check_for_vllm(self.engine, dtype=self.dtype)
            one_process("its engine has processes of its own; several are served by engine: service")

    @contextmanager
    def open(self, policy: Policy, slots: int, guide: ValueGuide | VLLMGuide | None = None) -> Iterator[Engine]:
        """The policy's engine. Errors: as the engines."""
        if self.engine == "transformers":
            assert not isinstance(guide, VLLMGuide), "it guides in an engine of its own"
            yield TransformersEngine(
                policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=slots, guide=guide
            )
            return
        assert not isinstance(guide, ValueGuide), "it guides in the transformers engine"
        folder = model_folder(policy.name)
        if self.engine != "service":
            dtype = cast(Precision, self.dtype or "auto")
            start = VLLMEngine if self.engine == "vllm" else RayEngine
            # A GPU has room for one of the two.
            with (
                set_aside(policy) if policy.model else nullcontext(),
                start(folder, slots=slots, dtype=dtype, guide=guide) as engine,
            ):
                yield engine
            return
        expected = None if self.own else policy.fingerprint
        with ServiceEngine(self.urls, fingerprint=expected, slots=slots, key=os.environ.get(KEY)) as service:
            if guide:
                service.use_guide(guide, restart=self.own)
            if service.fingerprint != policy.fingerprint:
                service.sync_weights(folder)
            yield service
