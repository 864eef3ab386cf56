"""The engine on vLLM, in this process: paged caches, prefix caching across the samples of a prompt, log-probabilities under
the law that was really sampled from.

Same weights and seeds give the same law, and equal rows only where batches are composed alike: vLLM's kernels round by batch.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

from posttrain.decoding.vllm import (
    BETA,
    CANDIDATES,
    EXPLAIN,
    RECORD,
    SCORED,
    WORKER,
    VLLMGuide,
    compose,
    processors,
    register,
)
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer, model_fingerprint
from posttrain.rollouts.engine import Candidate, Completion, GuidedStep, Request, Sampling, TopLogprobs, check_request

MEMORY_SHARE = 0.85  # of a GPU, for weights and cache together
Precision = Literal["auto", "float32", "bfloat16"]
COLD, HOT = 0.01, 2.0  # vLLM samples at 0.01 where it is asked for less, and refuses more than 2
CPU_CACHE_GIB = "1"  # VLLM_CPU_KVCACHE_SPACE, unless the user says so: vLLM's own default is a share of all memory


class VLLMEngine:
    """An `Engine` on vLLM's own scheduler. Close it, or use it in a `with`: vLLM keeps threads and a process group.

    folder: a transformers folder (`posttrain.models.load.model_folder`); slots: requests in the running batch; dtype:
    `auto` is the checkpoint's own; context: at most so many tokens, None: as many as the model (and its guide) has;
    guide: what requests with a `beta` are guided by; others stand beside them as they are; options: of vLLM's own command
    line, which have the last word.
    Errors: UserError naming `engine` where vLLM is not installed or does not start with this model; as `compose`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slots: int = 64,
        dtype: Precision = "auto",
        context: int | None = None,
        guide: VLLMGuide | None = None,
        options: Sequence[str] = (),
    ) -> None:
        if slots < 1:
            raise UserError(f"slots: must be at least 1, got {slots}")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UserError(
                f"engine: vllm cannot be imported ({error}); pip install 'posttrain[vllm]', or use --engine transformers"
            ) from None
        self.guide = guide
        self._scratch = tempfile.TemporaryDirectory(prefix="posttrain-") if guide else None
        served = folder
        if self._scratch and guide:
            register()
            served = Path(self._scratch.name, "guided")
            compose(folder, guide, served)
            if context is None and guide.context is not None:
                context = min(guide.context, load_tokenizer(str(folder)).context)
        try:
            self.llm = LLM(
                str(served),
                **{
                    "dtype": dtype,
                    "max_model_len": context,
                    "max_num_seqs": slots,
                    "gpu_memory_utilization": MEMORY_SHARE,
                    "enable_prefix_caching": True,
                    # A part of a prompt draws a token that is thrown away; on CPU vLLM cannot take back what that does to a
                    # seed.
                    "enable_chunked_prefill": False if current_platform.is_cpu() else None,
                    "enforce_eager": dtype == "float32",  # compiled kernels fuse, and round, in another order
                    "logprobs_mode": "processed_logprobs",
                    "logits_processors": processors() if guide else None,
                    "worker_extension_cls": WORKER if guide else "",
                    "trust_remote_code": False,
                    **_given(options),
                },
            )
        except (ValueError, RuntimeError, OSError) as error:  # whatever vLLM finds wrong with a model or a machine
            raise UserError(
                f"engine: vllm does not start with {folder}: {str(error).strip().splitlines()[0]}"
            ) from None
        self.fingerprint = model_fingerprint(folder)
        self.context: int = self.llm.llm_engine.model_config.max_model_len
        self.vocab: int = self.llm.llm_engine.model_config.get_vocab_size()
        self.slots = slots
        self._calls = 0
        self.batches: WeakValueDictionary[str, Batch] = WeakValueDictionary()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its completions, besides the weights and the request."""
        from vllm import __version__

        config: Any = self.llm.llm_engine.vllm_config
        return {
            "engine": "vllm",
            "vllm": __version__,
            "slots": self.slots,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": config.device_config.device.type,
            **({"guidance": self.guide.settings} if self.guide else {}),
        }

    @property
    def alive(self) -> bool:
        """Whether vLLM's own process, where it has one, is still there."""
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        return resources is None or not resources.engine_dead

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for a request that cannot fit, before any generation."""
        waiting = list(requests)
        for request in waiting:
            self.check(request)
        return self._run(waiting)

    def check(self, request: Request) -> None:
        """Errors: UserError for a request that this engine cannot fulfil, or that vLLM refuses: in the middle of others it would
        end them all."""
        from vllm.exceptions import VLLMValidationError

        check_request(request, self.context)
        check_law(request.sampling)
        most = self.llm.llm_engine.model_config.max_logprobs
        if 0 <= most < request.top_logprobs:
            raise UserError(f"top_logprobs: this engine tells at most {most}, got {request.top_logprobs}")
        if any(not 0 <= token < self.vocab for token in request.sampling.stop_ids):
            raise UserError(
                f"stop_ids: the model's vocabulary has {self.vocab} tokens, got {request.sampling.stop_ids}"
            )
        try:
            parameters(request, "")
        except VLLMValidationError as error:
            raise UserError(f"{error.parameter or 'request'}: vLLM refuses it: {error.args[0]}") from None
        if request.beta is not None and self.guide is None:
            raise UserError("beta: this engine has no guide; give it a value model, or leave beta out")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab:
            raise UserError(
                f"prompt: request {request.id} has token ids outside the model's vocabulary of {self.vocab}"
            )

    def batch(self, stream: bool = False) -> "Batch":
        """stream: its rows grow token by token."""
        self._calls += 1
        return Batch(self, self._calls, stream)

    def _run(self, requests: list[Request]) -> Iterator[Completion]:
        batch = self.batch()
        try:
            batch.add(requests)
            while batch.rows:
                yield from batch.step()
        finally:
            batch.close()

    def account(self, name: str, ids: Sequence[int] = (), explain: bool = False) -> Any:
        """What the model recorded of a guided request (`GuidedLM.account`), which it then forgets."""
        return self.llm.collective_rpc("guidance_account", args=(name, list(ids), explain))[0]

    def sync_weights(self, source: Any) -> None:
        """New weights of the same architecture into the running engine; what the cache holds of the old ones is dropped, and the
        guide stays what it is.

        source: a transformers folder, or a model (written to a scratch folder: vLLM reads checkpoints).
        """
        if self.guide and self.guide.reads_policy:
            raise UserError(
                "guide: its shared head reads the states of the policy it was trained for; new weights have others"
            )
        if isinstance(source, (str, Path)):
            folder = Path(source)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.llm.apply_model(repack_tied_head)
            self.llm.reset_prefix_cache()
            self.fingerprint = model_fingerprint(folder)
            return
        with tempfile.TemporaryDirectory() as scratch:
            source.save_pretrained(scratch)
            self.sync_weights(scratch)

    def close(self) -> None:
        """Stops the engine and gives its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        if self._scratch:
            self._scratch.cleanup()

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_for_vllm(
    engine: str = "vllm", *, device: str | None = None, threads: int | None = None, dtype: str | None
) -> None:
    """Errors: UserError for what only the transformers engine does."""
    for name, value, instead in (
        ("device", device, "it takes the one it was built for; CUDA_VISIBLE_DEVICES chooses among GPUs"),
        ("threads", threads, "set VLLM_CPU_OMP_THREADS_BIND or OMP_NUM_THREADS"),
    ):
        if value is not None:
            raise UserError(f"--{name}: not with --engine {engine}; {instead}")
    if dtype not in (None, *get_args(Precision)):
        raise UserError(f"dtype: must be float32 or bfloat16, got {dtype!r}")


