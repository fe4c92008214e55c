"""What an error advises can be done: the verbs, commands and options that messages name exist for
the verbs that can end with them."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from megatron_hypenet.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
COMPUTING = ("run", "train", "select", "demo", "submit")
"""Verbs that begin or continue a run."""

RAISED_BY = {
    "checkpoint/format.py": ("convert",),
    "checkpoint/state.py": ("train",),
    "cluster/prepare_jobs.py": ("data",),
    "data/journal.py": ("data",),
    "data/workers.py": ("data",),
    "export/generate.py": ("generate", "eval"),
    "export/hf_model.py": ("generate", "eval"),
    "planning/machine.py": ("plan",),
    "serve/vllm/model.py": (),  # an option of vLLM
    "config/cluster.py": (),
    "config/sbatch_options.py": (),  # options of sbatch
    "cli/main.py": COMPUTING,
    "cli/engines.py": ("eval", "convert"),
    "cli/eval_models.py": ("eval",),
    "cli/options.py": ("generate", "eval"),
    "eval/harness.py": ("eval",),
    "export/from_megatron.py": (),  # some are options of Megatron-LM
    "export/megatron_args.py": ("convert",),
    "export/row_blocks.py": ("convert",),
    "export/to_megatron.py": ("convert",),
    "halo/gate.py": COMPUTING,
    "export/to_hf.py": ("convert",),
    "halo/changes.py": COMPUTING,
    "halo/run_folder.py": COMPUTING,
    "halo/tasks.py": ("train",),
    "training/loop.py": ("run", "train"),
    "cli/pipeline.py": COMPUTING,
    "cli/plan.py": ("plan",),
    "cli/processes.py": ("run", "train"),
}
"""File -> the verbs that can end with its errors; a verb's own file needs no entry."""


def options_of(verb: str) -> set[str]:
    """Yield all options of a verb and of its commands."""

    def walk(command) -> Iterator[str]:
        for parameter in command.params:
            yield from parameter.opts
        for inner in getattr(command, "commands", {}).values():
            yield from walk(inner)

    module = importlib.import_module(f"megatron_hypenet.cli.{verb}")
    return {*walk(typer.main.get_command(module.app)), "--help", "--debug"}


options_of = cache(options_of)


def words_of(node: ast.AST) -> Iterator[str]:
    """Yield the texts below `node`, with {} for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from words_of(child)


def messages() -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every message of the package; of changes.py all texts, which it puts
    together."""
    for folder in ("megatron_hypenet", "launchers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix().removeprefix("megatron_hypenet/")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            whole = name == "halo/changes.py"
            for node in [tree] if whole else ast.walk(tree):
                if whole or isinstance(node, ast.Raise):
                    yield name, " ".join(words_of(node))


COMMAND = re.compile(r"`?hypenet ([a-z]+)((?: [^`;,()\n]*)?)`?")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def test_commands_in_messages_exist_with_their_options():
    found = 0
    for name, text in messages():
        for match in COMMAND.finditer(text):
            quoted = match.group().startswith("`")
            if match.group(1) not in VERBS:
                assert not quoted, f"{name}: {match.group()}"
                continue
            found += 1
            if quoted:
                missing = set(OPTION.findall(match.group(2))) - options_of(match.group(1))
                assert not missing, f"{name}: {match.group()} has no {missing}"
    assert found > 10


@pytest.mark.parametrize("name", sorted({name for name, text in messages() if "--" in text}))
def test_options_in_messages_exist_for_every_verb_that_can_say_them(name):
    verb = name.removeprefix("cli/").removesuffix(".py")
    texts = [COMMAND.sub("", text) for file, text in messages() if file == name]
    options = {option for text in texts for option in OPTION.findall(text)}
    if not options:
        return
    if name.startswith("launchers/"):
        verbs: tuple[str, ...] = ("run", "train")
    elif name == "cli/node_doctor.py":
        verbs = ("doctor",)
    elif name in RAISED_BY:
        verbs = RAISED_BY[name]
    else:
        assert verb in VERBS, f"{name} names {options}: say in RAISED_BY which verbs it belongs to"
        verbs = (verb,)
    for each in verbs:
        assert not options - options_of(each), f"{name}: hypenet {each} has no such option"
