"""The `hypenet` command: finds the verb, runs it, and turns its outcome into one error block and an
exit code.

Convention for a verb module (`megatron_hypenet/cli/<verb>.py`):
- it exposes `app = typer.Typer(add_completion=False, rich_markup_mode=None)`: help then reads as
  the docstring is laid out. One registered command makes `hypenet VERB ...`; several make `hypenet
  VERB COMMAND ...`;
- its top imports only the standard library, typer, and `errors`, `byte_sizes` and `config` of this
  package. Everything heavy (torch, transformers, megatron, deepspeed, our other
  packages) is imported inside the function that needs it: a test holds `--help` to it;
- it is listed in VERBS below with its one line of help, in pipeline order;
- a failure the user can act on raises a `megatron_hypenet.errors` class: it becomes the exit code
  and the `error: ...` block here;
- results go to stdout, everything else to stderr. `--json` prints one JSON object and nothing else
  on stdout; `--dry-run` checks and prints what would happen, writes and starts nothing, and exits 0
  only when the real command would start;
- a verb that takes a run configuration uses the argument types and `collect_overrides` of
  `cli/options.py`.

Verbs are imported on use, through typer's public `get_command`. `--debug` may stand anywhere and
shows tracebacks.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_hypenet import __version__
from megatron_hypenet.errors import HypenetError, SetupError, UsageError, exit_code_of, is_disk_full

VERBS: dict[str, str] = {
    "demo": "Run the whole pipeline on the bundled tiny teacher (CPU or GPU).",
    "doctor": "Check this machine: versions, devices, compilers, disk.",
    "convert": "Import a Hugging Face or Megatron-LM model, export a checkpoint, verify both.",
    "train": "Run one training stage.",
    "run": "Run all stages in order; resumes where it stopped.",
    "select": "Choose the layers that keep softmax attention.",
    "score": "Write logits and per-token losses of given token ids.",
    "generate": "Continue a prompt, or chat, with a checkpoint or a folder.",
    "eval": "Measure models side by side: losses, long contexts, questions.",
    "serve": "Serve an exported model with vLLM.",
    "data": "Prepare and inspect training data.",
    "ckpt": "List, inspect, compare and prune checkpoints.",
    "report": "Summarise a finished run: losses, recall, figures.",
    "config": "Show, validate, list, copy or describe configurations.",
    "plan": "Show GPU memory and hours of each stage, and layouts that fit.",
    "submit": "Hand a run to SLURM, as one job or one per stage.",
    "runs": "List the runs in a folder: state, step, iteration.",
    "status": "Show whether a run runs, why it stopped, and how far it is.",
    "logs": "Show the logs of a run, or what failed first in it.",
    "cancel": "Stop a run; a step that runs is saved first.",
    "requeue": "Start the jobs of a run again from what is saved.",
}
"""Verb -> one line of help, in pipeline order; the module is megatron_hypenet.cli.<verb>."""

COMPLETION_OPTIONS = ("--install-completion", "--show-completion")
COMPLETION_VARIABLE = "_HYPENET_COMPLETE"
"""Set by the shell's function when it asks for proposals; Typer makes the name of the program's."""
VERSIONED = ("torch", "megatron-core", "deepspeed", "transformers")


def help_text() -> str:
    """Return the top-level help: verbs in pipeline order, then the options every verb shares."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{line}" for name, line in VERBS.items())
    return (
        "Usage: hypenet VERB [ARGS]...\n\n"
        "Distil a softmax-attention teacher into a HypeNet: long context from a hybrid of "
        "attention and RNN layers.\n\n"
        f"Verbs, in pipeline order:\n{verbs}\n\n"
        "Options:\n"
        "  --help      Show this text; `hypenet help VERB` explains a verb.\n"
        "  --version   Show the versions of this package and of the libraries under it.\n"
        "  --debug     Show tracebacks; may stand anywhere on the line.\n"
        "  --install-completion, --show-completion\n"
        "              Let bash, zsh or fish complete verbs, options, presets and settings.\n\n"
        "Examples:\n"
        "  hypenet demo\n"
        "  hypenet run quickstart teacher=/models/Qwen3-0.6B data=corpus.txt\n\n"
        "Exit codes: 0 done, 1 internal, 2 usage, 3 config or layout, 4 environment, "
        "5 checkpoint or data, 6 verification,\n"
        "7 diverged, 8 hang, 9 below a gate, 75 saved and asks to be started again. "
        "See docs/errors.md."
    )


def version_text() -> str:
    """Return one line per package, read from installed metadata: nothing is imported."""
    lines = [f"hypenet {__version__} (Python {sys.version.split()[0]})"]
    for package in VERSIONED:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    return "\n".join(lines)


