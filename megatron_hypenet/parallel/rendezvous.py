"""Where the processes of a run meet, and on which network interfaces they listen: no more of them
than the launcher needs.

Rank 0 opens torch's store at the launcher's address and no other; torch alone would open it on
every interface, without any authentication. gloo and NCCL listen on the interface that leads there,
which for processes of one machine is loopback.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_hypenet.errors import SetupError
from megatron_hypenet.process_place import CHOSEN_PORT, PLACE, Place, launched_place

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"
_NCCL_FILES = ("/etc/nccl.conf", "~/.nccl.conf")
# length of the queue of connections: all processes of a large run connect at the same moment
_BACKLOG = 2048
_NOTE_SECONDS = 60
_RETRY_SECONDS = 0.2
_TRY_SECONDS = 5
_ADVICE = f"where no launcher started this command, unset {' '.join(PLACE)}"


@dataclass(frozen=True, slots=True)
class Meeting:
    """The launcher's processes at the store of rank 0, before torch.distributed runs: each can
    write to it without waiting for the others."""

    store: dist.Store
    rank: int
    world_size: int


def meeting_point(timeout: timedelta) -> Meeting | None:
    """Connect to the store at the launcher's address, which rank 0 opens unless its launcher has;
    None without a launcher.

    `timeout` is the store's: for connecting, and for every later `get`. Raises SetupError where the
    launcher's variables are inconsistent, the port is taken, or rank 0 cannot be reached.
    """
    place = launched_place()
    if place is None:
        return None
    # torchrun's agent has opened the store before it starts its processes, and keeps it when it
    # starts them again
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = place.rank == 0 and not agent
    store = _opened(place, timeout) if opens else _reached(place, timeout)
    if agent:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"hypenet/attempt-{attempt}", store)
    return Meeting(store=store, rank=place.rank, world_size=place.world_size)


def _opened(place: Place, timeout: timedelta) -> dist.Store:
    """Return the store of rank 0, which opens it."""
    descriptor = listening(place).detach()
    return dist.TCPStore(
        place.master,
        place.port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


def _reached(place: Place, timeout: timedelta) -> dist.Store:
    """Return the store that rank 0 or torchrun's agent opens; says after a minute that it is not
    there yet.

    torch alone would try silently and without handling signals, and wait for ever where another
    program accepts its connection and does not answer. It therefore connects in a thread.
    """
    who = f"rank {place.rank} on {socket.gethostname()}"
    where = f"{place.master}:{place.port}"
    found: queue.SimpleQueue[dist.Store | RuntimeError] = queue.SimpleQueue()
    begin = time.monotonic()
    said = False
    trying = False
    while (waited := time.monotonic() - begin) < timeout.total_seconds():
        if not trying and (trying := _answers(place)):
            threading.Thread(target=_connect, args=(place, timeout, found), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            outcome = found.get(timeout=_RETRY_SECONDS)
            if isinstance(outcome, RuntimeError):
                break
            return outcome
        if waited > _NOTE_SECONDS and not said:
            minutes = timeout.total_seconds() / 60
            log.warning("%s waits for rank 0 at %s, for up to %.0f minutes", who, where, minutes)
            said = True
    why = "what listens there does not answer as its store" if trying else "nothing listens there"
    raise SetupError(
        f"{who} cannot reach rank 0 at {where} within {timeout.total_seconds():.0f} s: {why}. "
        "Look at "
        f"the log of rank 0, or for a firewall; {_ADVICE}"
    )


def _connect(place: Place, timeout: timedelta, found: queue.SimpleQueue[Any]) -> None:
    try:
        store = dist.TCPStore(
            place.master, place.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
        found.put(store)
    except RuntimeError as error:  # what torch calls its network errors depends on its version
        found.put(error)


def _answers(place: Place) -> bool:
    """Return whether something listens at rank 0's address."""
    try:
        socket.create_connection((place.master, place.port), timeout=_TRY_SECONDS).close()
        return True
    except (OSError, UnicodeError):
        return False


def listening(place: Place) -> socket.socket:
    """Return a socket that listens at the launcher's address alone. Raises SetupError where it
    cannot be looked up or the port is taken.

    For two kinds of addresses it listens on all interfaces, and the log says so: one that this
    machine does not have, as behind a translation of addresses, and a name that means loopback here
    (127.0.1.1 in /etc/hosts) and something else on the other machines.
    """
    found = _addresses(place.master, place.port)
    faults: list[OSError] = []
    for family, target in [] if _means_loopback_only_here(place) else found:
        try:
            return _bound(family, target)
        except OSError as error:
            faults.append(error)
    family = found[0][0]
    port = place.port
    try:
        if all(fault.errno == errno.EADDRNOTAVAIL for fault in faults):
            log.warning(
                "%s is not this machine's address for others: rank 0 listens on all interfaces, "
                "port %d",
                place.master,
                port,
            )
            return _bound(family, ("0.0.0.0" if family == socket.AF_INET else "::", port))  # noqa: S104
    except OSError as error:
        faults = [error]
    raise SetupError(
        f"port {port} of {place.master} ({socket.gethostname()}), where rank 0 would listen: "
        f"{faults[0].strerror}; something else has it, perhaps another run. Start again; "
        "on a cluster "
        f"{CHOSEN_PORT} chooses another port"
    )


