"""Where processes meet and listen: at the launcher's address only, with errors that say what to
do."""

import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from launchers.local import held_port
from megatron_hypenet.errors import SetupError
from megatron_hypenet.parallel import rendezvous
from megatron_hypenet.parallel.rendezvous import (
    Meeting,
    interface_of,
    interface_to,
    listening,
    wait_for_all,
)
from megatron_hypenet.process_place import Place

# what a process that has started its groups listens on, asked of the kernel
LISTENERS = """
import psutil
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups
groups.init_parallel(ParallelConfig())
groups.barrier()
sockets = psutil.Process().net_connections("inet")
print(*sorted({one.laddr.ip for one in sockets if one.status == "LISTEN"}), flush=True)
groups.barrier()
groups.destroy_parallel()
"""


def at(address, port=0, world_size=2, local_size=2):
    return Place(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_size=local_size,
        master=address,
        port=port,
    )


def started(**variables):
    names = ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", LISTENERS]
    return subprocess.Popen(
        command,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out.strip(), err


def test_one_process_listens_on_loopback_only():
    code, out, err = outcome(started())
    assert code == 0 and out in ("127.0.0.1", ""), err


def test_two_processes_of_one_machine_listen_on_loopback_only():
    with held_port() as port:
        common = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        both = [started(**common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        found = [outcome(process) for process in both]
    assert [(code, out) for code, out, _ in found] == [(0, "127.0.0.1")] * 2, found


def test_the_store_listens_at_the_address_of_the_head():
    own = next(
        (name for name in _addresses_of_this_machine() if not name.startswith("127.")), "127.0.0.1"
    )
    with listening(at(own)) as store:
        assert store.getsockname()[0] == own


def _addresses_of_this_machine():
    return [
        entry[4][0]
        for entry in socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET)
    ]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            SetupError,
            match=rf"port {port} of 127\.0\.0\.1 .*Address already in use.*HYPENET_MASTER_PORT",
        ):
            listening(at("127.0.0.1", port))


@pytest.mark.parametrize("place", [at("192.0.2.77"), at("head.test", world_size=4)])
def test_an_address_that_others_know_differently_leaves_all_interfaces(monkeypatch, caplog, place):
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, *words, **more: real(
            "127.0.1.1" if name == "head.test" else name, *words, **more
        ),
    )
    with listening(place) as store:
        assert store.getsockname()[0] == "0.0.0.0"
    assert f"{place.master} is not this machine's address for others" in caplog.text


def test_a_name_of_loopback_is_right_where_all_processes_are_here(monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *words, **more: real("127.0.1.1", *words, **more)
    )
    with listening(at("head.test")) as store:
        assert store.getsockname()[0] == "127.0.1.1"


def test_an_address_that_nobody_knows():
    with pytest.raises(
        SetupError, match=r"rank 0, 'no-such-host\.invalid', cannot be looked up on"
    ):
        listening(at("no-such-host.invalid"))


def test_rank_0_that_is_not_there_is_named(monkeypatch):
    with held_port() as port:
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            SetupError,
            match=rf"rank 1 on .* cannot reach rank 0 at 127\.0\.0\.1:{port} within 1 s: "
            r".*unset RANK",
        ):
            rendezvous.meeting_point(timedelta(seconds=1))


def meetings(count, there):
    """Connect the first `there` of `count` processes at one store."""
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    clients = [
        dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        for _ in range(there - 1)
    ]
    return [Meeting(store, rank, count) for rank, store in enumerate([server, *clients])]


def test_all_go_on_when_all_are_there():
    found = meetings(3, 3)
    threads = [
        threading.Thread(target=wait_for_all, args=(one, timedelta(seconds=20)))
        for one in found[1:]
    ]
    for thread in threads:
        thread.start()
    wait_for_all(found[0], timedelta(seconds=20))
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_everybody_hears_who_has_not_come():
    found = meetings(4, 2)
    faults = []

    def wait(one):
        with pytest.raises(SetupError) as fault:
            wait_for_all(one, timedelta(seconds=1))
        faults.append(str(fault.value))

    other = threading.Thread(target=wait, args=(found[1],))
    other.start()
    wait(found[0])
    other.join(20)
    assert len(faults) == 2 and faults[0] == faults[1]
    assert faults[0].startswith(
        "2 of 4 processes have not come (WORLD_SIZE=4): rank 2, 3 after 1 s"
    )
    assert "unset RANK LOCAL_RANK WORLD_SIZE" in faults[0]


def test_interfaces():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == interface_to("127.0.0.1", 1)
    assert interface_of("192.0.2.77") is None


def chosen(monkeypatch, place):
    for name in (rendezvous.GLOO, rendezvous.NCCL):
        monkeypatch.setattr(
            os, "environ", {key: value for key, value in os.environ.items() if key != name}
        )
    monkeypatch.setattr(rendezvous, "_NCCL_FILES", ())
    rendezvous.choose_interfaces(place)
    return os.environ.get(rendezvous.GLOO), os.environ.get(rendezvous.NCCL)


def test_gloo_and_nccl_listen_where_the_head_is(monkeypatch):
    loopback = interface_of("127.0.0.1")
    assert (
        chosen(monkeypatch, None)
        == chosen(monkeypatch, at("127.0.0.1"))
        == (loopback, f"={loopback}")
    )
    monkeypatch.setattr(rendezvous, "interface_to", lambda address, port: "ib7")
    assert chosen(monkeypatch, at("10.0.0.1", world_size=4)) == ("ib7", "=ib7")


def test_what_cannot_be_told_is_left_to_the_libraries(monkeypatch):
    monkeypatch.setattr(rendezvous, "interface_to", lambda address, port: None)
    assert chosen(monkeypatch, at("10.0.0.1", world_size=4)) == (None, None)


def test_a_choice_of_the_users_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(rendezvous.GLOO, "eth7")
    monkeypatch.setenv(rendezvous.NCCL, "^docker0")
    rendezvous.choose_interfaces(None)
    assert (os.environ[rendezvous.GLOO], os.environ[rendezvous.NCCL]) == ("eth7", "^docker0")
    (tmp_path / "nccl.conf").write_text("NCCL_SOCKET_IFNAME=ib0\n")
    monkeypatch.delenv(rendezvous.NCCL)
    monkeypatch.setenv("NCCL_CONF_FILE", str(tmp_path / "nccl.conf"))
    rendezvous.choose_interfaces(None)
    assert rendezvous.NCCL not in os.environ


def test_something_else_at_the_port_of_rank_0_is_no_store():
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = at("127.0.0.1", other.getsockname()[1])
        with pytest.raises(
            SetupError, match="within 1 s: what listens there does not answer as its"
        ):
            rendezvous._reached(place, timedelta(seconds=1))