def check_law(sampling: Sampling) -> None:
    """Errors: UserError naming a temperature at which vLLM would sample from another law, or not at all."""
    if sampling.temperature > HOT or 0 < sampling.temperature < COLD:
        raise UserError(
            f"temperature: vLLM samples at 0 (greedy) or from {COLD} to {HOT}, got {sampling.temperature}; the transformers "
            "engine takes any"
        )


def _given(words: Sequence[str]) -> dict[str, Any]:
    """Options of vLLM's command line, as `vllm.LLM` takes them: those that are said, also where they say vLLM's own default."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm's options"))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(list(words)))


def repack_tied_head(model: Any) -> None:
    """A checkpoint has no weights for a head that is tied to the embedding, so that a reload leaves it the packed copy of the
    old ones that vLLM's CPU kernels read: silently another policy."""
    model = getattr(model, "policy", model)  # of a guided one
    head, config = getattr(model, "lm_head", None), model.config
    if head is not None and getattr(config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def parameters(request: Request, name: str, stream: bool = False) -> Any:
    """vLLM's words for a request's law. A request with stop ids of its own ends at those and at no others."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    guidance = {BETA: request.beta, CANDIDATES: request.candidates, RECORD: name, EXPLAIN: request.explain}
    if isinstance(request, ValueRequest):
        guidance[SCORED] = request.token
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=bool(sampling.stop_ids),
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        logprobs=request.top_logprobs,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        extra_args=None if request.beta is None else guidance,
    )


@dataclass(frozen=True)
class ValueRequest(Request):
    """Asks what the guide's value model expects after one more token, whatever is sampled: the value of the only step's first
    candidate."""

    token: int = 0

    @classmethod
    def of(cls, id: int, prompt: Sequence[int], completion: Sequence[int]) -> "ValueRequest":
        """The value of a completion at its last token, as `decoding.reward_model` reads it; what stands before that token is
        in vLLM's cache where it was sampled a moment ago."""
        *before, last = completion
        law = Sampling(temperature=0, max_tokens=1)
        return cls(id, (*prompt, *before), law, beta=math.inf, explain=True, token=last)


class Row:
    """A request that vLLM has, and what came of it so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[TopLogprobs] = []

    def take(self, output: Any) -> None:
        """output: of vLLM, with tokens that are new."""
        for token, step in zip(output.token_ids, output.logprobs, strict=True):
            self.ids.append(token)
            self.logprobs.append(step[token].logprob)
            if self.request.top_logprobs:
                self.tops.append(_best(step, self.request.top_logprobs))

    def completion(self, output: Any, account: Any) -> Completion:
        """output: the last one; account: of a guided request."""
        kl, reference, steps = account or (0.0, sum(self.logprobs), ())
        return Completion(
            self.request.id,
            tuple(self.ids),
            tuple(self.logprobs),
            "stop" if output.finish_reason == "stop" else "length",
            output.stop_reason if isinstance(output.stop_reason, str) else None,
            kl=kl,
            log_ratio=sum(self.logprobs) - reference,
            top_logprobs=tuple(self.tops),
            steps=tuple(GuidedStep(own, tuple(Candidate(*one) for one in candidates)) for own, candidates in steps),
        )


def _best(step: Mapping[int, Any], count: int) -> TopLogprobs:
    """Of a step's most likely tokens and the sampled one."""
    told = sorted(((token, one.logprob) for token, one in step.items()), key=lambda pair: -pair[1])
    return tuple((token, logprob) for token, logprob in told[:count] if logprob > -math.inf)


class Batch:
    """Requests in vLLM's hands, as the transformers engine's batch has them in its own; vLLM itself may let some of them wait.

    number: sets its requests apart from those of an earlier batch, which may still be on their way out.
    """

    def __init__(self, engine: VLLMEngine, number: int, stream: bool) -> None:
        self.engine = engine
        self.number = number
        self.stream = stream
        self._vllm: Any = engine.llm.llm_engine
        self._rows: dict[str, Row] = {}
        self._internal: dict[str, str] = {}  # vLLM's own names
        self._said: list[Any] = []  # of these rows by vLLM, and not yet looked at
        engine.batches[str(number)] = self

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def room(self) -> int:
        return max(0, self.engine.slots - len(self._rows))

    def add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            name = f"{self.number}-{request.id}"
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            self._internal[name] = self._vllm.add_request(name, prompt, parameters(request, name, self.stream))
            self._rows[name] = Row(request)

    def step(self) -> list[Completion]:
        """Whatever vLLM has to say next; the completions that it finished."""
        if not self._said:
            for said in self._vllm.step():  # of all batches
                if batch := self.engine.batches.get(said.request_id.partition("-")[0]):
                    batch._said.append(said)
        heard, self._said, finished = self._said, [], []
        for said in heard:
            name, row = said.request_id, self._rows.get(said.request_id)
            if row is None:
                continue
            output = said.outputs[0]
            row.take(output)
            if said.finished:
                del self._rows[name], self._internal[name]
                guided, explain = row.request.beta is not None, row.request.explain
                account = self.engine.account(name, row.ids, explain) if guided else None
                finished.append(row.completion(output, account))
        return finished

    def drop(self, ids: Collection[int]) -> None:
        """Takes requests out, unfinished; ids that are not here do no harm."""
        names = [name for name, row in self._rows.items() if row.request.id in ids]
        if not names:
            return
        self._vllm.abort_request([self._internal.pop(name) for name in names], internal=True)
        for name in names:
            if self._rows.pop(name).request.beta is not None:
                self.engine.account(name)

    def close(self) -> None:
        if self.engine.alive:
            self.drop([row.request.id for row in self._rows.values()])
