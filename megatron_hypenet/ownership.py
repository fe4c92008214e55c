"""One writer per folder: a file names the owner, and a second writer is refused with that name.

The file names host, process, SLURM job and command of the owner. It is locked as long as the owner
runs, where the file system has locks, and its `beat` grows every few seconds. A process that finds
it checks, in this order:

    1. the lock: if another process holds it, the folder is in use
    2. the process table, when the owner ran on this machine since its last start: a process that
       ended owns nothing
    3. SLURM, when the owner was a job: a job that is over owns nothing, and a later start of the
       same job goes on
    4. the file itself, when the owner was on another machine: if `beat` does not grow for
       WATCH_SECONDS, the owner is gone. Clocks of two machines are never compared

An owner that is gone is replaced, with a line in the log. On a network file system, where a lock
may be local to one machine, the new owner looks once more after a moment whether the file still
names it: of two that came at the same time, the last one to write goes on.

One file, because the four checks read and write the same record under the same lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from megatron_hypenet.atomic_files import sweep
from megatron_hypenet.errors import UsageError
from megatron_hypenet.slurm_environment import own_environment
from megatron_hypenet.untrusted.files import FileKind, shown
from megatron_hypenet.untrusted.json_text import parse_json, typed

logger = logging.getLogger(__name__)

FILE = "owner.json"
"""Name of the file in a folder that is owned as a whole; of another target NAME it is the sibling
.NAME.owner.json."""

BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0
"""Time without a beat after which an owner on another machine counts as gone: several beats, and
the 3 to 30 s for which NFS may show an old state of a file (acregmin and acregmax of nfs(5);
opening a file asks the server)."""

_NETWORK_SETTLE_SECONDS = 2.0
_LOCAL_FILE_SYSTEMS = frozenset(
    {
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "tmpfs",
        "ramfs",
        "overlay",
        "f2fs",
        "bcachefs",
        "apfs",
    }
)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_SQUEUE_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The content of the file."""

    host: str
    boot: str
    """This start of the machine's kernel and its process numbers: boot id, and pid namespace. Empty
    where the system does not tell."""
    pid: int
    started: int
    """When the process started, in clock ticks since the start of the machine: process numbers are
    used again."""
    job: str = ""
    """SLURM job, "" outside of one."""
    restarts: int = 0
    """How often SLURM had started that job again."""
    command: str
    since: str
    """UTC time, ISO 8601."""
    token: str
    """Names this ownership; no other has the same."""
    beat: int = 0

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return shown(
            f"process {self.pid} on {self.host}{job}, since {self.since}: {self.command}", 400
        )


_KIND = FileKind(error=UsageError, advice="delete it if nobody uses the folder", max_bytes=1 << 16)


class _Unwritable(UsageError):
    """The file that names the owner cannot be made."""


def this_process() -> Owner:
    """Return the record of this process as an owner."""
    return Owner(
        host=socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        job=job if (job := os.environ.get("SLURM_JOB_ID", "")).isdecimal() else "",
        restarts=int(count)
        if (count := os.environ.get("SLURM_RESTART_COUNT", "0")).isdecimal()
        else 0,
        command=shown(shlex.join(sys.argv), 300),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )


def owner_file(target: Path, *, inside: bool) -> Path:
    """Return where the owner of `target` is named: in the folder itself, or beside a target that is
    replaced as a whole."""
    return target / FILE if inside else target.with_name(f".{target.name}.{FILE}")


