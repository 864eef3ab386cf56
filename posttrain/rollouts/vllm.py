"""The engine on vLLM, in this process: paged caches, prefix caching across the samples of a prompt, log-probabilities under
the law that was really sampled from.

Same weights and seeds give the same law, and equal rows only where batches are composed alike: vLLM's kernels round by batch.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from posttrain.decoding.vllm import BETA, CANDIDATES, RECORD, VLLMGuide, compose, processors, register
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer, model_fingerprint
from posttrain.rollouts.engine import Completion, Request, check_request

MEMORY_SHARE = 0.85  # of a GPU, for weights and cache together
Precision = Literal["auto", "float32", "bfloat16"]
CPU_CACHE_GIB = "1"  # VLLM_CPU_KVCACHE_SPACE, unless the user says so: vLLM's own default is a share of all memory


class VLLMEngine:
    """An `Engine` on vLLM's own scheduler. Close it, or use it in a `with`: vLLM keeps threads and a process group.

    folder: a transformers folder (`posttrain.models.load.model_folder`); slots: requests in the running batch; dtype:
    `auto` is the checkpoint's own; context: at most so many tokens, None: as many as the model (and its guide) has;
    guide: what requests with a `beta` are guided by; others stand beside them as they are.
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
                dtype=dtype,
                max_model_len=context,
                max_num_seqs=slots,
                gpu_memory_utilization=MEMORY_SHARE,
                enable_prefix_caching=True,
                # A part of a prompt draws a token that is thrown away; on CPU vLLM cannot take back what that does to a seed.
                enable_chunked_prefill=False if current_platform.is_cpu() else None,
                enforce_eager=dtype == "float32",  # compiled kernels fuse, and round, in another order
                logprobs_mode="processed_logprobs",
                logits_processors=processors() if guide else None,
                trust_remote_code=False,
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

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for a request that cannot fit, before any generation."""
        waiting = list(requests)
        for request in waiting:
            check_request(request, self.context)
            if request.beta is not None and self.guide is None:
                raise UserError("beta: this engine has no guide; give it a value model, or leave beta out")
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab:
                raise UserError(
                    f"prompt: request {request.id} has token ids outside the model's vocabulary of {self.vocab}"
                )
        return self._run(waiting)

    def _run(self, requests: list[Request]) -> Iterator[Completion]:
        engine: Any = self.llm.llm_engine
        self._calls += 1  # ids of an abandoned call may still be on their way out
        running = {f"{self._calls}-{request.id}": request for request in requests}
        internal = [
            engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, parameters(request, name))
            for name, request in running.items()
        ]
        try:
            while running:
                for output in engine.step():
                    if output.finished and output.request_id in running:
                        request = running.pop(output.request_id)
                        yield self._account(output.request_id, request, completion(request, output.outputs[0]))
        finally:
            if running:
                engine.abort_request(internal, internal=True)
                for name, request in running.items():
                    if request.beta is not None:
                        self._record(name)

    def _account(self, name: str, request: Request, done: Completion) -> Completion:
        """With the KL and the log-ratio of a guided request."""
        if request.beta is None:
            return done
        record = self._record(name)
        steps = [record[position] for position in range(len(done.ids))]
        ids = torch.stack([step.ids[row] for step, row in steps])
        reference = torch.stack([step.reference[row] for step, row in steps])
        hits = ids == torch.tensor(done.ids, device=ids.device).unsqueeze(-1)
        reference = reference.masked_fill(~hits, 0).sum()  # every sampled token was a candidate
        kl = torch.stack([step.kl[row] for step, row in steps]).sum()
        return replace(done, kl=float(kl), log_ratio=sum(done.logprobs) - float(reference))

    def _record(self, name: str) -> dict[int, Any]:
        def taken(model: Any) -> dict[int, Any]:
            return model.records.pop(name, {})

        return self.llm.apply_model(taken)[0]

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


def check_for_vllm(*, device: str | None = None, threads: int | None = None, dtype: str | None) -> None:
    """Errors: UserError for what only the transformers engine does."""
    for name, value, instead in (
        ("device", device, "it takes the one it was built for; CUDA_VISIBLE_DEVICES chooses among GPUs"),
        ("threads", threads, "set VLLM_CPU_OMP_THREADS_BIND or OMP_NUM_THREADS"),
    ):
        if value is not None:
            raise UserError(f"--{name}: not with --engine vllm; {instead}")
    if dtype not in (None, *get_args(Precision)):
        raise UserError(f"dtype: must be float32 or bfloat16, got {dtype!r}")


def repack_tied_head(model: Any) -> None:
    """A checkpoint has no weights for a head that is tied to the embedding, so that a reload leaves it the packed copy of the
    old ones that vLLM's CPU kernels read: silently another policy."""
    model = getattr(model, "policy", model)  # of a guided one
    head, config = getattr(model, "lm_head", None), model.config
    if head is not None and getattr(config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def parameters(request: Request, name: str) -> Any:
    """vLLM's words for a request's law. A request with stop ids of its own ends at those and at no others."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    guidance = {BETA: request.beta, CANDIDATES: request.candidates, RECORD: name}
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
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if request.beta is None else guidance,
    )


def completion(request: Request, output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs, strict=True))
    stop = output.stop_reason if isinstance(output.stop_reason, str) else None
    return Completion(request.id, ids, logprobs, "stop" if output.finish_reason == "stop" else "length", stop)
