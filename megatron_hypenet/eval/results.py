"""The file of an evaluation, eval.json: what was asked for, and a row for every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_object, typed

FILE = "eval.json"
FOLDER = "eval"
"""Where an evaluation inside a run lies, unless it is told otherwise."""
_KIND = FileKind(error=DataError, advice="evaluate again with --overwrite")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One measurement of one model; `suite.py` says what else it may have."""

    model: str
    measure: str
    task: str
    score: float
    count: Annotated[int, Field(ge=0)]
    length: int | None = None
    depth: float | None = None
    position: str | None = None
    way: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Results:
    plan: dict[str, Any]
    rows: list[_Row]


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the plan and the rows of an evaluation. DataError when the file is damaged."""
    content = read_object(_KIND, file)
    typed(_KIND, file, content, _Results)
    return content["plan"], content["rows"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as text with a column per model: nats for losses, % for everything else."""
    from megatron_hypenet.eval.suite import merged

    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [["task", "where", *models]]
    for row in merged(rows):
        where = [f"{row['length']:,} tokens"] if "length" in row else []
        where += [f"depth {row['depth']:g}"] if "depth" in row else []
        where += [str(row[name]) for name in ("position", "way") if name in row]
        scores = (row.get(model) for model in models)
        digits = 3 if row["task"].startswith("loss") else 1
        shown = ("" if score is None else f"{score:.{digits}f}" for score in scores)
        lines.append([row["task"], ", ".join(where), *shown])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
