"""A run's result as one folder to publish: the policy with adapters merged, and its value model and probe beside it.

DIR/                 the policy, an ordinary Hugging Face folder
DIR/value/           the value model of Q# or IPL (`posttrain.load_guided(DIR)` guides by it)
DIR/probe/           the Q-Probe
DIR/posttrain.json   how guidance is meant: beta, candidates; and what it was made of
DIR/README.md        the card: figures with intervals, and how to load each
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import record
from posttrain.config import read_yaml
from posttrain.decoding.guided_model import SETTINGS, VALUE
from posttrain.errors import UserError
from posttrain.evaluation.arms_file import read_arms
from posttrain.model_card import write_card
from posttrain.models.load import FINGERPRINTED, model_fingerprint, model_folder
from posttrain.models.probe import Probe
from posttrain.models.value import ValueModelConfig, value_fingerprint
from posttrain.pipelines.qsharp import guide_folder
from posttrain.provenance import hash_files, read_json, versions, write_json
from posttrain.rollouts.collect import check_folder

POLICY, PROBE, ADAPTER, RUN = "policy", "probe", "adapter", "run"
BESIDE = ("special_tokens_map.json", "added_tokens.json", "*.model", "*.safetensors.index.json")  # of a policy's files
SUMMARY = "summary.json"


@dataclass
class Found:
    """Folders, by what they hold, and what their runs say of them. figures: as a card takes them."""

    parts: dict[str, list[Path]] = field(default_factory=lambda: {POLICY: [], VALUE: [], PROBE: [], ADAPTER: []})
    methods: list[str] = field(default_factory=list)
    own_arms: list[str] = field(default_factory=list)  # patterns of the names of the arms that it is
    guidance: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: str | None = None
    data: str | None = None
    measured_on: str | None = None
    base: str | None = None


def export(sources: Sequence[str], out: Path) -> list[str]:
    """Writes `out`, new or empty; what is in it. sources: folders of runs, policies, adapters, value models or probes, or a
    model's name.

    Errors: UserError naming `source` for one that is none of these, two that contradict each other, or a value model or
    probe of another policy, and `out`.
    """
    check_folder(out, resume=False, way="delete it")
    found = Found()
    for source in sources:
        _find(source, found)
    policy = _one(found.parts[POLICY], model_fingerprint, "policies")
    value = _one(found.parts[VALUE], value_fingerprint, "value models")
    probe = _one(found.parts[PROBE], value_fingerprint, "probes")
    adapter = _one(found.parts[ADAPTER], _adapter_fingerprint, "adapters")
    if policy is None and adapter is None:
        raise UserError(
            f"source: none of {', '.join(sources)} is a policy; name it as well, such as `tiny` or a folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / out.name / "made"  # the card names the model by the folder above it
        folder.mkdir(parents=True)
        base = found.base or str(policy)
        if adapter is not None:
            base = _merge(adapter, folder)
        else:
            assert policy is not None
            for pattern in (*FINGERPRINTED, *BESIDE):
                for file in policy.glob(pattern):
                    if file.is_file():
                        shutil.copyfile(file, folder / file.name)
        fingerprint = model_fingerprint(folder)
        notes = []
        if value is not None:
            _check(value, read_json(value / "config.json", "source").get("reference"), fingerprint, "value model")
            _copy(value, folder / VALUE)
            learned, values = LEARNED[_of_preferences(value)]
            notes.append(GUIDED.replace("LEARNED", learned).replace("VALUES", values))
        if probe is not None:
            card = Probe.from_pretrained(probe).card
            _check(probe, card.policy, fingerprint, "probe")
            _copy(probe, folder / PROBE)
            notes.append(PROBED if card.hidden is None else PROBED_MLP)
        made = {"made_from": list(sources), "policy": fingerprint, "versions": versions()}
        write_json(folder / SETTINGS, {**(found.guidance if value is not None else {}), **made})
        text = write_card(
            folder,
            " and ".join(dict.fromkeys(found.methods)) or "post-training",
            base,
            data=found.data,
            measured_on=found.measured_on,
            figures=found.figures,
            own=found.own,
            notes=[_filled(note, out, probe) for note in notes],
        )
        text.write_text(text.read_text(encoding="utf-8").replace(str(folder), str(out)), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    return [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file()]


def _find(source: str, found: Found) -> None:
    path = Path(source).expanduser()
    if not path.is_dir():
        found.parts[POLICY].append(model_folder(source))
        return
    kind = _kind(path)
    if kind == RUN:
        _find_of_run(path, found)
    else:
        found.parts[kind].append(path)


def _kind(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return ADAPTER
    if not (folder / "config.json").is_file():
        if any((folder / name).is_file() for name in (record.CONFIG, record.STAGE)):
            return RUN
        raise UserError(
            f"source: {folder} holds neither a run ({record.CONFIG}) nor a policy, adapter, value model or probe (config.json)"
        )
    config = read_json(folder / "config.json", "source")
    if config.get("model_type") == ValueModelConfig.model_type:
        if config.get("soft"):
            raise UserError(f"source: {folder} is DQO's value model, which guides no tokens; name the policy beside it")
        return VALUE
    return PROBE if "model_type" not in config and "dim" in config else POLICY


def _find_of_run(folder: Path, found: Found) -> None:
    """Of a trained policy itself; of a value model or a probe also the policy that it is for."""
    before = {kind: len(paths) for kind, paths in found.parts.items()}
    stages = dict(_stages(folder))
    if not stages:
        _find_made(folder, _config(folder), found)
    for trained in (
        False,
        True,
    ):  # a pipeline's trained policies each begin at its base, what guides it belongs to the base
        if all(len(paths) == before[kind] for kind, paths in found.parts.items()):
            for stage, config in sorted(stages.items()):
                _find_made(stage, config, found, trained)
    if all(len(paths) == before[kind] for kind, paths in found.parts.items()):
        raise UserError(f"source: {folder} has made no policy, value model or probe; is it finished?")
    found.base = str(_config(folder)["model"])
    if len(found.parts[POLICY]) == before[POLICY]:
        found.parts[POLICY].append(model_folder(found.base))
    for measured in read_arms(folder):
        found.measured_on = measured.title
        found.figures |= {arm.title: arm.summary() for arm in measured.arms}
        own = re.compile(f"(.*/)?({'|'.join(found.own_arms)})")
        found.own = next((arm.title for arm in reversed(measured.arms) if own.fullmatch(arm.name)), found.own)


def _stages(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A pipeline's, and their configurations, but for those that it has set aside under their old fingerprints."""
    for path in folder.glob(f"*/{record.STAGE}"):
        if not record.is_set_aside(path.parent):
            yield path.parent, _config(path.parent)