def refuse_if_owned(folder: Path) -> None:
    """Raise UsageError when another living process owns the run folder `folder`; a question whose
    answer takes time is left to `owning`."""
    path = owner_file(folder, inside=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # no owner, or none that can be read; `owning` reports what is wrong with the folder
    try:
        found, free = _read(descriptor), _lock(descriptor)
        # at once: a process that starts now must not take this check for an owner
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        if not free or (found is not None and _known(found, this_process())):
            raise UsageError(_refusal(folder, path, found))
    finally:
        os.close(descriptor)


def owner_of(folder: Path) -> tuple[Owner | None, bool | None]:
    """Return the owner that is named in the run folder `folder`, and whether it still runs; None
    where that cannot be told from here, as of a process on another machine. Changes nothing."""
    path = owner_file(folder, inside=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None, False
    try:
        found = _read(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BlockingIOError:
            return found, True
        except OSError:  # no locks there: the process table, or SLURM, may know
            pass
        return found, None if found is None else _known(found, this_process())
    finally:
        os.close(descriptor)


@contextmanager
def owning(
    target: Path,
    *,
    inside: bool,
    watch_seconds: float = WATCH_SECONDS,
    patience_seconds: float = 1.0,
) -> Iterator[None]:
    """Own `target` for the block. UsageError, which names the owner, when another process does.

    Args:
        target: A folder, which has to exist with `inside`; else any file or folder to be written,
            in a folder that exists.
        inside: Whether the owner is named in the folder itself.
        watch_seconds: How long an owner on another machine without SLURM is watched.
        patience_seconds: How long to wait for an owner that still runs before giving up.
    """
    path = owner_file(target, inside=inside)
    mine = this_process()
    deadline = time.monotonic() + patience_seconds
    while (descriptor := _take(target, path, mine, watch_seconds, deadline)) is None:
        time.sleep(0.1)
    stop = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(target, path, descriptor, mine, stop), name="ownership", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            if not _is_of_another(_read(descriptor), mine) and _is_still(descriptor, path):
                path.unlink()
        os.close(descriptor)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Own the file or folder `target`, which the block makes or replaces as a whole. What killed
    processes left of it is removed first.

    UsageError, which names the owner, when another process is making it, or owns a folder that it
    lies in. Where nothing can be written nothing is owned, and the block fails by itself.
    """
    for folder in target.absolute().parents:
        refuse_if_owned(folder)  # a run that is under way may read or write there
    with ExitStack() as stack:
        with contextlib.suppress(OSError, _Unwritable):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owning(target, inside=False))
            sweep(target.parent, names=(target.name,))
        yield


def _take(
    target: Path, path: Path, mine: Owner, watch_seconds: float, deadline: float
) -> int | None:
    """Make this process the owner, and return the open, locked file; None when another try is due.
    UsageError after the deadline."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _Unwritable(
            f"{path}: cannot be written ({error.strerror}), and it marks a folder that is in use; "
            "choose another place"
        ) from error
    taken = False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Unwritable(
                f"{path}: not an ordinary file, and it marks a folder that is in use; delete it, "
                "or choose another place"
            )
        locked, found = _lock(descriptor), _read(descriptor)
        lives = not locked or (found is not None and _lives(found, mine, path, watch_seconds))
        if not _is_still(descriptor, path):
            return None  # its owner has just removed it
        if lives:
            if time.monotonic() < deadline:
                return None
            raise UsageError(_refusal(target, path, found))
        if found is not None:
            logger.warning(
                "%s was in use by %s, which is gone; this command now owns it", target, found
            )
        # a full disk; the lock counts, and who saves says that the disk is full
        with contextlib.suppress(OSError):
            _write(descriptor, mine)
        if not _is_local(path):
            time.sleep(_NETWORK_SETTLE_SECONDS)
            if _is_of_another(found := _read_path(path), mine):
                raise UsageError(_refusal(target, path, found))
        taken = True
        return descriptor
    finally:
        if not taken:
            os.close(descriptor)


def _refusal(target: Path, path: Path, owner: Owner | None) -> str:
    who = f"is in use by {owner}" if owner is not None else "is in use by another process"
    return (
        f"{target} {who}. Two commands in one folder would overwrite each other's work: "
        "wait for it, or end it, or choose another place. "
        f"If it is certain that nothing uses the folder, delete {path}"
    )


def _lives(found: Owner, mine: Owner, path: Path, watch_seconds: float) -> bool:
    """Return whether the owner of a file that is not locked still runs; may take
    `watch_seconds`."""
    if (known := _known(found, mine)) is not None:
        return known
    logger.warning(
        "%s says that %s uses the folder; waiting up to %.0f s for a sign of it",
        path,
        found,
        watch_seconds,
    )
    deadline = time.monotonic() + watch_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, watch_seconds / 10))
        if _read_path(path) != found:
            return True
    return False


