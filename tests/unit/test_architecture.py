"""Where things are: imports point left, each foreign library has one place, every module has its
mirrored test. What the code itself may say is in test_code_rules.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "megatron_hypenet"
ORDER = [
    "errors", "byte_sizes", "untrusted", "atomic_files", "slurm_environment", "ownership",
    "terminal", "process_place", "config", "ops", "parallel", "model", "data", "eval", "stages",
    "checkpoint", "supervision", "engine", "training", "planning", "halo", "cluster", "cli",
]  # fmt: skip
SEES = {part: set(ORDER[: index + 1]) for index, part in enumerate(ORDER)}
# beside the line: export sees six parts only, and only the command may use it
SEES["export"] = {"errors", "untrusted", "atomic_files", "config", "model", "checkpoint", "export"}
# inference engines: they run the exported code's functions and the operations
SEES["serve"] = {"errors", "ops", "export", "serve"}
SEES["cli"] |= {"export", "launchers", "serve"}
# the launchers start processes of the command and know nothing of what these do
SEES["launchers"] = {*ORDER[: ORDER.index("process_place") + 1], "launchers"}
SEES["__main__"] = {"cli"}
SEES["__init__"] = set()

# library -> the places that may import it: a package (all its modules) or one module
LIBRARY_PLACES = {
    "transformers": {"export", "data", "serve.vllm"},
    "vllm": {"serve.vllm"},
    "tokenizers": {"untrusted", "data"},
    "sentencepiece": {"export", "data"},
    "pyarrow": {"data.tables"},
    "zstandard": {"data.opening"},
    "deepspeed": {"engine.deepspeed"},
    "tensorboard": {"training.trackers.tensorboard"},
    "torch.utils.tensorboard": {"training.trackers.tensorboard"},
    "wandb": {"training.trackers.wandb"},
    "mlflow": {"training.trackers.mlflow"},
    "megatron.core.parallel_state": {"parallel.groups"},
    "matplotlib": {"eval.plots"},
    "typer": {"cli"},
    "lm_eval": {"eval.harness"},
}
# copied into exported folders and run there without this package: its files may import their
# siblings, by relative name, and no more
STANDALONE = "export.hf_remote"
# verbs may look whether a library works, they do not use it
PROBES = {"cli.doctor"}


def module_name(path: Path, root: Path) -> str:
    """`a/b.py` -> "a.b", `a/__init__.py` -> "a", relative to the package folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(source: str, module: str, is_package: bool) -> list[str]:
    """Return every dotted name the source imports, anywhere in it; `from a import b` counts as a.b,
    relative names are made absolute."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")]
                above = here[: len(here) - node.level + (1 if is_package else 0)]
                base = ".".join([*above, base]).rstrip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def outside_siblings(path: Path) -> list[str]:
    """Return the imports of this package that a copy of the file elsewhere could not follow:
    absolute ones, and relative ones leaving the folder."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or (node.level == 0 and (node.module or "").split(".")[0] == PACKAGE):
                names.append("." * node.level + (node.module or ""))
    return names


def target_of(name: str) -> str | None:
    """Return the folder that an imported dotted name belongs to; None for other people's
    modules."""
    first, *rest = name.split(".")
    if first == "launchers":
        return first
    return rest[0] if first == PACKAGE and rest else None


def violations(root: Path, package: str = PACKAGE) -> list[str]:
    """Return every import under the folder `root` of `package` that breaks the direction or the
    rule of one place per library."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_name(path, root)
        names = imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        part = module.split(".")[0] if package == PACKAGE else package
        if module == STANDALONE or module.startswith(STANDALONE + "."):
            found += [
                f"{module} imports {name}: it must work without this package"
                for name in outside_siblings(path)
            ]
            continue
        for name in names:
            target = target_of(name)
            if target is not None:
                known = (
                    target in SEES or (root / target).exists() or (root / f"{target}.py").exists()
                )
                if known and target not in SEES.get(part, set()):
                    found.append(f"{module} imports {name}: {part} may not see {target}")
            elif module not in PROBES:
                found += [
                    f"{module} imports {name}: {library} belongs to {', '.join(sorted(places))}"
                    for library, places in LIBRARY_PLACES.items()
                    if (name == library or name.startswith(library + "."))
                    and not any(
                        module == place or module.startswith(place + ".") for place in places
                    )
                ]
    return found


def without_type_checking(source: str) -> str:
    """Return the source without what only type checkers import."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