def _config(folder: Path) -> dict[str, Any]:
    """Of a run, or of a pipeline's stage."""
    if (folder / record.STAGE).is_file():
        return dict(read_json(folder / record.STAGE, "source")["config"])
    if (folder / SUMMARY).is_file():  # finished: a later attempt may have been refused, and has left its configuration
        return dict(read_json(folder / SUMMARY, "source")["manifest"]["config"])
    return read_yaml(folder / record.CONFIG)


def _find_made(folder: Path, config: dict[str, Any], found: Found, trained: bool = True) -> None:
    """trained: policies too."""
    methods = len(found.methods)
    rounds = sorted(folder.glob("round-*/value/made_by.json"), key=lambda path: int(path.parents[1].name[6:]))
    if rounds:
        number = int(rounds[-1].parents[1].name[6:])
        found.parts[VALUE].append(guide_folder(folder, config.get("history", 1), number))
        preferences = _of_preferences(rounds[-1].parent)
        found.methods.append("IPL" if preferences else "Q#")
        found.own_arms.append(r"qsharp(_\d+)?")
        beta = {} if preferences else {"beta": config.get("beta")}  # IPL's runs have not used theirs
        found.guidance = {**beta, "guidance": config.get("guidance") or {}}
    if (folder / PROBE / "config.json").is_file():
        found.parts[PROBE].append(folder / PROBE)
        found.methods.append("Q-Probe")
        found.own_arms.append("qprobe")
    if trained and (folder / POLICY / "made_by.json").is_file():
        found.parts[POLICY].append(folder / POLICY)
        found.methods.append("DQO")
        found.own_arms.append("dqo")
    arms = [folder / str(name) for name in config.get("arms") or ()]
    made = [arm for arm in arms if (arm / "made_by.json").is_file()]
    if trained and made:
        arm = next((arm for arm in made if arm.name == "grpo_lambda"), made[-1])
        found.parts[POLICY].append(arm)
        found.methods.append("GRPO-lambda" if arm.name == "grpo_lambda" else "GRPO")
        found.own_arms.append(re.escape(arm.name))
    if len(found.methods) > methods:
        found.data = config.get("completions") or f"{config['data']}/{config['train_split']}"


