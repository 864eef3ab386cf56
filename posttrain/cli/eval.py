"""measure a model on math benchmarks, with intervals; re-grade, report, compare

    posttrain eval BENCH... --model M --out DIR    sample, grade and report: presets, .yaml files like them, .jsonl files
    posttrain eval report DIR [--compare DIR2]     the report again; DIR2 is the baseline of a paired comparison
    posttrain eval grade DIR                       grade what is sampled again, and report; nothing is sampled
    posttrain eval export DIR --to FOLDER          the samples as lm-eval's log
    posttrain eval overlap --train F --eval F      which evaluation problems stand in the training data too
    posttrain eval list                            the presets

Interrupted, the same command with --resume continues where it stopped; the report is the same, byte for byte.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from posttrain.cli.engines import ENGINES
from posttrain.errors import UserError
from posttrain.record import begin

NOT_GIVEN = argparse.SUPPRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="BENCH|VERB", help="what to measure, or one of the verbs above with its folder"
    )
    group = parser.add_argument_group("measuring (defaults: the benchmark's own)", argument_default=NOT_GIVEN)
    group.add_argument("--model", help="tiny, a folder, a .gguf file or a hub id")
    group.add_argument("--out", type=Path, help="folder of the evaluation; new or empty, unless --resume")
    group.add_argument("--n", type=int, help="samples per problem")
    group.add_argument(
        "--k", type=int, nargs="+", help="sizes of pass@k and maj@k in the tables; default: powers of two up to n"
    )
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float, help="1 is off")
    group.add_argument("--top-k", type=int, help="0 is off")
    group.add_argument("--max-tokens", type=int, help="per completion")
    group.add_argument(
        "--limit", type=int, help="only so many problems: a pseudo-random subset, the same for everybody"
    )
    group.add_argument("--any-data", action="store_true", help="measure on data that is not what the preset pins")
    group.add_argument("--seed", type=int, help="of the completions; default 0")
    group.add_argument(
        "--resume", action="store_true", help="continue an interrupted evaluation, or add benchmarks to one"
    )
    group.add_argument(
        "--until", choices=("render", "generate", "grade", "report"), help="stop after this stage; default: report"
    )
    group.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU, else float32")
    group.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    group.add_argument("--slots", type=int, help="completions sampled at the same time; default 64")
    group.add_argument(
        "--shard-prompts",
        type=int,
        help="problems per shard, the unit that --resume redoes; default: 256 completions' worth",
    )
    group.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    group.add_argument("--engine", choices=ENGINES, help="what samples; default: transformers")
    group.add_argument(
        "--url", nargs="+", help="of --engine service: where posttrain rollout-service runs, once or often"
    )
    group.add_argument(
        "--base-url", help="of any OpenAI-compatible endpoint, as in http://127.0.0.1:8000/v1, for --model NAME"
    )
    group.add_argument("--api-key-env", metavar="NAME", help="the environment variable with the endpoint's key")
    group.add_argument("--guide", metavar="DIR", help="a value model of posttrain qsharp, which tilts every token")
    group.add_argument(
        "--beta",
        metavar="B[,B...]",
        help="KL coefficient of the guide, default 0.1; several: Q# and CD (or IPL) at each, and accuracy against KL",
    )
    group.add_argument(
        "--lazy",
        action="store_true",
        help="of a V-type guide: value only the candidates that could be drawn; the same law, whose KL is then not known",
    )
    group.add_argument(
        "--any-reference", action="store_true", help="use a guide that was trained for another policy all the same"
    )
    group = parser.add_argument_group("report, export, overlap", argument_default=NOT_GIVEN)
    group.add_argument("--compare", type=Path, metavar="DIR2", help="report: the evaluation to compare with")
    group.add_argument("--to", type=Path, metavar="FOLDER", help="export: where the log goes")
    group.add_argument("--train", help="overlap: a .jsonl or .parquet file, or a data set as NAME/SPLIT")
    group.add_argument("--eval", help="overlap: likewise")


def run(args: argparse.Namespace) -> None:
    words, given = list(args.words), {name: value for name, value in vars(args).items() if name != "words"}
    if not words:
        raise UserError(
            "benchmark: name at least one, as in posttrain eval gsm8k --model M --out DIR; posttrain eval list shows them"
        )
    verb = words[0] if words[0] in VERBS else "BENCH"
    command, allowed, required = VERBS[verb]
    for name in given:
        if name not in allowed | required:
            raise UserError(f"{_option(name)}: not an option of posttrain eval {verb}")
    for name in sorted(required - set(given)):
        raise UserError(f"{_option(name)}: missing; see posttrain eval --help")
    command(words if verb == "BENCH" else words[1:], given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _measure(words: list[str], given: dict[str, Any]) -> None:
    import torch

    from posttrain.cli.tables import print_table
    from posttrain.decoding.guidance import Guidance
    from posttrain.decoding.guide import ValueGuide, load_guide
    from posttrain.decoding.vllm import load_vllm_guide
    from posttrain.evaluation.benchmarks import load_all
    from posttrain.evaluation.harness import Model, evaluate
    from posttrain.evaluation.sweep import COLUMNS, Law, rows, sweep
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.pipelines.engines import Sampler
    from posttrain.rollouts.chat import ChatEngine, Transcript
    from posttrain.rollouts.collect import check_folder
    from posttrain.rollouts.engine import check_lazy
    from posttrain.rollouts.service import check_for_service
    from posttrain.rollouts.transformers import TransformersEngine
    from posttrain.rollouts.vllm import check_for_vllm

    if given.get("threads", 1) < 1:
        raise UserError(f"threads: must be at least 1, got {given['threads']}")
    overrides = {name: given.get(name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens")}
    tasks = load_all(
        words,
        {**overrides, "k": tuple(given["k"]) if "k" in given else None},
        given.get("limit"),
        given.get("any_data", False),
    )
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    betas = _betas(given)
    lazy = given.get("lazy", False)
    if lazy and len(betas) > 1:
        raise UserError(
            "--lazy: a sweep over several betas shows accuracy against KL, which is then not known; leave it out"
        )
    for task in tasks if lazy else ():
        check_lazy(task.benchmark.sampling(0))
    if len(betas) > 1 and "until" in given:
        raise UserError("until: a sweep over several betas runs whole; leave it out")
    if given.get("engine") in ("vllm", "ray"):
        check_for_vllm(given["engine"], **{name: given.get(name) for name in ("device", "threads", "dtype")})
    if given.get("engine", "transformers") != "transformers" and len(betas) > 1:
        raise UserError(
            f"--beta: one with --engine {given['engine']}; a sweep over several is the transformers engine's"
        )
    key = _endpoint_key(given)
    fixed = {name: given.get(name) for name in ("device", "threads", "dtype")}
    check_for_service(given.get("url"), given.get("engine") == "service", **fixed)
    check_folder(given["out"], given.get("resume", False))
    out, options = given["out"], {name: given[name] for name in ("seed", "resume", "shard_prompts") if name in given}
    until, slots = given.get("until", "report"), given.get("slots", 64)
    begin(out, {**given, "benchmarks": [task.benchmark for task in tasks]})
    if "base_url" in given:
        for task in tasks:
            if not task.benchmark.chat:
                raise UserError(
                    f"base-url: {task.benchmark.name} has a plain text prompt, which a chat endpoint is not asked"
                )
        chat = ChatEngine(given["base_url"], given["model"], key=key, slots=slots)
        evaluate(tasks, Model(given["model"], chat, Transcript(), chat.settings), out, until=until, **options)
        if until == "report":
            _show(out)
        return
    if given.get("engine", "transformers") != "transformers":
        policy = load_tokenizer(given["model"])
        any_reference = given.get("any_reference", False)
        served = load_vllm_guide(given["guide"], policy, Guidance(lazy=lazy), any_reference) if betas else None
        sampler = Sampler(given["engine"], tuple(given.get("url", ())), given.get("dtype"))
        with sampler.open(policy, slots, served) as running:
            guided = (betas[0], served.name) if served else (None, None)
            measured = Model(policy.name, running, policy.tokenizer, running.settings, *guided)
            evaluate(tasks, measured, out, until=until, **options)
        if until == "report":
            _show(out)
        return
    policy = load_model(given["model"], given.get("device"), given.get("dtype"))

    def guide_by(law: Law) -> ValueGuide:
        wanted = Guidance(law="qsharp" if law == "ipl" else law, lazy=lazy)
        return load_guide(given["guide"], policy, wanted, given.get("any_reference", False))

    def model(law: Law | None, beta: float | None) -> Model:
        guide = guide_by(law) if law else None
        engine = TransformersEngine(
            policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=slots, guide=guide
        )
        return Model(policy.name, engine, policy.tokenizer, engine.settings, beta, guide.name if guide else None)

    if len(betas) > 1:
        laws: tuple[Law, ...] = ("ipl",) if guide_by("qsharp").value.config.preferences else ("qsharp", "cd")
        print_table(COLUMNS, rows(sweep(tasks, model, betas, out, laws=laws, **options)))
        print(f"report: {out / 'frontier.html'} (also .json), and one in every run's folder")
        return
    evaluate(tasks, model("qsharp", betas[0]) if betas else model(None, None), out, until=until, **options)
    if until == "report":
        _show(out)


def _endpoint_key(given: dict[str, Any]) -> str | None:
    """What a server over HTTP is sent."""
    if "base_url" not in given:
        if "api_key_env" in given:
            raise UserError("--api-key-env: it is the endpoint's; name one with --base-url URL")
        return os.environ.get("POSTTRAIN_API_KEY")
    for name in ("engine", "url", "guide", "device", "threads", "dtype"):
        if name in given:
            raise UserError(f"--{name}: not with --base-url; the endpoint decides that")
    variable = given.get("api_key_env")
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"--api-key-env: the environment has no {variable}")
    return os.environ[variable] if variable else None


def _betas(given: dict[str, Any]) -> list[float]:
    """Empty without a guide."""
    from posttrain.rollouts.engine import LEAST_BETA

    if "guide" not in given:
        for name in ("beta", "lazy", "any_reference"):
            if name in given:
                raise UserError(f"{_option(name)}: it is the guide's; name one with --guide DIR")
        return []
    try:
        betas = [float(beta) for beta in given.get("beta", "0.1").split(",")]
    except ValueError:
        raise UserError(f"--beta: must be numbers with commas between them, got {given['beta']!r}") from None
    if not all(LEAST_BETA <= beta < math.inf for beta in betas):
        raise UserError(f"--beta: must be at least {LEAST_BETA:g} and finite, got {given['beta']}")
    if len(set(betas)) < len(betas):
        raise UserError(f"--beta: names one twice, got {given['beta']}")
    return betas


def _report(words: list[str], given: dict[str, Any]) -> None:
    from posttrain.evaluation.harness_report import write_reports

    out = _folder(words)
    write_reports(out, given.get("compare"))
    _show(out)


def _grade(words: list[str], given: dict[str, Any]) -> None:
    from posttrain.evaluation.harness import regrade
    from posttrain.evaluation.harness_report import write_reports

    out = _folder(words)
    regrade(out, again=True)
    write_reports(out)
    _show(out)


def _export(words: list[str], given: dict[str, Any]) -> None:
    from posttrain.evaluation.lm_eval_export import export

    for path in export(_folder(words), given["to"]):
        print(path)


def _overlap(words: list[str], given: dict[str, Any]) -> None:
    from posttrain.cli.tables import print_table
    from posttrain.evaluation.overlap import find_overlap, load_texts

    found = find_overlap(load_texts(given["train"], "train"), load_texts(given["eval"], "eval"))
    print_table(("overlap", "problems"), [(name, str(count)) for name, count in found.counts().items()])
    print_table(
        ("problem", "13-grams shared", "exact", "shares most with"),
        [(hit.id, f"{100 * hit.share:.0f} %", "yes" if hit.exact else "no", hit.twin) for hit in found.hits],
    )


def _list(words: list[str], given: dict[str, Any]) -> None:
    from posttrain.cli.tables import print_table
    from posttrain.evaluation.benchmarks import find, preset_names

    rows = []
    for name in preset_names():
        preset = find(name)
        rows.append((name, preset.title, str(preset.n), f"{preset.temperature:g}", str(preset.max_tokens)))
    print_table(("benchmark", "what", "n", "temperature", "max tokens"), rows)


def _folder(words: list[str]) -> Path:
    if len(words) != 1:
        raise UserError(f"dir: give the folder of one evaluation, got {len(words)}")
    return Path(words[0])


def _show(out: Path) -> None:
    import json

    from posttrain.cli.tables import print_table
    from posttrain.evaluation.harness_report import (
        BUDGETS,
        COMPARED,
        budget_rows,
        compared,
        macro_line,
        overview,
        title_of,
    )

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    print(title_of(report))
    print_table(*overview(report))
    if "macro mean" in report:
        print(macro_line(report))
    if "comparison" in report:
        print_table(COMPARED, compared(report["comparison"]), keys=2)
        print("accuracy within b tokens:")
        print_table(BUDGETS, budget_rows(report["comparison"]), keys=2)
    for name, summary in report["benchmarks"].items():
        for warning in summary["warnings"]:
            print(f"{name}: {warning}")
    print(f"report: {out / 'report.html'} (also .md, .json)")


MEASURING = frozenset(
    "n k temperature top_p top_k max_tokens limit any_data seed resume until dtype device slots shard_prompts threads engine url "
    "base_url api_key_env guide beta lazy any_reference".split()
)
NOTHING: frozenset[str] = frozenset()
VERBS = {  # verb -> function, options that it may have, options that it must have
    "BENCH": (_measure, MEASURING, frozenset({"model", "out"})),
    "report": (_report, frozenset({"compare"}), NOTHING),
    "grade": (_grade, NOTHING, NOTHING),
    "export": (_export, NOTHING, frozenset({"to"})),
    "overlap": (_overlap, NOTHING, frozenset({"train", "eval"})),
    "list": (_list, NOTHING, NOTHING),
}
