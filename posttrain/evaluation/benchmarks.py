"""A benchmark: which problems, asked how, sampled how. One YAML file of `evals/` each, or the user's own file.

A preset pins its data: `sha256` covers every problem with its gold answer, wherever the rows come from (the hub, a local copy) and
in whatever order; white space between words does not count.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.config import build, read_yaml
from posttrain.data.load import Row, load_rows
from posttrain.data.prompts import BOXED, template_for
from posttrain.errors import UserError, nearest
from posttrain.evaluation.metrics import MAX_SAMPLES
from posttrain.rewards.math import readable
from posttrain.rollouts.engine import Sampling

PRESETS = Path(__file__).with_name("evals")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Benchmark:
    """What is measured. Errors: UserError naming the field that is out of range."""

    name: str = field(metadata={"help": "of the run's sub-folder; the file's own name"})
    data: str = field(metadata={"help": "a data set or a file; see posttrain rollout --help"})
    title: str = field(default="", metadata={"help": "one line for reports"})
    split: str = field(default="test", metadata={"help": "of the data set"})
    sha256: str | None = field(default=None, metadata={"help": "of its problems and answers; null accepts any data"})
    prompt: str = field(default=BOXED, metadata={"help": "the user turn, with {problem} in it"})
    system: str | None = field(default=None, metadata={"help": "the system line"})
    chat: bool = field(default=True, metadata={"help": "false: no chat template, a text to be continued"})
    fewshot: str | None = field(default=None, metadata={"help": "worked examples: a .jsonl file beside the YAML"})
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "texts that end a completion, beside the model's own end"}
    )
    n: int = field(default=4, metadata={"help": "samples per problem"})
    k: tuple[int, ...] = field(
        default=(), metadata={"help": "sizes of pass@k and maj@k in tables; default: powers of two up to n"}
    )
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy"})
    top_p: float = field(default=0.95, metadata={"help": "1 is off"})
    top_k: int = field(default=0, metadata={"help": "0 is off"})
    max_tokens: int = field(default=2048, metadata={"help": "per completion"})
    lm_eval: Literal["gsm8k_cot", "minerva_math500", "minerva_math"] | None = field(
        default=None, metadata={"help": "report this lm-eval task's metrics too"}
    )

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"name: {self.name!r} must be letters, digits, dots, dashes and underscores")
        template_for(self.data, self.prompt)
        self.sampling(0)
        if not 1 <= self.n <= MAX_SAMPLES:
            raise UserError(f"n: must be between 1 and {MAX_SAMPLES}, got {self.n}")
        if any(k < 1 for k in self.k):
            raise UserError(f"k: must be at least 1, got {min(self.k)}")
        if self.k and max(self.k) > self.n:
            raise UserError(
                f"n: {self.n} samples per problem cannot give {self.name} pass@{max(self.k)}; n must be at least k"
            )
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"n: temperature 0 gives {self.n} times the same sample; use n = 1 or a temperature above 0"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """The sizes k that tables show, n among them."""
        return tuple(sorted({*self.k, self.n})) if self.k else powers_of_two(self.n)

    def sampling(self, seed: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens, seed, stop=self.stop)


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n, and n."""
    return tuple(sorted({n, *(2**power for power in range(n.bit_length()))}))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find(word: str) -> Benchmark:
    """A preset by name, a YAML file like those, or a data file (zero-shot, boxed).

    Errors: UserError naming `benchmark`, with the nearest preset; or the file's field that is wrong.
    """
    path = Path(word).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet"):
        return Benchmark(path.stem, str(path), title=f"{path.name}, zero-shot, boxed")
    if path.suffix not in (".yaml", ".yml"):
        names = preset_names()
        if word not in names:
            raise UserError(
                f"benchmark: no benchmark {word!r}{nearest(word, names)}; one of {', '.join(names)}, or a .yaml or .jsonl file"
            )
        path = PRESETS / f"{word}.yaml"
    values = read_yaml(path)
    if isinstance(values.get("fewshot"), str):
        values["fewshot"] = str(path.parent / values["fewshot"])
    return build(Benchmark, {"name": path.stem, **values})


@dataclass(frozen=True)
class Problems:
    """A benchmark with the rows it asks, and the number and hash of all the rows that its data has."""

    benchmark: Benchmark
    rows: list[Row]
    exemplars: list[Row]
    data_rows: int
    sha256: str


def load_problems(benchmark: Benchmark, limit: int | None = None, any_data: bool = False) -> Problems:
    """The benchmark's rows; with a limit, the same pseudo-random subset for everybody, in the data's order.

    (The first rows of MATH are all algebra; and a smaller limit's rows are among a larger one's.)
    Errors: UserError naming `data` when it is not the data that the benchmark pins, `answer` when the grader cannot read a gold.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1, got {limit}")
    rows = load_rows(benchmark.data, benchmark.split)
    digest = data_sha256(rows)
    if benchmark.sha256 is not None and digest != benchmark.sha256 and not any_data:
        raise UserError(
            f"data: {benchmark.data}/{benchmark.split} is not the data of {benchmark.name}: its {len(rows)} problems and answers have "
            f"sha256 {digest[:16]}..., not {benchmark.sha256[:16]}...; --any-data evaluates it all the same"
        )
    data_rows = len(rows)
    if limit is not None:
        chosen = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:limit]
        kept = {row["id"] for row in chosen}
        rows = [row for row in rows if row["id"] in kept]
    for row in rows:
        if not readable(row["answer"]):
            raise UserError(
                f"answer: {benchmark.name} row {row['id']!r} has the gold {row['answer'][:80]!r}, which the grader cannot read"
            )
    exemplars = load_rows(benchmark.fewshot) if benchmark.fewshot else []
    for row in exemplars:
        if not isinstance(row.get("solution"), str):
            raise UserError(f"fewshot: {benchmark.fewshot} row {row['id']!r} has no text `solution`")
    return Problems(benchmark, rows, exemplars, data_rows, digest)


def load_all(
    words: Sequence[str], overrides: dict[str, Any], limit: int | None = None, any_data: bool = False
) -> list[Problems]:
    """Several benchmarks with the same overriding fields (those that are not None). Errors: as `find` and `load_problems`."""
    chosen: dict[str, Benchmark] = {}
    for word in words:
        benchmark = find(word)
        if benchmark.name in chosen:
            raise UserError(f"benchmark: {benchmark.name} is named twice")
        chosen[benchmark.name] = replace(
            benchmark, **{name: value for name, value in overrides.items() if value is not None}
        )
    return [load_problems(benchmark, limit, any_data) for benchmark in chosen.values()]


def data_sha256(rows: Sequence[Row]) -> str:
    """sha256 of problems and answers, independent of order, ids and white space."""
    lines = sorted(
        json.dumps([" ".join(row["problem"].split()), " ".join(row["answer"].split())], ensure_ascii=False)
        for row in rows
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