def _one(folders: Sequence[Path], fingerprint: Any, plural: str) -> Path | None:
    """The folder, of several any if they hold the same."""
    distinct = {fingerprint(folder): folder for folder in folders}
    if len(distinct) > 1:
        raise UserError(
            f"source: these are {len(distinct)} {plural}: {', '.join(map(str, distinct.values()))}; name one"
        )
    return next(iter(distinct.values()), None)


def _of_preferences(value: Path) -> bool:
    return bool(read_json(value / "config.json", "source").get("preferences"))


def _adapter_fingerprint(folder: Path) -> str:
    return hash_files({*folder.glob("*.safetensors"), folder / "adapter_config.json"})


def _check(folder: Path, reference: str | None, fingerprint: str, what: str) -> None:
    if reference != fingerprint:
        raise UserError(
            f"source: the {what} in {folder} is for the policy {str(reference)[:16]}, the one to export is {fingerprint[:16]}; "
            "name its own"
        )


def _merge(adapter: Path, out: Path) -> str:
    """The adapter's base with the adapter in its weights; the base's name."""
    from peft import PeftConfig, PeftModel

    from posttrain.models.load import load_model

    base = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    policy = load_model(base, "cpu", "float32")
    merged = PeftModel.from_pretrained(policy.model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return base


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in _weights(source):
        shutil.copyfile(file, target / file.name)


def _weights(folder: Path) -> Iterator[Path]:
    yield folder / "config.json"
    yield from folder.glob("*.safetensors")
    yield from folder.glob("*.safetensors.index.json")


def _filled(note: str, out: Path, probe: Path | None) -> str:
    filled = note.replace("FOLDER", json.dumps(str(out))[1:-1])
    card = Probe.from_pretrained(probe).card if probe is not None else None
    if card is not None and card.feature is not None:
        pooled = "states[len(prompt) :].mean(0)" if card.feature.pooling == "mean" else "states[-1]"
        filled = filled.replace("LAYER", str(card.feature.layer)).replace("POOLED", pooled)
    return filled


GUIDED = """\
## With guidance

The value model in `value/` tilts every token towards completions that LEARNED;
`beta` is the KL coefficient, and `beta=float("inf")` the policy alone:

```python
import posttrain

guided = posttrain.load_guided("FOLDER")
chat = [{"role": "user", "content": "23+48-17=?"}]
inputs = guided.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = guided.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=128, do_sample=True, seed=0)
answer = guided.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```

The value model itself is a transformers model, whose forward gives VALUES:

```python
import posttrain.models.value  # tells transformers of its class
from transformers import AutoModel

value = AutoModel.from_pretrained("FOLDER/value")
```"""

LEARNED = {  # from preferences?
    False: (
        "come out right (Q#,\n[arXiv 2502.20548](https://arxiv.org/abs/2502.20548))",
        "value logits of every prefix",
    ),
    True: (
        "are preferred (IPL,\n[arXiv 2305.15363](https://arxiv.org/abs/2305.15363)), by values in nats of a preference",
        "Q of every token and V before it",
    ),
}

PROBED = """\
## Choosing one of several samples

The probe in `probe/` scores a completion by the policy's hidden states (Q-Probe,
[arXiv 2402.14688](https://arxiv.org/abs/2402.14688)); the best of k samples has the highest score:

```python
import torch
from safetensors.torch import load_file

probe = load_file("FOLDER/probe/model.safetensors")


def score(prompt, completion):  # token ids, the completion's without its end token
    with torch.no_grad():
        states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[LAYER][0].float()
    feature = (POOLED - probe["mean"]) / probe["std"]
    return float(feature @ probe["first.weight"][0] + probe["first.bias"][0])
```"""

PROBED_MLP = """\
## Choosing one of several samples

The probe in `probe/` scores a completion by the policy's hidden states (Q-Probe,
[arXiv 2402.14688](https://arxiv.org/abs/2402.14688)); the best of k samples has the highest score:

```python
from posttrain.decoding.rerank import Reranker
from posttrain.models.load import load_model
from posttrain.models.probe import Probe

reranker = Reranker(load_model("FOLDER"), Probe.from_pretrained("FOLDER/probe"))
```"""
