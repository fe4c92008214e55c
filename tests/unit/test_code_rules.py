"""What the code may say: files and functions are read in one sitting, and nothing branches on the
name of a mixer or a stage outside its own files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.config.schema import STAGES

PACKAGE = "megatron_hypenet"
MOST_STATEMENTS = {"a file": 260, "a function": 45}


def statements(node: ast.AST) -> int:
    """Count the statements in a file or a function, nested ones too; lines would reward packing."""
    return sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - isinstance(node, ast.stmt)


def too_long(root: Path) -> list[str]:
    """Return files and functions under `root` with more statements than the rule allows."""
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for kind, nodes in (("a file", [tree]), ("a function", functions)):
            for node in nodes:
                count = statements(node)
                if count > MOST_STATEMENTS[kind]:
                    name = getattr(node, "name", "")
                    found.append(f"{path.relative_to(root)}: {name} has {count} statements")
    return found


@pytest.mark.parametrize("folder", [PACKAGE, "launchers", "slurm", "tools"])
def test_no_file_or_function_has_too_many_statements(repo_root, folder):
    assert too_long(repo_root / folder) == []


def test_a_long_function_and_a_long_file_are_caught(tmp_path):
    body = "    x = 1\n"
    (tmp_path / "fits.py").write_text("def f():\n" + 45 * body)
    assert too_long(tmp_path) == []
    (tmp_path / "long.py").write_text("def f():\n" + 46 * body + "y = 2\n" * 214)
    assert too_long(tmp_path) == ["long.py:  has 261 statements", "long.py: f has 46 statements"]


# files whose path has this word are a mixer's own; exported folders carry code that knows the
# mixers which it runs
OWN_FILES = {"attn": "softmax", "lightning_attn": "lightning"}
EXPORTED = "export/hf_remote/"


def mixer_names_outside(root: Path) -> list[str]:
    """Return string constants that are the name of a mixer, ours or in a config.json, and names of
    variables or modules that contain a recurrent mixer's word, outside its own files."""
    words = dict(OWN_FILES)
    for name, spec in mixer_specs().items():
        words |= dict.fromkeys(
            (spec.hf_keys.name, *spec.hf_keys.spellings), OWN_FILES.get(name, name)
        )
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place.startswith(EXPORTED):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                own = words.get(node.value)
            elif isinstance(node, ast.Name | ast.alias | ast.Attribute):
                name = (
                    node.id
                    if isinstance(node, ast.Name)
                    else node.name
                    if isinstance(node, ast.alias)
                    else node.attr
                )
                own = "lightning" if "lightning" in name.lower() else None
            else:
                continue
            if own is not None and own not in place:
                found.append(f"{place}:{node.lineno} names a mixer of {own}")
    return found


def test_no_mixer_name_outside_its_files(repo_root):
    assert mixer_names_outside(repo_root / PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        'x = "lightning_attn"',
        'x = "attn"',
        "from a import lightning_attn",
        "x = LIGHTNING",
        'x = "lightning-attn"',
    ],
)
def test_a_planted_mixer_name_is_caught(tmp_path, line):
    for place, count in (("training/loop.py", 1), ("model/mixers/lightning_softmax.py", 0)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(line + "\n")
        assert len(mixer_names_outside(tmp_path)) == 1, place if count else line


# beside a stage's own file: the table of HALO's tasks, the schema of their settings, and texts
STAGE_NAMES_ARE_DATA = ("halo/tasks.py", "config/schema.py", "cluster/job_script.py")


def stage_branches(root: Path) -> list[str]:
    """Return comparisons, memberships, `match` patterns and dictionary keys with a stage's name
    outside the files that may have them."""
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place in STAGE_NAMES_ARE_DATA:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                parts = [key for key in node.keys if key is not None]
            elif isinstance(node, ast.MatchValue):
                parts = [node.value]
            else:
                continue
            names = {
                child.value
                for part in parts
                for child in ast.walk(part)
                if isinstance(child, ast.Constant) and child.value in STAGES
            }
            found += [
                f"{place}:{node.lineno} branches on {name}"
                for name in sorted(names)
                if place != f"stages/{name}.py"
            ]
    return found


@pytest.mark.parametrize("folder", [PACKAGE, "launchers", "slurm", "tools"])
def test_nothing_branches_on_the_name_of_a_stage(repo_root, folder):
    assert stage_branches(repo_root / folder) == []


@pytest.mark.parametrize(
    "line",
    [
        'x = name == "align"',
        'x = name in ("distill", y)',
        'x = {"finetune": 1}[name]',
        'match name:\n    case "align" | "other":\n        pass',
    ],
)
def test_a_planted_branch_on_a_stage_is_caught(tmp_path, line):
    for place in ("planning/memory.py", "stages/base.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(line + "\n")
    assert len(stage_branches(tmp_path)) == 2
    for place in STAGE_NAMES_ARE_DATA:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(line + "\n")
    assert len(stage_branches(tmp_path)) == 2


def test_a_stage_may_name_itself_and_pass_its_name_on(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "align.py").write_text('x = name == "align"\n')
    (tmp_path / "actions.py").write_text('train("align")\ny = {"stage": "align"}\n')
    assert stage_branches(tmp_path) == []
