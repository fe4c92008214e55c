"""The files losses.jsonl and metrics.jsonl of a training stage: what is known of its steps, in
lines of JSON. When a run continues, the lines of later steps are removed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Protocol, TypeVar

from pydantic import Field

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import parse_json, typed

logger = logging.getLogger(__name__)

LOSSES = "losses.jsonl"
METRICS = "metrics.jsonl"

_KIND = FileKind(
    error=DataError,
    advice="restore the file, or delete the damaged lines: the run goes on without them",
    max_bytes=1 << 30,
)


class OfStep(Protocol):
    """A line about a step."""

    @property
    def step(self) -> int:
        """Return the number of the step, from 1."""


Line = TypeVar("Line", bound=OfStep)


class LossLog:
    """The file losses.jsonl: one line per step with exact values (JSON keeps every bit of a
    float)."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._stream = _continued(path, loss_lines(path), resumed_step, every_step=True)

    def append(self, step: int, loss: float | None, grad_norm: float | None, lr: float) -> None:
        """Add one step; a skipped one has no loss and no norm."""
        self._stream.write(
            json.dumps({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr}) + "\n"
        )

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()


class MetricsLog:
    """The file metrics.jsonl: what trackers show, one line per point."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._stream = _continued(path, metrics_lines(path), resumed_step)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a point; those that are not finite become null."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._stream.write(json.dumps({"step": step, "values": finite}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()


@dataclass(frozen=True, kw_only=True)
class LossLine:
    """One line of losses.jsonl; entries of a later version are ignored."""

    step: Annotated[int, Field(ge=1)]
    loss: float | None
    grad_norm: float | None
    lr: float


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """One line of metrics.jsonl."""

    step: Annotated[int, Field(ge=1)]
    values: dict[str, float | None]
    """By tag; null where a value was not finite."""


def loss_lines(path: Path) -> list[tuple[str, LossLine]]:
    """Return the lines of a losses.jsonl and their parsed content, with ascending steps. An
    incomplete last line, as a killed process leaves it, is dropped. DataError names the first line
    that is damaged otherwise."""
    found = _lines(path, LossLine)
    for number, (earlier, later) in enumerate(zip(found, found[1:], strict=False), start=2):
        if later[1].step <= earlier[1].step:
            _KIND.refuse(
                f"{path}, line {number}", f"step {later[1].step} follows step {earlier[1].step}"
            )
    return found


def metrics_lines(path: Path) -> list[tuple[str, MetricsLine]]:
    """Return the lines of a metrics.jsonl as `loss_lines` does; a step may have several."""
    return _lines(path, MetricsLine)


def _lines(path: Path, kind: type[Line]) -> list[tuple[str, Line]]:
    if not has_entry(path):
        return []
    *lines, _torn = _KIND.read_bytes(path).split(b"\n")
    found = []
    for number, content in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        line = _KIND.decode(where, content)
        found.append((line, typed(_KIND, where, parse_json(_KIND, where, line), kind)))
    return found


def _continued(
    path: Path,
    records: list[tuple[str, Line]],
    resumed_step: int,
    *,
    every_step: bool = False,
) -> IO[str]:
    """Open the file for more lines, without those after `resumed_step`. Where there is a line for
    `every_step`, missing ones are logged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line, record in records if record.step <= resumed_step]
    lost = sorted(set(range(1, resumed_step + 1)) - {record.step for _, record in records})
    if every_step and lost:
        logger.warning(
            "%s lacks %d of the %d steps that are done, first step %d: their losses are lost",
            path,
            len(lost),
            resumed_step,
            lost[0],
        )
    write_text(path, "".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)
