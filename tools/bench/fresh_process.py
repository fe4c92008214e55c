"""What benchmarks share that measure each case in processes of its own: start them, read what they
leave, write the report."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import Panel, bars

Row = dict[str, Any]


def measured(command: Sequence[str], case: Row) -> Row:
    """Return the JSON that `command --out FILE` writes; what went wrong is part of the result:
    `case` with the end of stderr as `failed`."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        finished = subprocess.run(
            [*command, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode or not out.exists():
            return {**case, "failed": finished.stderr[-3000:]}
        result: Row = json.loads(out.read_text())
        return result


def report(
    results: Sequence[Row],
    table: Callable[[Sequence[Row]], str],
    out: Path,
    kind: str,
    *,
    figure: tuple[str, Sequence[Panel]] | None = None,
) -> None:
    """Write KIND_DEVICE_YYYYMM.{json,md}, and with a `figure` (title, panels) a .png, into `out`,
    and print the table.

    SystemExit 1 when a case failed."""
    out.mkdir(parents=True, exist_ok=True)
    device = (
        next((row["device"] for row in results if "device" in row), "none")
        .removeprefix("NVIDIA ")
        .split()[0]
        .lower()
    )
    stem = out / f"{kind}_{device}_{datetime.datetime.now(tz=datetime.UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(results))
    if figure is not None and figure[1]:
        bars(stem.with_suffix(".png"), *figure)
    print(table(results))
    if any("failed" in row for row in results):
        raise SystemExit(1)