def split_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take --debug out of the words before a `--`; return the rest and whether it was there."""
    end = argv.index("--") if "--" in argv else len(argv)
    head = [word for word in argv[:end] if word != "--debug"]
    return head + list(argv[end:]), len(head) < end


def run_verb(verb: str, args: list[str]) -> int:
    """Import the verb's module and run its typer app on `args`; the exit code, or the exception it
    ended with."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(
            f"unknown verb '{verb}'{hint}\nverbs are {', '.join(VERBS)}; see hypenet --help"
        )
    import typer

    from megatron_hypenet.cli import examples, options

    # click's UsageError, wherever this typer keeps click
    usage_fault: Any = typer.BadParameter.__mro__[1]
    module = importlib.import_module(f"megatron_hypenet.cli.{verb}")
    options.expand_paths(module.app)
    examples.keep_whole(module.app)
    command = typer.main.get_command(module.app)
    try:
        result = command.main(args=args, prog_name=f"hypenet {verb}", standalone_mode=False)
    except usage_fault as fault:
        context = getattr(fault, "ctx", None)
        path = context.command_path if context is not None else f"hypenet {verb}"
        if type(fault).__name__ == "NoArgsIsHelpError":
            print(fault.format_message(), file=sys.stderr)
            return UsageError.exit_code
        raise UsageError(f"{fault.format_message()}\nsee {path} --help") from fault
    except typer.Abort as fault:
        raise KeyboardInterrupt from fault
    return result if isinstance(result, int) else 0


def dispatch(argv: Sequence[str], *, debug: bool = False) -> int:
    """Handle the top-level options, else run the verb; returns the exit code. `debug` is for
    processes that the verb may start."""
    if os.environ.get(COMPLETION_VARIABLE) or (argv and argv[0] in COMPLETION_OPTIONS):
        from megatron_hypenet.cli import completion

        return completion.run(list(argv), VERBS)
    if not argv or argv[0] in ("--help", "-h") or list(argv) == ["help"]:
        print(help_text())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "help":
        return run_verb(argv[1], [*argv[2:], "--help"])
    if argv[0] == "--version":
        print(version_text())
        return 0
    if argv[0].startswith("-"):
        raise UsageError(f"unknown option '{argv[0]}' before the verb\nsee hypenet --help")
    _require_current_folder()
    from megatron_hypenet.cli import processes

    processes.WORDS.set((*argv, *(["--debug"] if debug else [])))
    return run_verb(argv[0], list(argv[1:]))


def _require_current_folder() -> None:
    """Raise SetupError where the current folder was deleted: relative paths mean nothing there, and
    torch's libraries end the process when they are loaded."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise SetupError(
            "the current folder was deleted; go to another one (`cd`) and start the command again"
        ) from error


def report_fault(fault: BaseException, debug: bool) -> int:
    """Print the one error block for `fault` on stderr and return its exit code."""
    if debug:
        traceback.print_exception(fault)
    print(f"error: {_error_text(fault, debug)}", file=sys.stderr)
    return exit_code_of(fault)


def _error_text(fault: BaseException, debug: bool) -> str:
    if isinstance(fault, KeyboardInterrupt):
        return "interrupted"
    if isinstance(fault, HypenetError):
        return str(fault)
    if is_disk_full(fault):
        where = f"{fault.filename}: " if isinstance(fault, OSError) and fault.filename else ""
        return f"{where}no space left on the disk; free space, then start the same command again"
    if isinstance(fault, OSError) and fault.filename:
        blocked = isinstance(fault, FileExistsError | NotADirectoryError)
        why = (
            "a file stands where a folder is needed; choose another path"
            if blocked
            else f"{fault.strerror}; check path and permissions"
        )
        return f"{fault.filename}: {why}"
    summary = str(fault).strip().split("\n")[0] or "no message"
    hint = (
        ""
        if debug
        else "\nthis is a fault of hypenet or of a library under it; add --debug to see where"
    )
    return f"internal: {type(fault).__name__}: {summary}{hint}"


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; everything a verb can raise ends here."""
    words, debug = split_debug(list(argv))
    try:
        code = dispatch(words, debug=debug)
        sys.stdout.flush()
        return code
    # the reader of a pipe left (`| head`): not a fault; keep the interpreter from flushing again
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as fault:
        return report_fault(fault, debug)


def main() -> NoReturn:
    """Run the entry point of the console script."""
    # Python has no stream where the caller closed one (`>&-`): give it one, so that printing goes
    # nowhere instead of failing
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # open for the whole process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    code = run(sys.argv[1:])
    if "megatron_hypenet.parallel.groups" in sys.modules and "RANK" in os.environ:
        from megatron_hypenet.supervision.process_exit import exit_process

        # one of several: an ordinary end may abort in what is left of the process groups
        exit_process(code)
    sys.exit(code)