def _bound(family: int, target: tuple[str, int]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(target)
        one.listen(_BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _addresses(name: str, port: int) -> list[tuple[int, Any]]:
    """Return the (family, address) pairs of `name`. Raises SetupError where there is none."""
    try:
        return [
            (entry[0], entry[4])
            for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        ]
    except (OSError, UnicodeError) as error:
        raise SetupError(
            f"the address of rank 0, {name!r}, cannot be looked up on {socket.gethostname()}: "
            f"{error}; give an address that this machine knows, or {_ADVICE}"
        ) from error


def _means_loopback_only_here(place: Place) -> bool:
    """Return whether rank 0's address is a name for loopback on this machine although other
    machines take part, for which it has to be another."""
    try:
        ipaddress.ip_address(place.master.partition("%")[0])
        return False
    except ValueError:
        elsewhere = place.local_size != place.world_size and place.master != "localhost"
    return elsewhere and any(
        _parsed(target[0]).is_loopback for _, target in _addresses(place.master, place.port)
    )


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])


def wait_for_all(meeting: Meeting, timeout: timedelta) -> None:
    """Return when every process has reached the store. Raises SetupError on each of them that names
    the processes that did not in time."""
    store = meeting.store
    others = range(1, meeting.world_size)
    store.set(f"here/{meeting.rank}", "")
    if meeting.rank == 0:
        missing = _missing(store, others, min(timeout, timedelta(seconds=_NOTE_SECONDS)))
        if missing and timeout.total_seconds() > _NOTE_SECONDS:
            log.warning(
                "%s; waiting for up to %.0f minutes",
                _absent(missing, meeting),
                timeout.total_seconds() / 60,
            )
            missing = _missing(store, missing, timeout - timedelta(seconds=_NOTE_SECONDS))
        store.set("here", _absent(missing, meeting) if missing else "all")
    try:
        store.wait(["here"], timeout + timedelta(seconds=_NOTE_SECONDS))
        found = store.get("here").decode()
    except RuntimeError as error:
        raise SetupError(
            f"rank 0 has not said within {timeout.total_seconds():.0f} s whether all processes are "
            f"there: {error}; look at the log of rank 0"
        ) from error
    if found != "all":
        raise SetupError(
            f"{found} after {timeout.total_seconds():.0f} s. Look at their logs; {_ADVICE}"
        )


def _missing(store: dist.Store, ranks: Sequence[int], timeout: timedelta) -> list[int]:
    """Return the `ranks` that have not reached the store within `timeout`."""
    try:
        if ranks:
            store.wait([f"here/{rank}" for rank in ranks], timeout)
        return []
    except RuntimeError:
        return [rank for rank in ranks if not store.check([f"here/{rank}"])]


def _absent(missing: Sequence[int], meeting: Meeting) -> str:
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    size = meeting.world_size
    return f"{len(missing)} of {size} processes have not come (WORLD_SIZE={size}): rank {named}"


def choose_interfaces(place: Place | None) -> None:
    """Make gloo and NCCL listen on the interface that leads to rank 0, loopback without other
    processes; variables that are set already stay."""
    if place is None:
        name = interface_of(LOOPBACK)
    elif _means_loopback_only_here(place):
        name = None
    else:
        name = interface_to(place.master, place.port)
    if name is None:
        return  # their own choice
    os.environ.setdefault(GLOO, name)
    if not _nccl_is_told():
        os.environ.setdefault(NCCL, f"={name}")  # = for this name, and not all that begin with it


def interface_to(address: str, port: int) -> str | None:
    """Return the name of the interface whose address this machine would connect from; None where it
    cannot be found."""
    for family, target in _addresses(address, port):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)  # sends nothing
            except OSError:
                continue
            return interface_of(str(probe.getsockname()[0]))
    return None


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has `address`; None where none has it. All addresses of
    loopback are on the one interface."""
    wanted = _parsed(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                has = _parsed(entry.address)
                if has == wanted or (has.is_loopback and wanted.is_loopback):
                    return str(name)
    return None


def _nccl_is_told() -> bool:
    """Return whether NCCL's own files, which a variable would override, name an interface."""
    files = [os.environ["NCCL_CONF_FILE"]] if "NCCL_CONF_FILE" in os.environ else _NCCL_FILES
    for file in files:
        try:
            if NCCL in Path(file).expanduser().read_text(encoding="utf-8", errors="replace"):
                return True
        except (OSError, RuntimeError):  # RuntimeError: no home folder
            continue
    return False
