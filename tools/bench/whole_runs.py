"""`hypenet demo` in processes of one machine, as a user starts it; and once more with one of the
processes killed, and the command repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fresh_process import Row

STAGES = ("align", "distill", "finetune")
KILLED_IN = "distill"
"""The stage in which a process is killed."""


def whole_run(row: Row, environment: Mapping[str, str], timeout: float) -> Row:
    """Run the demo with the words of `row`, killing one process in the middle of a stage and
    starting the command again where `row["kill"]` says so. Returns the row with the seconds and the
    losses of every step, or what went wrong as `failed`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        command = [
            *(sys.executable, "-m", "megatron_hypenet", "demo"),
            *("--nproc", str(row["processes"]), "--out", str(folder), *row["words"]),
        ]
        log = Path(root) / "log"
        found = dict(row)
        try:
            if row["kill"]:
                found |= _killed(command, folder, row["kill_at"], environment, log, timeout)
            left = timeout - (time.monotonic() - began)
            code = _finish(_start(command, environment, log), left)
            if code:
                raise RuntimeError(f"exit code {code}")
            losses = {stage: _losses(folder / stage) for stage in STAGES}
            _check_steps(losses)
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            text = log.read_text(errors="replace") if log.exists() else ""
            return {**row, "failed": f"{error}\n{text[-3000:]}"}
        return {**found, "run_seconds": time.monotonic() - began, "losses": losses}


def _killed(
    command: Sequence[str],
    folder: Path,
    step: int,
    environment: Mapping[str, str],
    log: Path,
    timeout: float,
) -> Row:
    """Start the command and kill its last rank once a stage has done `step` steps; returns the step
    at which that happened, and the exit code."""
    import psutil

    process = _start(command, environment, log)
    rank = str(int(command[command.index("--nproc") + 1]) - 1)
    end = time.monotonic() + timeout
    try:
        while len(_losses(folder / KILLED_IN)) < step:
            if process.poll() is not None:
                raise RuntimeError(f"ended with {process.returncode} before the kill")
            if time.monotonic() > end:
                raise RuntimeError(f"had not done {step} steps after {timeout:.0f} s")
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in family if _rank_of(child) == rank]
        victim = ranks[0].pid if ranks else process.pid
        os.kill(victim, signal.SIGKILL)
        at = len(_losses(folder / KILLED_IN))
        code = _finish(process, max(1.0, end - time.monotonic()))
    except BaseException:
        _finish(process, 0)
        raise
    if code == 0:
        raise RuntimeError("ended with 0 although a process was killed")
    return {"killed_at_step": at, "killed_code": code}


def _rank_of(process: object) -> str | None:
    import psutil

    try:
        rank: str | None = process.environ().get("RANK")  # type: ignore[attr-defined]
    except psutil.Error:
        return None
    return rank


def _start(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip


def _finish(process: subprocess.Popen[bytes], timeout: float) -> int:
    """Wait for a command at most so long; returns its exit code, with nothing of it left."""
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _losses(stage: Path) -> list[Row]:
    """Return the lines of a stage's losses, without one that is being written."""
    file = stage / "losses.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _check_steps(losses: Mapping[str, Sequence[Row]]) -> None:
    for stage, lines in losses.items():
        steps = [line["step"] for line in lines]
        if steps != list(range(1, len(steps) + 1)) or not steps:
            raise ValueError(f"{stage}: losses.jsonl has steps {steps[:3]} ... {steps[-3:]}")


def run_lines(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table of whole runs; a killed one beside the other on as many processes."""
    if not rows:
        return []
    lines = [
        "| run | seconds | last loss of stage 1, 2, 3 | killed at step | largest difference of a "
        "loss before the kill, after it |",
        "|---|---|---|---|---|",
    ]
    straight = next((row for row in rows if not row["kill"] and "losses" in row), None)
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed | | | |")
            continue
        last = ", ".join(f"{row['losses'][stage][-1]['loss']:.5f}" for stage in STAGES)
        killed = f"{row['killed_at_step']} (exit code {row['killed_code']})" if row["kill"] else ""
        apart = ""
        if row["kill"] and straight is not None:
            at = row["killed_at_step"]
            mine, other = (found["losses"][KILLED_IN] for found in (row, straight))
            differences = [
                abs(a["loss"] - b["loss"]) / abs(b["loss"])
                for a, b in zip(mine, other, strict=True)
            ]
            apart = f"{max(differences[:at]):.1e}, {max(differences[at:]):.1e}"
        lines.append(f"| {row['name']} | {row['run_seconds']:.0f} | {last} | {killed} | {apart} |")
    return lines