def circles(files: dict[str, Path]) -> list[list[str]]:
    """Return sets of modules that import each other, at whatever depth of the code; `files` by
    dotted name."""
    edges = {}
    for name, path in files.items():
        found = set()
        source = without_type_checking(path.read_text(encoding="utf-8"))
        for target in imports_of(source, name, False):
            while target and target not in files:
                target = target.rpartition(".")[0]
            found.add(target)
        edges[name] = found - {name, ""}
    graph = {name: sorted(targets) for name, targets in edges.items()}
    reach = {name: reachable(graph, name) for name in graph}
    return sorted(
        {
            tuple(sorted(other for other in reach[name] if name in reach[other]))
            for name in graph
            if name in reach[name]
        }
    )


def reachable(graph: dict[str, list[str]], start: str) -> set[str]:
    """Return what `start` leads to in one step or more."""
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Return modules and packages under the folder `root` of `package`, by dotted name."""
    return {
        f"{package}.{module_name(path, root)}".removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }


def unmirrored(package: Path, tests: Path) -> list[str]:
    """Return modules without tests/unit/<same path>/test_<name>.py. A package's own __init__ needs
    one only when it has code of its own."""
    missing = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body):
                continue
            mirror = tests / relative.parent / f"test_{relative.parent.name}.py"
        elif path.name == "__main__.py":
            mirror = tests / "cli" / "test_main.py"
        else:
            mirror = tests / relative.parent / f"test_{relative.stem}.py"
        if not mirror.exists():
            missing.append(f"{relative} has no {mirror.relative_to(tests.parent)}")
    return missing


def test_imports_point_left_and_libraries_stay_in_their_places(repo_root):
    assert violations(repo_root / PACKAGE) == []

    assert violations(repo_root / "launchers", "launchers") == []


def test_no_modules_import_each_other_in_a_circle(repo_root):
    files = modules_of(repo_root / PACKAGE, PACKAGE)
    files |= modules_of(repo_root / "launchers", "launchers")
    assert circles(files) == []


def test_a_planted_circle_is_caught(tmp_path):
    for name, line in (
        ("a", "from megatron_hypenet import b"),
        ("b", "def f():\n    import megatron_hypenet.c"),
        ("c", "from megatron_hypenet.a import x"),
        ("d", "from megatron_hypenet.a import x"),
    ):
        (tmp_path / f"{name}.py").write_text(line + "\n")
    names = tuple(f"{PACKAGE}.{name}" for name in "abc")
    assert circles(modules_of(tmp_path, PACKAGE)) == [names]


def test_every_module_has_its_mirrored_test(repo_root):
    assert unmirrored(repo_root / PACKAGE, repo_root / "tests" / "unit") == []
    assert unmirrored(repo_root / "launchers", repo_root / "tests" / "unit" / "launchers") == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/decay.py", "from megatron_hypenet.model import hypenet"),
        ("ops/decay.py", "from ..model.hypenet import build_model"),
        ("stages/align.py", "import megatron_hypenet.training.loop"),
        ("stages/align.py", "from megatron_hypenet import checkpoint"),
        ("export/to_hf.py", "from megatron_hypenet.stages import align"),
        ("model/hypenet.py", "from transformers import AutoConfig"),
        ("model/hypenet.py", "def f():\n    import deepspeed"),
        ("model/hypenet.py", "from megatron.core import parallel_state"),
        ("training/loop.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("export/hf_remote/modeling.py", "from megatron_hypenet import errors"),
        ("export/hf_remote/modeling.py", "from ..mapping import ROWS"),
    ],
)
def test_planted_violation_is_caught(tmp_path, file, line):
    planted = tmp_path / file
    for part in ORDER[1:]:
        (tmp_path / part).mkdir()
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line + "\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("training/loop.py", "from megatron_hypenet.stages.align import Align"),
        ("training/loop.py", "from .metrics import Metrics"),
        ("data/prepare.py", "from transformers import AutoTokenizer"),
        ("parallel/groups.py", "from megatron.core import parallel_state"),
        ("cli/convert.py", "from megatron_hypenet.export import to_hf"),
        (
            "export/hf_remote/modeling.py",
            "from .configuration import Config\nfrom transformers import PreTrainedModel",
        ),
        ("ops/decay.py", "import torch\nfrom megatron_hypenet import __version__"),
    ],
)
def test_allowed_import_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []


def test_missing_mirror_is_caught(tmp_path):
    package = tmp_path / "package"
    tests = tmp_path / "tests" / "unit"
    (package / "ops").mkdir(parents=True)
    (package / "ops" / "__init__.py").write_text('"""Docstring only."""\n')
    (package / "ops" / "decay.py").write_text("x = 1\n")
    tests.mkdir(parents=True)
    assert unmirrored(package, tests) == ["ops/decay.py has no unit/ops/test_decay.py"]
    (tests / "ops").mkdir()
    (tests / "ops" / "test_decay.py").write_text("")
    assert unmirrored(package, tests) == []