def _known(found: Owner, mine: Owner) -> bool | None:
    """Return whether an owner still runs by the process table or SLURM; None when neither knows."""
    if found.boot and found.boot == mine.boot:
        return _started(found.pid) == found.started
    if found.job and found.job == mine.job:
        # SLURM starts a job again only after its end
        return False if found.restarts < mine.restarts else None
    return False if _is_over(found.job) else None


def _is_over(job: str) -> bool:
    """Return whether SLURM says that a job has ended, or waits for another start. A running job
    decides nothing: a process may end before its job."""
    if not job.isdecimal():
        return False
    try:
        words = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
        done = subprocess.run(
            words,
            env=own_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode != 0:
        return "Invalid job id" in done.stderr
    # PENDING: the job waits for another start, and the one that owned the folder is over
    return not {"RUNNING", "SUSPENDED", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED"} & set(
        done.stdout.split()
    )


def _beat(target: Path, path: Path, descriptor: int, mine: Owner, stop: threading.Event) -> None:
    """Write the growing number; end the process when the file was deleted or names another one."""
    beat = 0
    while not stop.wait(BEAT_SECONDS):
        beat += 1
        try:
            if _is_of_another(_read(descriptor), mine) or not _is_still(descriptor, path):
                # to save and leave in good order would be to write where another process writes
                print(
                    f"error: {path} no longer names this process: {target} was taken over, "
                    "so it ends here",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(UsageError.exit_code)
            _write(descriptor, replace(mine, beat=beat))
        except OSError as error:  # a full disk, a server that is away: the next beat may succeed
            logger.debug("%s: %s", path, error)


def _write(descriptor: int, owner: Owner) -> None:
    content = (json.dumps(asdict(owner), indent=2) + "\n").encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)


def _read(descriptor: int) -> Owner | None:
    """Return the owner in an open file; None for an empty or unreadable one, as a killed process
    may leave it."""
    try:
        text = os.pread(descriptor, _KIND.max_bytes, 0).decode("utf-8")
        return (
            typed(_KIND, FILE, parse_json(_KIND, FILE, text), Owner)
            if text.strip("\0 \n")
            else None
        )
    except (OSError, UnicodeDecodeError, UsageError):
        return None


def _read_path(path: Path) -> Owner | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _is_of_another(found: Owner | None, mine: Owner) -> bool:
    """Return whether a record names another owner. None names nobody: a full disk leaves the file
    empty."""
    return found is not None and found.token != mine.token


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False when another process has it locked.

    True where the file system has no locks: then the content of the file decides.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Return whether `path` still is the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_local(path: Path) -> bool:
    """Return whether all processes that can see `path` also see its lock, because its file system
    belongs to this machine."""
    try:
        mounts = [
            line.split()
            for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        ]
    except OSError:
        return True
    real = os.path.realpath(path.parent)
    best = ""
    kind = ""
    for fields in mounts:
        # only space, tab, line break and backslash are written as octal numbers
        place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), fields[4])
        if os.path.commonpath((real, place)) == place and len(place) >= len(best):
            best = place
            kind = fields[fields.index("-") + 1]
    # a root that the table does not show, as under chroot
    return kind in _LOCAL_FILE_SYSTEMS or not kind


def _boot() -> str:
    try:
        number = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{number}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since the machine started; None when there
    is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] == "Z" else int(fields[19])
