"""Which checkpoint an interrupted training goes on from."""

import json
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"  # transformers writes it last
# What a step goes on from besides; without one of these transformers would go on all the same, to other weights.
PARTS = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
DEEPSPEED = "latest", ("global_step*", "rng_state*.pth")  # a file that it alone writes, and its parts


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. One without the trainer's state was interrupted; one that lacks another file, or has a
    damaged one, is passed over with a warning."""
    written = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}")]
    for checkpoint in sorted(written, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = _fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        warnings.warn(f"{fault}; going on from the checkpoint before it, or anew", stacklevel=2)
    return None


def _fault(checkpoint: Path) -> str | None:
    mark, parts = DEEPSPEED
    for part in parts if (checkpoint / mark).is_file() else PARTS:
        if not any(checkpoint.glob(part)):
            return f"{checkpoint} has no {part}"
    damaged = next((path for path in sorted(checkpoint.rglob("*")) if _is_damaged(path)), None)
    return f"{damaged} is damaged" if damaged else None


def _is_damaged(path: Path) -> bool:
    """Whether a file of a checkpoint is cut off or of another kind; its numbers are not looked at."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the sizes in the header with the file's
                return False
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return True
    return path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path)  # torch's; the index stands at the end
