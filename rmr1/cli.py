"""`rmr1 <verb>`: finds the verb, reads its arguments, and turns errors into one sentence.

Exit codes: 0 done, 1 a check failed, 2 wrong use or bad input, 130 interrupted, 141 the reader of
our output has gone. Set RMR1_TRACEBACK=1 to see where an error came from.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

# verb -> (module of rmr1/verbs, class, one line of help)
VERBS = {
    "demo": (
        "training",
        "Demo",
        "train a judge end to end in ten minutes, with a report",
    ),
    "sft": ("training", "Sft", "stage 1: distil judgments from traces"),
    "rlvr": ("training", "Rlvr", "stage 2: RL with verifiable rewards (GRPO)"),
    "eval": ("eval", "Eval", "accuracy of a judge on tasks, pairs or a benchmark"),
    "score": ("score", "Score", "aggregate judgments by a benchmark's official rule"),
    "judge": ("judge", "JudgeOne", "compare two answers"),
    "serve": ("serve", "Serve", "the judge over HTTP, with OpenAI's chat API beside it"),
    "trace": (
        "trace",
        "Trace",
        "judgments to distil from, by models behind an endpoint",
    ),
    "logprobs": ("judge", "Logprobs", "log-probabilities of given tokens"),
    "data": ("data", "Data", "write embedded tasks as pairs, or check a file of pairs"),
    "data build": ("data", "DataBuild", "training sets from public preference sets"),
    "report": ("tools", "Report", "the HTML report of a run"),
    "export": ("tools", "Export", "a checkpoint's model as a plain model directory"),
    "plan": (
        "plan",
        "Plan",
        "whether a recipe fits some GPUs, and its time by estimate",
    ),
    "bench": ("tools", "Bench", "run the benchmarks"),
    "doctor": ("tools", "Doctor", "what this machine and installation can do"),
}


def usage() -> str:
    """The text of `rmr1 --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: rmr1 <verb> [options]",
            "",
            "Train and use reasoning reward models. `rmr1 <verb> --help` explains a verb.",
            "",
            *lines,
            "",
            "Start with: rmr1 demo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        # DeepSpeed's launcher puts its own option in front, unless it is told --no_local_rank.
        code = _run([word for word in given if not word.startswith("--local_rank=")])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `rmr1 ... | head` is no mistake. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from rmr1 import __version__

        print(f"rmr1 {__version__}")
        return 0
    if args[0] not in VERBS:
        print(f"rmr1: no verb {args[0]!r}; the verbs are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    words = 2 if " ".join(args[:2]) in VERBS else 1
    verb_name = " ".join(args[:words])
    module, name, _ = VERBS[verb_name]
    log = logging.getLogger("rmr1")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_Tell())
    try:
        from rmr1.verbs.arguments import parse

        kind = getattr(import_module(f"rmr1.verbs.{module}"), name)
        verb = parse(kind, args[words:], prog=f"rmr1 {verb_name}")
        return int(verb.run())
    except SystemExit as stop:  # the parser's way out of --help
        return int(stop.code or 0)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        print(f"rmr1: stopped{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("RMR1_TRACEBACK"):
            raise
        print(f"rmr1: {_sentence(error, trains=module == 'training')}", file=sys.stderr)
        return 2


class _Tell(logging.Handler):
    """What the engine reports, such as its memory plan, on whatever stderr is now: a bar's too."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _sentence(error: ValueError | OSError | MemoryError, *, trains: bool) -> str:
    """The error in one sentence; a verb that `trains` has checkpoints to go on from."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        hint = ""
        if error.errno == errno.ENOSPC:
            hint = "; free some space" + (", the last checkpoint is whole" if trains else "")
        return f"{where}{error.strerror}{hint}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
