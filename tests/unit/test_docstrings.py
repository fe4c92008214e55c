"""Docstrings are sentences or imperatives: none begins as a fragment of one."""

import ast
import re

import pytest

FRAGMENT = re.compile(r"\s*(Of|Those|That|For)\b")
FOLDERS = ("megatron_hypenet", "launchers", "tools", "slurm", "examples", "tests")


def fragments(source: str) -> list[int]:
    """Return the lines of docstrings, of attributes too, that begin with a word of FRAGMENT."""
    return [
        statement.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(getattr(node, "body", None), list)
        for statement in node.body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
        and FRAGMENT.match(statement.value.value)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_is_a_fragment(repo_root, folder):
    found = {
        f"{path.relative_to(repo_root)}:{line}"
        for path in (repo_root / folder).rglob("*.py")
        for line in fragments(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_fragments_are_caught():
    source = 'x = 1\n"""Of a value."""\n\n\ndef f():\n    """Those that remain."""\n'
    assert fragments(source) == [2, 6]
    assert fragments('def f():\n    """Format it."""\n') == []
