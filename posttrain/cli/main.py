"""The `posttrain` command: one sub-command per file of this folder."""

import argparse
import importlib
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TextIO

from posttrain import __version__
from posttrain.errors import Terminated, UserError, nearest, why_unwritten
from posttrain.pipelines.ranks import is_lost_peer, let_the_first_speak, part, rank
from posttrain.record import recording

PACKAGE = Path(__file__).parents[1]
LEAD = "Value-based post-training of language models: sample, grade, learn, guide, measure."
# name -> one-line help; the module posttrain.cli.<name>, with _ for -, holds add_arguments(parser) and run(args)
COMMANDS = {
    "rollout": "sample completions of a model, grade them, store them as a rollout table",
    "qprobe": "train a Q-Probe on a model's own samples and measure its re-ranking",
    "qsharp": "learn the law of the return, guide every token by it, measure what that buys",
    "dqo": "train a policy offline by soft actor-critic over tokens, and measure it",
    "grpo-lambda": "train a policy online with a length penalty gated by accuracy, and measure it",
    "pipeline": "several methods on one base, from one file: one table, one report",
    "eval": "measure a model on math benchmarks, with intervals; re-grade, report, compare",
    "report": "one page over any runs: their curves, arms, paired tests and completions",
    "export": "one folder to publish: policy, value model and probe, with a card and how to load each",
    "serve": "serve a model over HTTP, with guidance and re-ranking, to OpenAI's clients",
    "rollout-service": "serve a policy to rollouts: vLLM's own server, which says what it serves and takes new weights",
    "grade": "is this answer right? and why",
    "recipe": "what there is to run, and whether it fits on these GPUs",
    "doctor": "is everything here that a run needs? and what mends it",
}


class _Parser(argparse.ArgumentParser):
    """argparse that reports like the rest of the product: one line, exit code 2."""

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """argparse would say what is missing before it says what it does not know, which is often the same thing."""
        for word in itertools.takewhile(lambda word: word != "--", args):
            option = word.partition("=")[0]
            if option.startswith("--") and " " not in option and option not in self._option_string_actions:
                hint = nearest(option, self._option_string_actions)
                raise UserError(f"{option}: no such option{hint}; see {self.prog} --help")
        return super().parse_args(args)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a check that finds a fault, 2 the user's mistake, 130 interrupted, 143 terminated.

    A mistake is one line on stderr, of several processes together.
    """
    try:
        with _short_warnings():
            return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        let_the_first_speak()
        print(f"posttrain: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `posttrain ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:  # a full disk, a file that may not be read
        let_the_first_speak()
        print(f"posttrain: error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if rank() == 0:
            print(
                f"posttrain: {'terminated' if terminated else 'interrupted'}; what is finished is kept", file=sys.stderr
            )
        return 143 if terminated else 130
    except Exception as error:  # a bug, a full disk again, or what follows from another process's error
        let_the_first_speak()
        if reason := why_unwritten(error):
            reason = f"system: {reason}"
        elif is_lost_peer(error):
            reason = "launch: another process has ended; the last checkpoint is kept"
        else:
            raise
        print(f"posttrain: error: {reason}", file=sys.stderr)
        return 2


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Our own warnings are one line, as errors are, and of several processes together; a library's are left as they are."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not Path(filename).is_relative_to(PACKAGE):
                before(message, category, filename, lineno, file, line)
            elif rank() == 0:
                print(f"posttrain: warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


def command_of(name: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """A command's module, and what reads its arguments. Errors: UserError for one that is not there."""
    if name not in COMMANDS:
        raise UserError(f"command: no command {name!r}{nearest(name, COMMANDS)}; one of {', '.join(COMMANDS)}")
    module = importlib.import_module(f"posttrain.cli.{name.replace('-', '_')}")
    parser = _Parser(
        prog=f"posttrain {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module, parser


def _dispatch(argv: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: posttrain COMMAND ...\n\n{LEAD}\n\n{listing}\n\nposttrain COMMAND --help explains each.")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    module, parser = command_of(argv[0])
    args = parser.parse_args(argv[1:])
    with recording(argv, first=rank() == 0):
        code: int = module.run(args) or 0
    part()
    return code


if __name__ == "__main__":
    sys.exit(main())
