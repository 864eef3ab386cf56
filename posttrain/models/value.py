"""The value model of Q#: the law of the return after a token, by one of three heads.

    v        value of the prefix *after* a token, from a backbone's state at that token: k queries for k candidates
    q        value of each candidate from the state of the prefix and the candidate's embedding: one query for all of them
    shared   the same head on the hidden states and embeddings of the policy itself: no second model

Without `atoms` the head gives one logit, of a Bernoulli return; with them, logits over the atoms (last dimension). Saved as
an ordinary Hugging Face folder that remembers the policy whose returns it learned (`reference`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from posttrain.errors import UserError, nearest
from posttrain.models.load import Policy, load_model, model_fingerprint, model_folder
from posttrain.objectives.qsharp import (
    bernoulli_log_tilt,
    categorical_log_tilt,
    check_atoms,
    expected_log_tilt,
    expected_return,
)
from posttrain.provenance import hash_files, hash_json

Head = Literal["v", "q", "shared"]
HEADS: tuple[Head, ...] = get_args(Head)


class ValueModelConfig(PreTrainedConfig):
    """head: one of HEADS; atoms: of the return, None for Bernoulli; backbone: the decoder's configuration (not of `shared`).

    hidden_size, embedding_size, vocab_size: of what the head reads; width: of the candidate head's hidden layer;
    reference: fingerprint of the policy whose roll-outs it learned from; vocabulary: hash of that policy's tokens.
    soft: the logit is V itself, as DQO learns it beside a policy: not the law of a return, and 0 after the end token.
    preferences: the logit is Q itself, in nats and of either sign, as IPL learns it from pairs: no law of a return.
    """

    model_type = "posttrain_value"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012  transformers' own name and form

    backbone: Any = None
    head: str = "v"
    atoms: list[float] | None = None
    hidden_size: int = 0
    embedding_size: int = 0
    vocab_size: int = 0
    width: int = 256
    reference: str | None = None
    vocabulary: str | None = None
    soft: bool = False
    preferences: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone, dict):
            self.backbone = CONFIG_MAPPING[self.backbone["model_type"]](**self.backbone)
        super().__post_init__(**kwargs)


class CandidateHead(nn.Module):
    """out(silu(P h + C e + b)) of a prefix state h and a candidate's embedding e, each scaled to root mean square 1.

    Parameters: (hidden + embedding + outputs) * width, for any number of candidates.
    """

    def __init__(self, config: ValueModelConfig, outputs: int) -> None:
        super().__init__()
        self.prefix = nn.Linear(config.hidden_size, config.width)
        self.candidate = nn.Linear(config.embedding_size, config.width, bias=False)
        self.out = nn.Linear(config.width, outputs)

    def project(self, embeddings: Tensor) -> Tensor:
        """C e of embeddings [..., e] -> [..., width]: the same for every prefix, so a decoder keeps it."""
        return self.candidate(F.rms_norm(embeddings.float(), embeddings.shape[-1:]))

    def forward(self, states: Tensor, projected: Tensor) -> Tensor:
        """states [..., d] and projected [..., width], which broadcast -> [..., outputs]."""
        return self.out(F.silu(self.prefix(F.rms_norm(states.float(), states.shape[-1:])) + projected))


class ValueModel(PreTrainedModel):
    config: ValueModelConfig
    config_class = ValueModelConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012

    def __init__(self, config: ValueModelConfig) -> None:
        super().__init__(config)
        self.backbone: Any = None if config.head == "shared" else AutoModel.from_config(config.backbone)
        outputs = len(config.atoms) if config.atoms else 1
        self.head: Any = (
            nn.Linear(config.hidden_size, outputs) if config.head == "v" else CandidateHead(config, outputs)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def atoms(self) -> Tensor | None:
        return torch.tensor(self.config.atoms) if self.config.atoms else None

    @property
    def least(self) -> float:
        """The least return that the model knows: its first atom, 0 of a Bernoulli return."""
        return float(self.atoms[0]) if self.atoms is not None else 0.0

    @property
    def span(self) -> float:
        """From the least return to the greatest: no log-tilt is above span / beta."""
        return float(self.atoms[-1]) - self.least if self.atoms is not None else 1.0

    def zero_head(self) -> None:
        """Every value equal: the guided policy starts as the reference."""
        output = self.head if self.config.head == "v" else self.head.out
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        trunk: Any = None,
    ) -> Tensor:
        """Value logits [batch, time(, atoms)]: entry t is the value after token t, given those before it.

        trunk: the policy's frozen decoder, of a `shared` head. With a candidate head entry 0 is not a value: no state
        stands before it. Of preferences [batch, time, 2]: Q of token t, and V before it.
        """
        shared = self.config.head == "shared"
        decoder = trunk if shared else self.backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not shared):
            states = decoder(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            embeddings = None if self.config.head == "v" else decoder.get_input_embeddings()(input_ids)
        if embeddings is None:
            return self.after(states)
        before = F.pad(states[:, :-1], (0, 0, 1, 0))
        projected = self.head.project(embeddings)
        values = self._squeeze(self.head(before, projected))
        if not self.config.preferences:
            return values
        # V is what the head says of no candidate: a second head would be left out of what guides.
        return torch.stack((values, self._squeeze(self.head(before, torch.zeros_like(projected)))), -1)

    def after(self, states: Tensor) -> Tensor:
        """V-type: logits [...(, atoms)] from the states [..., d] at the tokens whose values they are."""
        return self._squeeze(self.head(states.float()))

    def of_candidates(self, states: Tensor, projected: Tensor) -> Tensor:
        """Candidate head: logits [rows, k(, atoms)] from prefix states [rows, d] and `head.project`ed candidates [rows, k, width]."""
        return self._squeeze(self.head(states.unsqueeze(-2), projected))

    def log_tilt(self, value_logits: Tensor, beta: float | Tensor, law: str = "qsharp") -> Tensor:
        """Log-tilts [...] of value logits, relative to the least return there is (`least`): never below 0.

        law: `qsharp`, or `cd` for controlled decoding with the same model. Of preferences Q / beta in both, relative to 0:
        V would shift all candidates of a state alike.
        """
        if self.config.preferences:
            return value_logits / beta
        atoms = None if self.atoms is None else (self.atoms.double() - self.least).to(value_logits.device)
        if law == "cd":
            return expected_log_tilt(value_logits, beta, atoms)
        if atoms is None:
            return bernoulli_log_tilt(value_logits, beta)
        return categorical_log_tilt(value_logits, atoms, beta)

    def expected(self, value_logits: Tensor) -> Tensor:
        """E[R] of value logits [...(, atoms)] -> [...]; of preferences Q, as it is."""
        return value_logits if self.config.preferences else expected_return(value_logits, self.atoms)

    def _squeeze(self, logits: Tensor) -> Tensor:
        return logits if self.config.atoms else logits.squeeze(-1)


def vocabulary_hash(tokenizer: Any) -> str:
    return hash_json(sorted(tokenizer.get_vocab().items()))


def new_value_model(
    policy: Policy,
    head: Head = "v",
    base: str | None = None,
    layers: int | None = None,
    atoms: list[float] | None = None,
    zero_init: bool = True,
    width: int = 256,
    seed: int = 0,
    preferences: bool = False,
) -> ValueModel:
    """A value model for a policy, its backbone a copy of the language model `base` (default: of the policy itself), or of
    its first `layers` layers. preferences: it is to learn Q from pairs, not the law of a return.

    Errors: UserError for an unknown head, atoms that do not increase, a width below 1, a base of another vocabulary or with
    fewer layers, and preferences by a V-type head or over atoms.
    """
    if head not in HEADS:
        raise UserError(f"head: must be one of {', '.join(HEADS)}, got {head!r}{nearest(str(head), HEADS)}")
    _check_atoms(atoms)
    if preferences and (head == "v" or atoms):
        raise UserError(f"preferences: need a q or shared head without atoms, got {head}, atoms {atoms}")
    if width < 1:
        raise UserError(f"width: must be at least 1, got {width}")
    for name, given in (("base", base), ("layers", layers)):
        if head == "shared" and given is not None:
            raise UserError(f"{name}: a shared head reads the policy's own states; leave it out")
    source = policy if head == "shared" else _base(base or policy.name, str(policy.model.device))
    if source.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(
            f"base: {source.name} has another vocabulary than the policy {policy.name}; tokens must be the same"
        )
    decoder = source.model.get_decoder()
    rows = policy.model.get_input_embeddings().weight.shape[0]
    if decoder.get_input_embeddings().weight.shape[0] != rows:  # families pad the same tokens to different sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            source.model.resize_token_embeddings(rows, mean_resizing=False)
    config = ValueModelConfig(
        backbone=None if head == "shared" else _cut(decoder.config, layers),
        head=head,
        atoms=atoms,
        hidden_size=decoder.config.hidden_size,
        embedding_size=decoder.get_input_embeddings().embedding_dim,
        vocab_size=decoder.config.vocab_size,
        width=width,
        reference=policy.fingerprint,
        vocabulary=vocabulary_hash(policy.tokenizer),
        preferences=preferences,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = ValueModel(config).to(policy.model.device)
    if value.backbone is not None:
        kept = value.backbone.state_dict().keys()
        value.backbone.load_state_dict({name: weight for name, weight in decoder.state_dict().items() if name in kept})
    if zero_init:
        value.zero_head()
    return value


def average_heads(values: Sequence[ValueModel], weights: Tensor) -> ValueModel:
    """One shared head with the weighted mean of the value logits of several: exactly, their hidden layers side by side.

    weights: [len(values)], of sum 1. Errors: UserError for heads that have a backbone each, or different atoms.
    """
    configs = [value.config for value in values]
    if any(config.head != "shared" for config in configs):
        raise UserError("history: only shared heads read the same states; value models of their own cannot be averaged")
    if any(config.atoms != configs[0].atoms for config in configs):
        raise UserError("history: the value models have different atoms")
    averaged = ValueModel(
        ValueModelConfig(**{**configs[0].to_dict(), "width": sum(config.width for config in configs)})
    )
    heads = [value.head for value in values]
    scale = weights.to(heads[0].out.weight)
    averaged.head.load_state_dict(
        {
            **{
                name: torch.cat([head.state_dict()[name] for head in heads])
                for name in ("prefix.weight", "prefix.bias", "candidate.weight")
            },
            "out.weight": torch.cat([w * head.out.weight for w, head in zip(scale, heads, strict=True)], 1),
            "out.bias": scale @ torch.stack([head.out.bias for head in heads]),
        }
    )
    return averaged


def _base(name: str, device: str) -> Policy:
    try:
        return load_model(name, device, "float32")
    except UserError as error:
        raise UserError(f"base: {str(error).removeprefix('model: ')}") from None


def base_fingerprint(name: str) -> str:
    """Of the model that a value model starts from. Errors: UserError naming `base`."""
    try:
        return model_fingerprint(model_folder(name))
    except UserError as error:
        raise UserError(f"base: {str(error).removeprefix('model: ')}") from None


def check_layers(base: str, layers: int) -> None:
    """Without the weights. Errors: UserError naming `layers` where the model `base` has fewer, and `base`."""
    try:
        config = AutoConfig.from_pretrained(model_folder(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"base: {base} has no readable configuration: {str(error).splitlines()[0]}") from None
    _cut(config.get_text_config(), layers)


def _cut(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """A decoder's configuration with its first `layers` layers only."""
    if layers is None:
        return config
    if not 0 < layers <= config.num_hidden_layers:
        raise UserError(f"layers: must be between 1 and the base's {config.num_hidden_layers}, got {layers}")
    values = config.to_dict()
    values["num_hidden_layers"] = layers
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    return type(config).from_dict(values)


