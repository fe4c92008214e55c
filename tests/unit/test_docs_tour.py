"""Pages that name code stay true: every `file.py:function` of the tour exists, so does every path
and every link of the pages for contributors."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = "megatron_hypenet"
TOUR = "docs/code_tour.md"
NAMED = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#\s]+)")
ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)


def names_in(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Return functions, classes, methods and assigned names of a module, dotted."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing_names(page: str, package: Path) -> list[str]:
    """Return each `file.py` or `file.py:name` on the page that the package does not have."""
    missing = []
    for file, name in NAMED.findall(page):
        path = package / file
        if not path.is_file():
            missing.append(file)
        elif name and name not in names_in(ast.parse(path.read_text(encoding="utf-8")).body):
            missing.append(f"{file}:{name}")
    return missing


def missing_paths(page: str, root: Path) -> list[str]:
    """Return each path in backticks that begins with a folder of the repository and does not exist;
    paths with placeholders (capital letters, `*`) and in build/, which commands write, are left
    out."""
    folders = {path.name for path in root.iterdir() if path.is_dir()} - {"build"}
    found = re.findall(r"`([\w.]+/[\w./*-]*)`", page)
    return [
        path
        for path in found
        if path.split("/")[0] in folders
        and not re.search(r"\*|\.\.\.|[/_][A-Z]{3,}", path)
        and not (root / path).exists()
    ]


def test_every_name_of_the_tour_exists(repo_root):
    page = (repo_root / TOUR).read_text(encoding="utf-8")
    assert len(NAMED.findall(page)) > 60
    assert missing_names(page, repo_root / PACKAGE) == []


@pytest.mark.parametrize("name", PAGES)
def test_every_path_and_link_of_a_page_exists(repo_root, name):
    page = (repo_root / name).read_text(encoding="utf-8")
    assert missing_paths(page, repo_root) == []
    here = (repo_root / name).parent
    links = [link for link in LINK.findall(page) if "://" not in link]
    assert [link for link in links if not (here / link).exists()] == []


@pytest.mark.parametrize(
    ("named", "missing"),
    [
        ("`a.py:f` and `a.py:C.method` and `a.py:LIMIT`", []),
        ("`a.py:g`", ["a.py:g"]),
        ("`a.py:C.other`", ["a.py:C.other"]),
        ("`b.py`", ["b.py"]),
    ],
)
def test_a_name_that_is_gone_is_caught(tmp_path, named, missing):
    source = "LIMIT = 1\n\ndef f(): ...\n\nclass C:\n    def method(self): ...\n"
    (tmp_path / "a.py").write_text(source)
    assert missing_names(named, tmp_path) == missing


def test_a_path_that_is_gone_is_caught(tmp_path):
    (tmp_path / "docs").mkdir()
    assert missing_paths("`docs/x.md` `docs/NAME.md` `other/x.md`", tmp_path) == ["docs/x.md"]
