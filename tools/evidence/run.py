#!/usr/bin/env python3
"""Run experiments in pieces, evaluate them, and collect what is small.

    python tools/evidence/run.py main --data build/evidence/there --minutes 9

does as much of the experiment `main` (experiments.py) as fits into nine minutes: trains it by
`hypenet run`, evaluates it by `hypenet eval`, and packs its results. At the limit the command that
works is asked to stop, saves, and this script ends with exit code 75; the same command then goes
on. With exit code 0 everything is done, and OUT/NAME.tar.gz has configuration, curves, scores,
figures, log, and evidence.json: every command with its seconds, and the machine.

The same works on a CPU with a small teacher: `--config FILE` names another configuration, and words
behind `--` are settings for every run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from megatron_hypenet.atomic_files import replacing, temporary_beside, write_json  # noqa: E402
from megatron_hypenet.errors import HypenetError, SavedAndRequeue, UsageError  # noqa: E402
from tools.evidence.experiments import CONFIG, Experiment, experiment  # noqa: E402

GRACE = 60.0
"""Seconds that a command has to save after it was asked to stop."""
LARGEST = 4 << 20
"""Bytes of the largest file that is collected."""
COLLECTED = (
    "evidence.json",
    "evidence.log",
    "run/config.yaml",
    "run/manifest.json",
    "run/timing.json",
    "run/selection/*.json",
    "run/report/report.json",
    "run/report/report.png",
    "run/*/losses.jsonl",
    "run/*/metrics.jsonl",
    "eval_*/eval.json",
    "eval_*/eval.png",
)
"""Patterns below the experiment's folder; its run is in run/."""


class Failed(HypenetError):
    """A command of an experiment ended with an error of its own."""


@dataclass(frozen=True)
class Place:
    """Where an experiment reads and writes."""

    data: Path
    """Folder with smollm2/, train.jsonl.zst, heldout.jsonl.zst and heldout.txt (unpack.py)."""
    runs: Path
    config: str
    more: tuple[str, ...]
    """Settings for every run."""


class Clock:
    """The time that is left for commands."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Return the seconds that are left, less those that a command needs to stop."""
        return self._end - time.monotonic() - GRACE


def settings(one: Experiment, place: Place, folder: Path) -> list[str]:
    """Return the words behind `hypenet run CONFIG`."""
    return [
        f"output_dir={folder / 'run'}",
        f"teacher={place.data / 'smollm2'}",
        f"data.train={place.data / 'train.jsonl.zst'}",
        f"data.heldout={place.data / 'heldout.jsonl.zst'}",
        *place.more,
        *one.words,
    ]


def commands(one: Experiment, place: Place, folder: Path) -> list[tuple[str, list[str]]]:
    """Return the experiment's commands by name, in order, as words behind `hypenet`."""
    found = [("run", ["run", place.config, *settings(one, place, folder)])]
    model = folder / "run" if one.with_teacher else _student(one, folder)
    text = ["--text", str(place.data / "heldout.txt")]
    for kind, lengths, more in (
        ("loss", one.loss_lengths, ["--probes", "none", "--loss-count", "8"]),
        ("needle", one.needle_lengths, ["--probes", "needle", "--count", str(one.needle_count)]),
    ):
        sizes = ["--lengths", ",".join(map(str, lengths))]
        out = ["--out", str(folder / f"eval_{kind}")]
        found.append((f"eval_{kind}", ["eval", str(model), *text, *sizes, *more, *out]))
    return found


def _student(one: Experiment, folder: Path) -> Path:
    """Return where the export is put aside: outside of its run, a model is evaluated without the
    run's teacher."""
    return folder / "student" / one.name


