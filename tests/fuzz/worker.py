"""Damage and read inputs, one after the other in one process, under limits of memory and time.

    python -m tests.fuzz.worker SEED COUNT KIND...

Prints one JSON object per input: kind, number, what was done, outcome ("accepted", "refused" or
"FAULT"), and what was seen of a fault.
"""

import contextlib
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 10.0
"""Processor time that one input may take."""
MEMORY = 2 << 30
"""Bytes that one input may allocate above what the process holds before it."""
UNCLEAN = re.compile(r"internal:|Traceback \(most recent call last\)|Exception ignored in")


class TooLong(BaseException):
    """An input took too long."""


def limit() -> None:
    """Bound what the process may allocate, and how large a file it may write; no core dumps."""
    held = (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmData")
            ).split()[1]
        )
        * 1024
    )
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 40, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def captured(path):
    """Capture both output streams of the process, whoever writes to them, in the files path.out and
    path.err."""
    kept = [os.dup(number) for number in (1, 2)]
    sys.stdout.flush(), sys.stderr.flush()
    for number, suffix in ((1, "out"), (2, "err")):
        target = os.open(f"{path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    try:
        yield
    finally:
        gc.collect()
        sys.stdout.flush(), sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one(subject, chance, whole, place):
    """Damage a copy of `whole` and read it; (what was done, outcome, what was seen)."""
    folder = place / "in" / "x"
    temporary = place / "tmp"
    out = place / "out" / "result"
    for made in (temporary, out.parent):
        made.mkdir(parents=True)
    shutil.copytree(whole, folder)
    name = chance.choice(sorted(subject.files))
    mutation = chance.choice(subject.files[name])
    did = f"{name}: {mutation(chance, folder / name)}"
    subject.mend(folder, name)
    before = listing(folder)
    tempfile.tempdir = str(temporary)
    started = time.process_time()
    fault = ""
    code = None
    for timer, seconds in ((signal.ITIMER_PROF, SECONDS), (signal.ITIMER_REAL, SECONDS * 12)):
        signal.setitimer(timer, seconds)
    try:
        with captured(place / "log"):
            code = subject.read(folder, out)
    except BaseException as error:
        fault = f"{type(error).__name__}: {error}"
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        tempfile.tempdir = None
    said, err = ((place / f"log.{suffix}").read_text(errors="replace") for suffix in ("out", "err"))
    if not fault and code == 0:
        try:
            with captured(place / "check"):
                subject.accepted(folder, out, said, whole)
        except BaseException as error:
            fault = f"accepted, but {type(error).__name__}: {error}"
    elif not fault and not (isinstance(code, int) and 2 <= code <= 8):
        fault = f"code {code}"
    elif not fault and err.count("error: ") != 1:
        fault = f"{err.count('error: ')} error blocks"
    if not fault and UNCLEAN.search(said + err):
        fault = "unclean"
    if not fault and len(err) > 20_000:
        fault = f"a message of {len(err)} characters"
    if not fault and listing(temporary):
        fault = f"left in the temporary folder: {listing(temporary)[:3]}"
    if not fault and (listing(folder) != before or (code != 0 and listing(out.parent))):
        fault = (
            f"left behind: {sorted(set(listing(folder)) - set(before))[:3]} "
            f"{listing(out.parent)[:3]}"
        )
    seconds = round(time.process_time() - started, 2)
    return (
        did,
        "FAULT" if fault else "accepted" if code == 0 else "refused",
        f"{fault} [code {code}, {seconds} s] {err[-600:]}" if fault else "",
    )


def main(seed, count, kinds):
    from tests.fuzz.subjects import SUBJECTS

    def too_long(*_):
        raise TooLong("it took too long")

    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = f"{root}/home"
        for kind in kinds:
            subject = SUBJECTS[kind]
            whole = Path(root, kind, "whole")
            whole.parent.mkdir()
            with captured(Path(root, "make")):
                subject.make(whole)
            resource.setrlimit(
                resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            # once undamaged: it imports what it needs before memory is limited
            if subject.read is not None:
                place = Path(root, kind, "first")
                (place / "out").mkdir(parents=True)
                shutil.copytree(whole, place / "x")
                with captured(place / "log"):
                    code = subject.read(place / "x", place / "out" / "result")
                said, err = ((place / f"log.{suffix}").read_text() for suffix in ("out", "err"))
                assert code == 0, f"{kind}: the undamaged input is refused: {err}"
                with captured(place / "check"):
                    subject.accepted(place / "x", place / "out" / "result", said, whole)
            limit()
            for number in range(count):
                place = Path(root, kind, "one")
                did, outcome, seen = one(
                    subject, random.Random(f"{seed}/{kind}/{number}"), whole, place
                )
                print(
                    json.dumps(
                        {
                            "kind": kind,
                            "number": number,
                            "did": did,
                            "outcome": outcome,
                            "seen": seen,
                        }
                    ),
                    flush=True,
                )
                shutil.rmtree(place)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
