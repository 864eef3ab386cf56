"""The engine on a Ray cluster: one of vLLM's on every free GPU of every machine, or, without GPUs, one on every machine.

Completions are what `VLLMEngine` gives, log-probabilities and guidance included, which Ray Data's own processor of batches does
not tell; and that one wants another version of vLLM.
"""

import logging
import os
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.decoding.vllm import VLLMGuide
from posttrain.errors import UserError
from posttrain.rollouts.engine import Completion, Request, check_request
from posttrain.rollouts.vllm import Precision, VLLMEngine, check_law

PASSED_ON = ("OMP_NUM_THREADS", "VLLM_", "HF_HUB_OFFLINE")  # of this process's environment, to those on other machines
KEPT_BACK = ("KEY", "VLLM_HOST_IP")  # Ray shows what it passes on; an address is one machine's
PATIENCE = 300.0  # seconds for Ray to place a replica and to start its process, before its model is read
CLOSING = 30.0  # seconds for a replica to give its memory back
DIED = "engine: a process of Ray's has died ({}); what is finished is kept, --resume goes on"


class RayEngine:
    """An `Engine` that divides requests among replicas. Close it, or use it in a `with`.

    folder, slots, dtype, guide: as of `VLLMEngine`, of every replica; all machines must see the folders. The cluster is the one
    that this process has joined, else that of RAY_ADDRESS, else this machine for as long as the engine lives; GPUs that other
    work holds at the start are left to it. What an abandoned iterator has begun is finished before what is asked next.
    Errors: UserError naming `engine` where Ray is not installed, cannot be reached, has no room, or loses a replica; naming
    `model` where machines have different ones; as `VLLMEngine`.
    """

    def __init__(
        self, folder: Path, *, slots: int = 64, dtype: Precision = "auto", guide: VLLMGuide | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                f"engine: ray cannot be imported ({error}); pip install 'posttrain[ray]', or use --engine vllm"
            ) from None
        folder = folder.absolute()  # the replicas' processes begin elsewhere
        guide = guide and replace(guide, folder=guide.folder.absolute())
        self._replicas: list[Any] = []
        self._own = not ray.is_initialized()
        if self._own:
            _join()
        try:
            self._replicas = [ray.remote(_Replica).options(**share).remote() for share in _shares()]
            placed = [replica.__ray_ready__.remote() for replica in self._replicas]
            ready, pending = ray.wait(placed, num_returns=len(placed), timeout=PATIENCE)
            if pending:
                raise UserError(
                    f"engine: Ray has room for {len(ready)} of {len(placed)} replicas now; other work holds the rest, "
                    "or their processes do not start"
                )
            started = [replica.start.remote(folder, slots, dtype, guide) for replica in self._replicas]
            self.fingerprint, self.context, self.settings = alike([_got(one) for one in started])
        except BaseException:
            self.close(patience=0)
            raise

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for a request that cannot fit, before any generation; `DIED`."""
        waiting, count = list(requests), len(self._replicas)
        # Neighbours stay together: the samples of a prompt share what is cached of it.
        parts = [waiting[len(waiting) * i // count : len(waiting) * (i + 1) // count] for i in range(count)]
        given = list(zip(self._replicas, parts, strict=True))
        for checked in [replica.check.remote(part) for replica, part in given]:
            _got(checked)
        return self._run(given)

    def check(self, request: Request) -> None:
        """Errors: UserError for a request that no replica can fulfil; each says itself what else it cannot."""
        check_request(request, self.context)
        check_law(request.sampling)

    def _run(self, given: Sequence[tuple[Any, Sequence[Request]]]) -> Iterator[Completion]:
        import ray

        streams: list[Any] = [replica.generate.options(num_returns="streaming").remote(part) for replica, part in given]
        while streams:
            ready: list[Any] = ray.wait(streams)[0]
            for stream in ready:
                try:
                    one: Any = next(stream)
                except StopIteration:
                    streams.remove(stream)
                else:
                    yield _got(one)

    def close(self, patience: float = CLOSING) -> None:
        """Ends the replicas, those still at work too after `patience` seconds, and the cluster where it is this engine's own."""
        import ray

        if self._replicas and patience:
            closing = [replica.close.remote() for replica in self._replicas]
            ray.wait(closing, num_returns=len(closing), timeout=patience)
        for replica in self._replicas:
            ray.kill(replica)
        if self._own:
            ray.shutdown()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(patience=0 if error else CLOSING)


class _Replica:
    """In a process of its own."""

    def start(
        self, folder: Path, slots: int, dtype: Precision, guide: VLLMGuide | None
    ) -> tuple[str, int, dict[str, Any]]:
        self.engine = VLLMEngine(folder, slots=slots, dtype=dtype, guide=guide)
        return self.engine.fingerprint, self.engine.context, {**self.engine.settings, "engine": "ray"}

    def check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.check(request)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for one in self.engine.generate(requests):  # noqa: UP028 - Ray sends values into it, which lists would not take
            yield one

    def close(self) -> None:
        self.engine.close()


def alike(reports: Sequence[tuple[str, int, dict[str, Any]]]) -> tuple[str, int, dict[str, Any]]:
    """The one (fingerprint, context, settings) of all replicas. Errors: UserError naming `model`, or `engine`."""
    first = reports[0]
    for other in reports[1:]:
        if other[0] != first[0]:
            raise UserError(f"model: machines of the cluster have different ones: {first[0]} and {other[0]}")
        if other != first:
            raise UserError(f"engine: machines of the cluster sample differently: {first[1:]} and {other[1:]}")
    return first


def _shares() -> list[dict[str, Any]]:
    """What each replica is given: a GPU that is free, or, of a cluster without, all processors of a machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.cluster_resources().get("GPU"):
        shares: list[dict[str, Any]] = [{"num_gpus": 1}] * int(ray.available_resources().get("GPU", 0))
    else:
        shares = [
            {
                "num_cpus": node["Resources"]["CPU"],
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            }
            for node in ray.nodes()
            if node["Alive"] and "CPU" in node["Resources"]
        ]
    if not shares:
        raise UserError("engine: the Ray cluster has no free GPU, nor, without GPUs, a machine with processors")
    return shares


def _join() -> None:
    import ray

    passed = {
        name: os.environ[name] for name in os.environ if name.startswith(PASSED_ON) and not name.endswith(KEPT_BACK)
    }
    address = os.environ.get("RAY_ADDRESS", "local")
    host, _, port = address.rpartition(":")
    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own there, and leaves it
    try:
        if port.isdigit():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address,
            include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": passed},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"engine: no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _got(reference: Any) -> Any:
    """Errors: what was raised there; UserError where the process has died."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(DIED.format(type(error).__name__)) from None
