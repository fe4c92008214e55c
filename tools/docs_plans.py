"""Write again what the pages of docs/ show of `hypenet plan`: the lines below each `$ hypenet plan`
take the values that the command says now, and stay the rows that they are.

    python tools/docs_plans.py             # writes the pages
    python tools/docs_plans.py --check     # exit code 1 when one of them is out of date
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGES = ROOT / "docs"
BLOCK = re.compile(r"^(    \$ (hypenet plan (?:.*\\\n)*.*)\n)((?:    .*\n)+)", re.MULTILINE)


def row_of(line: str) -> tuple[str, bool]:
    """Return what a line is about: its first word that is no number, and whether it is one of the
    memory table, which has a micro-batch (`4 x 512`)."""
    words = line.split()
    return next((word for word in words if not word[0].isdigit()), ""), "x" in words


def said(command: str) -> list[str]:
    """Return the lines that `hypenet plan ...`, as it stands on a page, prints."""
    from megatron_hypenet.cli.main import run

    words = shlex.split(command.replace("\\\n", " "))[1:]
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as out:
        run(words)
    return out.getvalue().splitlines()


def renewed(page: str) -> str:
    """Return the page with the rows of its plans as the command says them. ValueError when a plan
    has no such row."""

    def lines(match: re.Match[str]) -> str:
        now = {row_of(line): line for line in said(match[2])}
        shown = match[3].splitlines()
        if gone := [line for line in shown if row_of(line) not in now]:
            raise ValueError(f"{match[2]}\ndoes not say\n" + "\n".join(gone))
        return match[1] + "".join(f"    {now[row_of(line)]}\n" for line in shown)

    return BLOCK.sub(lines, page)


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check compare them; 1 when one is out of date."""
    old = []
    for path in sorted(PAGES.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        now = renewed(page)
        if now != page:
            old.append(path)
            if "--check" not in arguments:
                path.write_text(now, encoding="utf-8")
    for path in old:
        print(
            f"{os.path.relpath(path, ROOT)}: {'out of date' if '--check' in arguments else 'new'}"
        )
    return int(bool(old) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
