"""Value-based post-training of language models: one problem, max E[R] - beta * KL(pi || pi_ref), solved in four places."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.decoding.guided_model import GuidedModel

__version__ = "0.1.0"


def load_guided(folder: str | Path, device: str | None = None, dtype: str | None = None) -> "GuidedModel":
    """A folder of `posttrain export` as an object with the `generate` of a transformers model, with guidance on."""
    from posttrain.decoding import guided_model  # here: `import posttrain` stays light

    return guided_model.load_guided(folder, device, dtype)