def do(one: Experiment, place: Place, out: Path, clock: Clock) -> None:
    """Do what is left of an experiment; SavedAndRequeue when time is up, Failed when a command
    fails."""
    folder = place.runs / one.name
    record = folder / "evidence.json"
    if one.after is not None and not folder.exists():
        _continue_copy(place.runs / one.after, folder)
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    done.setdefault("machine", machine())
    pieces: list[dict[str, Any]] = done.setdefault("pieces", [])
    finished = {piece["step"] for piece in pieces if piece["code"] == 0}
    for step, words in commands(one, place, folder):
        if step in finished:
            continue
        if clock.left() <= 0:
            raise SavedAndRequeue(f"{one.name}: time is up before {step}")
        print(f"{one.name}: {step}", flush=True)
        start = time.time()
        code = _hypenet(words, folder / "evidence.log", clock.left())
        seconds = round(time.time() - start, 1)
        pieces.append({"step": step, "words": words, "seconds": seconds, "code": code})
        write_json(record, done)
        if code == SavedAndRequeue.exit_code:
            raise SavedAndRequeue(f"{one.name}: time was up in {step} after {seconds:.0f} s")
        if code:
            tail = (folder / "evidence.log").read_text(errors="replace")[-2000:]
            raise Failed(f"{one.name}: {step} ended with exit code {code}:\n{tail}")
        if step == "run" and not one.with_teacher:
            shutil.copytree(folder / "run" / "export", _student(one, folder), dirs_exist_ok=True)
    _collect(one.name, folder, out)


def _hypenet(words: Sequence[str], log: Path, seconds: float) -> int:
    """Run `hypenet` with these words; after `seconds` ask it to stop. Return its exit code, which
    is 75 for what was stopped."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ hypenet {' '.join(words)}\n")
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_hypenet", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    # an evaluation has nothing to save, and ends by the signal; what it measured is in its file
    stopped = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM)
    return SavedAndRequeue.exit_code if code in stopped else code


def _continue_copy(source: Path, folder: Path) -> None:
    """Copy a finished run, to be continued with other settings."""
    if not (source / "run" / "export").is_dir():
        raise UsageError(f"{source} has no finished run; do the experiment {source.name} first")
    copy = temporary_beside(folder)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source / "run", copy / "run")
    copy.rename(folder)


def machine() -> dict[str, Any]:
    """Return the GPU, the libraries and the commit, where they are known."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit or None}


def _collect(name: str, folder: Path, out: Path) -> None:
    """Write OUT/NAME.tar.gz with the small files of a finished experiment."""
    out.mkdir(parents=True, exist_ok=True)
    files = {file for pattern in COLLECTED for file in folder.glob(pattern)}
    with replacing(out / f"{name}.tar.gz") as temporary, tarfile.open(temporary, "w:gz") as tar:
        for file in sorted(files):
            if file.stat().st_size <= LARGEST:
                tar.add(file, f"{name}/{file.relative_to(folder)}")
            else:
                print(f"left out, {file.stat().st_size:,} bytes: {file}", file=sys.stderr)
    print(f"{name}: {out / name}.tar.gz", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run experiments as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", help="experiments, in this order")
    parser.add_argument("--data", type=Path, default=Path("build/evidence/there"))
    parser.add_argument("--runs", type=Path, default=Path("build/evidence/runs"))
    parser.add_argument("--out", type=Path, help="where results are packed (RUNS)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this piece")
    parser.add_argument("--config", default=CONFIG, help="run configuration")
    words = sys.argv[1:] if arguments is None else arguments
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    runs = options.runs.absolute()
    place = Place(options.data.absolute(), runs, options.config, tuple(words[cut + 1 :]))
    clock = Clock(options.minutes)
    try:
        for one in [_known(name) for name in options.names]:
            do(one, place, options.out or runs, clock)
    except HypenetError as error:
        print(f"error: {error}" if error.exit_code != 75 else error, file=sys.stderr)
        return error.exit_code
    return 0


def _known(name: str) -> Experiment:
    try:
        return experiment(name)
    except KeyError as error:
        raise UsageError(error.args[0]) from None


if __name__ == "__main__":
    sys.exit(main())