def load_critic(folder: str | Path, policy: Policy) -> ValueModel:
    """DQO's value model (`critic` in the folder of the policy that it trained), on the device of `policy`: that one, or any of
    its vocabulary. Errors: UserError naming `critic`, as `read_value_model`."""
    try:
        value = read_value_model(folder, policy, any_reference=True, dtype=policy.model.dtype, soft=True)
    except UserError as error:
        raise UserError(f"critic: {str(error).removeprefix('guide: ')}") from None
    return value.to(policy.model.device).eval().requires_grad_(False)


def load_value_model(
    folder: str | Path, policy: Policy, any_reference: bool = False, dtype: torch.dtype | None = None
) -> ValueModel:
    """A saved value model, ready to guide a policy, on its device. dtype: of the backbone, default the policy's.

    Errors: as `read_value_model`.
    """
    value = read_value_model(folder, policy, any_reference, dtype or policy.model.dtype)
    return value.to(policy.model.device).eval().requires_grad_(False)


def read_value_model(
    folder: str | Path,
    policy: Policy,
    any_reference: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
    soft: bool = False,
) -> ValueModel:
    """A saved value model, fit to guide a policy, whose own weights are not asked for.

    any_reference: also when it learned the returns of another policy of the same vocabulary. dtype: of the backbone, `auto`
    is the checkpoint's. soft: DQO's, which guides no tokens. Errors: UserError naming `guide` for a folder that holds none or
    is damaged, weights that are not finite, another vocabulary, another policy, and one that is or is not DQO's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"guide: {folder} has no config.json; give a folder that posttrain qsharp wrote")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config, _ = ValueModelConfig.get_config_dict(folder)
        if "model_type" not in config and {"dim", "feature"} <= config.keys():
            raise UserError(f"guide: {folder} holds a probe, not a value model; give it as a probe")
        if config.get("model_type") != ValueModelConfig.model_type:
            raise UserError(f"guide: {folder} holds a {config.get('model_type')!r}, not a value model")
        if config.get("head") not in HEADS:
            raise UserError(f"guide: {folder} has a head {config.get('head')!r}; known are {', '.join(HEADS)}")
        _check_atoms(config.get("atoms"), f"guide: {folder} has bad ")
        value, loaded = ValueModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # a damaged file breaks the loaders in whatever place the damage is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"guide: {folder} is damaged: {reason[:200]}") from None
    finally:
        logging.set_verbosity(verbosity)
    if loaded["missing_keys"]:
        raise UserError(f"guide: {folder} lacks weights, among them {min(loaded['missing_keys'])}")
    if not all(parameter.isfinite().all() for parameter in value.parameters()):
        raise UserError(f"guide: {folder} has weights that are not finite")
    if value.config.soft != soft:
        raise UserError(
            f"guide: {folder} holds DQO's value model, which ranks completions and scores steps, but guides no tokens"
            if value.config.soft
            else f"guide: {folder} holds a guide of posttrain qsharp, not DQO's value model"
        )
    if value.config.vocabulary != vocabulary_hash(policy.tokenizer):
        raise UserError(f"guide: {folder} was trained for another vocabulary than that of {policy.name}")
    if value.config.reference != policy.fingerprint and (value.config.head == "shared" or not any_reference):
        hint = (
            "it reads that policy's hidden states"
            if value.config.head == "shared"
            else "--any-reference uses it all the same"
        )
        raise UserError(
            f"guide: {folder} was trained for the policy {str(value.config.reference)[:16]}, this one is "
            f"{policy.fingerprint[:16]}; {hint}"
        )
    return value


def value_fingerprint(folder: str | Path) -> str:
    """sha256 over a saved value model's weights and configuration."""
    folder = Path(folder)
    return hash_files({*folder.glob("*.safetensors"), folder / "config.json"})


def _check_atoms(atoms: list[float] | None, where: str = "") -> None:
    if atoms is not None:
        try:
            check_atoms(torch.as_tensor(atoms, dtype=torch.float64))
        except (ValueError, TypeError):
            raise UserError(f"{where}atoms: must be at least two finite increasing numbers, got {atoms}") from None


AutoConfig.register(ValueModelConfig.model_type, ValueModelConfig)
AutoModel.register(ValueModelConfig, ValueModel)
