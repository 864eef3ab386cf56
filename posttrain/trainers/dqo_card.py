"""The card of a policy that DQO trained, and of the value model beside it."""

from pathlib import Path
from typing import Any

from posttrain.model_card import write_card

NOTE = """\
In `critic` is the value model: V(prefix), the reward that the policy's answer will have from there on, less the KL that it pays. It
ranks completions of the policy, and scores their steps:

```python
from posttrain.decoding.rerank import CriticReranker
from posttrain.models.load import load_model
from posttrain.models.value import load_critic

policy = load_model("{folder}")
reranker = CriticReranker(policy, load_critic("{folder}/critic", policy))
best, scores = reranker.choose(prompt_ids, completions, beta=0.0)  # token ids; beta 0 is the argmax
```"""


def write_dqo_card(folder: str | Path, base: str, settings: Any, **measured: Any) -> Path:
    """measured: `data`, `measured_on`, `figures` and `own`, as `write_card` takes them, where the policy was measured."""
    note = NOTE.format(folder=folder)
    return write_card(
        folder, "DQO", base, tags=["dqo"], paper="2410.09302", settings=settings, notes=[note], **measured
    )
