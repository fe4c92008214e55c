"""What benchmarks share that measure each case in processes of its own: start them, read what they
leave, write the report."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Panel, bars

Row = dict[str, Any]


def measured(
    command: Sequence[str],
    case: Row,
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Return the JSON that `command --out FILE` writes; what went wrong is part of the result:
    `case` with what was written until then, and the end of stderr as `failed`.

    After `timeout` seconds the command and the processes that it started are killed.
    `environment` is added to this process's."""
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "stderr"
        with log.open("wb") as stderr:
            # a session of its own, so that what it starts can be killed with it
            process = subprocess.Popen(
                [*command, "--out", str(out)],
                env=os.environ | own,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                failed = process.wait(timeout) != 0
            except subprocess.TimeoutExpired:
                failed = True
                log.write_text(f"took longer than {timeout:.0f} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result: Row = json.loads(out.read_text()) if out.exists() else {}
        if failed or not result:
            return {**case, **result, "failed": log.read_text(errors="replace")[-3000:]}
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
