"""Builds the embedded model from nothing: tokenizer, corpus, pre-training. About 15 minutes on two cores, less on a GPU.

    python recipes/tiny/build.py --out posttrain/assets/tiny

The corpus is written by careful writers, who mark the carry, and by hurried ones, who drop it; the longer the problem,
the more of them hurry. Independently, half of all writers restate every step twice for nothing (posttrain.data.arithmetic).
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.data import arithmetic

# Share of careful writers by level: pass@1 lands near one half and majority vote gains nothing.
CAREFUL_SHARE = {1: 0.62, 2: 0.24, 3: 0.20}
RESTATE_SHARE = 0.5
RESTATE_FROM, RESTATE_TO = 0.2, 0.45  # of the steps: terse chains first teach the arithmetic at half the price

SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 512
MICRO_BATCHES = 4  # little padding: chains differ sixfold in length


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; everything else is `<|unk|>`."""
    vocab = {token: i for i, token in enumerate(SPECIAL + [chr(c) for c in range(32, 127)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batch(
    encode: dict[str, int],
    pool: dict[int, list[arithmetic.Problem]],
    size: int,
    restate_share: float,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """A batch in MICRO_BATCHES parts of similar lengths: `(input_ids, labels)` [rows, time], right-padded, and the part's
    share of all labels. Only the completion and its end token carry a label.
    """
    examples = []
    for _ in range(size):
        level = rng.choice(arithmetic.LEVELS)
        problem = rng.choice(pool[level])
        chain = problem.chain(rng.random() < CAREFUL_SHARE[level], restate=rng.random() < restate_share)
        prompt = [encode["<|user|>"], *map(encode.__getitem__, problem.text), encode["<|assistant|>"]]
        examples.append((prompt, [*map(encode.__getitem__, chain), encode["<|end|>"]]))
    examples.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    total = sum(len(completion) for _, completion in examples)
    rows = size // MICRO_BATCHES
    for part in (examples[i : i + rows] for i in range(0, size, rows)):
        width = len(part[-1][0]) + len(part[-1][1])
        input_ids = torch.full((len(part), width), encode["<|pad|>"])
        labels = torch.full((len(part), width), -100)
        for row, (prompt, completion) in enumerate(part):
            length = len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : length] = torch.tensor(completion)
        yield input_ids, labels, sum(len(completion) for _, completion in part) / total


def train(steps: int, batch_size: int, seed: int, device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device)
    pool = {level: arithmetic.problems(30_000, "train", seed, (level,)) for level in arithmetic.LEVELS}
    # Muon learns the arithmetic in a fraction of the steps that AdamW alone needs.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0),
    )
    # Warm up over 30 steps, hold, decay linearly over the second half.
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 30) * min(1.0, max(0.02, 2 * (steps - step) / steps))
        )
        for optimizer in optimizers
    ]
    progress = tqdm(range(steps), desc="pre-training", mininterval=5)
    for step in progress:
        ramp = (step / steps - RESTATE_FROM) / (RESTATE_TO - RESTATE_FROM)
        restate_share = RESTATE_SHARE * min(1.0, max(0.0, ramp))
        total = 0.0
        for input_ids, labels, share in batch(tokenizer.get_vocab(), pool, batch_size, restate_share, rng):
            # Right padding under a causal mask needs no attention mask.
            loss = share * model(input_ids=input_ids.to(device), labels=labels.to(device)).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=f"{total:.4f}", refresh=False)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, tokenizer = train(args.steps, args.batch_size, args.seed, args.device)
    model.generation_config.bos_token_id = None
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
