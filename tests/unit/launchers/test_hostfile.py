"""Hostfiles, addresses, ports, variables and hosts: read and resolved the same way every time, or
refused with one clear error."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import hostfile
from launchers.hostfile import (
    Host,
    environment_file,
    packed,
    planned,
    port_of,
    read_hostfile,
    unpacked,
    variables,
    without_secrets,
)
from megatron_hypenet.errors import SetupError, UsageError

WORKERS = (Host("worker-1", 8), Host("worker-2", 4))


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """`ssh` and `pdsh` found first are programs of ours: every host is an address from `addresses`,
    and commands are done here."""
    tools = tmp_path / "tools"
    tools.mkdir()
    addresses = {"worker-1": "10.0.0.1", "worker-2": "10.0.0.2"}

    def write(refusing="nobody"):
        lines = [
            "#!/bin/sh",
            'while [ "$1" = -o ]; do shift 2; done',
            'if [ "$1" = -G ]; then case "$2" in',
        ]
        lines += [f"{name}) echo hostname {address};;" for name, address in addresses.items()]
        lines += ['*) echo "hostname $2";;', "esac; exit; fi"]
        lines += [
            f'if [ "$1" = {refusing} ]; then echo "$1: Permission denied (publickey)." >&2; '
            "exit 255; fi",
            "shift",
            'eval "$@"',
        ]
        for name, text in (("ssh", "\n".join(lines)), ("pdsh", "#!/bin/sh")):
            (tools / name).write_text(text + "\n")
            (tools / name).chmod(0o755)

    write()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    monkeypatch.delenv("HYPENET_MASTER_PORT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "hosts").write_text("worker-1 slots=8\nworker-2 slots=4\n")
    write.addresses = addresses
    return write


def test_a_hostfile_is_read_in_its_order(tmp_path):
    (tmp_path / "hosts").write_text(
        "# ours\n\nworker-2 slots=4  # the small one\nme@10.0.0.7   slots=8\n"
    )
    assert read_hostfile(tmp_path / "hosts") == (Host("worker-2", 4), Host("me@10.0.0.7", 8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker-1\n", ":1: 'worker-1' is not of the form `worker-1 slots=8`"),
        ("a slots=1\nb slots=0\n", ":2: 'b slots=0' is not of the form"),
        ("worker-[1-4] slots=8\n", ":1: 'worker-[1-4]' is not a host's name"),
        ("-oProxyCommand=x slots=8\n", ":1: '-oProxyCommand=x' is not a host's name"),
        ("a slots=1\n-v slots=8\n", ":2: '-v' is not a host's name"),
        ("a slots=1\n^b slots=8\n", ":2: '^b' is not a host's name"),
        ("a slots=1 # x\rb slots=8\n", ":1: 'a slots=1 # x\\rb slots=8' holds a control character"),
        ("a\x1b[2J slots=1\n", "holds a control character"),
        ("a slots=\u0664\n", "is not of the form"),
        ("a slots=10000\n", "is not of the form"),
        ("a slots=1\nme@A slots=2\n", ":2: me@A is there twice"),
        ("a slots=1\0\n", "holds a NUL character"),
        ("#" * (1 << 20) + "\na slots=1\n", "larger than 1 MiB"),
        ("a slots=1\n\na slots=2\n", ":3: a is there twice"),
        ("# nobody\n", "names no host"),
        (None, "no such file"),
    ],
)
def test_a_hostfile_that_is_not_one(tmp_path, text, said):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(SetupError) as error:
        read_hostfile(tmp_path / "hosts")
    assert said in str(error.value) and str(tmp_path / "hosts") in str(error.value)


def test_the_whole_start_is_known_beforehand(ssh, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("PYTHONPATH", "src")
    launch = planned(["train", "x.yaml", "note=two words"], Path("hosts"))
    assert (launch.num_processes, launch.address) == (
        12,
        "10.0.0.1",
    ) and 10000 <= launch.port < 30000
    content = launch.describe()
    words = shlex.split(content["command"])
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert (
        words[words.index("--hostfile") + 1] == str(tmp_path / "hosts")
        and words[words.index("--master_addr") + 1] == "10.0.0.1"
    )
    assert words[words.index("--master_port") + 1] == str(launch.port) and "--force_multi" in words
    module = words.index("launchers.hostfile_rank")
    assert words[module - 1] == "--module" and [
        unpacked(word) for word in words[module + 1 :]
    ] == list(launch.words)
    assert [entry["ranks"] for entry in content["hosts"]] == [list(range(8)), list(range(8, 12))]
    assert (
        content["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"
        and content["environment"]["PYTHONPATH"] == f"{tmp_path}:src"
    )
    assert content["command_environment"]["PDSH_SSH_ARGS_APPEND"].startswith(
        "-o ServerAliveInterval=15 "
    )
    assert (
        "  worker-2: ranks 8 to 11" in launch.lines()
        and "  with NCCL_SOCKET_IFNAME=ib0" in launch.lines()
    )
    assert planned(["train", "x.yaml", "note=two words"], Path("hosts")) == launch


def test_deepspeeds_own_launcher_understands_the_command(ssh):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    launch = planned(["run", "--tp", "2", "a=b c"], Path("hosts"))
    found = runner.parse_args(launch.command[3:])
    assert (found.hostfile, found.launcher, found.launcher_args, found.force_multi) == (
        str(launch.hostfile),
        "pdsh",
        "-N",
        True,
    )
    assert (found.master_addr, found.master_port, found.module, found.no_local_rank) == (
        launch.address,
        launch.port,
        True,
        True,
    )
    assert found.user_script == "launchers.hostfile_rank" and [
        unpacked(word) for word in found.user_args
    ] == list(launch.words)
    assert runner.fetch_hostfile(str(launch.hostfile)) == {
        host.name: host.slots for host in launch.hosts
    }


def test_hosts_that_ssh_cannot_reach_are_all_named(ssh):
    ssh(refusing="worker-2")
    with pytest.raises(SetupError) as error:
        planned(["run"], Path("hosts"))
    said = str(error.value).splitlines()
    assert said[0] == "1 of 2 hosts cannot be used:"
    assert (
        said[1]
        == "  worker-2: ssh: worker-2: Permission denied (publickey).; it must work without a "
        "password"
    )


def test_a_host_without_the_same_folder(ssh):
    hostfile.check_reachable(WORKERS, os.getcwd())
    with pytest.raises(
        SetupError, match=r"worker-1: it has no .* or no .*; both must be the same on all hosts"
    ):
        hostfile.check_reachable(WORKERS, "/nowhere")


def test_names_that_nobody_knows(ssh):
    ssh.addresses["worker-1"] = "no-such-host.invalid"
    ssh()
    with pytest.raises(
        SetupError,
        match=r"host 'worker-1' of the hostfile cannot be looked up \(no-such-host.invalid\)",
    ):
        planned(["run"], Path("hosts"))


def test_a_head_that_every_host_takes_for_itself(ssh):
    ssh.addresses["worker-1"] = "127.0.1.1"
    ssh()
    with pytest.raises(
        SetupError,
        match=r"the first host, worker-1, is 127.0.1.1 here, which for every other host is itself",
    ):
        planned(["run"], Path("hosts"))
    ssh.addresses["worker-2"] = "127.0.0.2"
    ssh()
    assert planned(["run"], Path("hosts")).address == "127.0.1.1"


def test_missing_tools_are_named(ssh, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        SetupError, match=r"needs ssh and pdsh, not found here; apt-get install openssh-client pdsh"
    ):
        planned(["run"], Path("hosts"))


def test_a_folder_that_a_shell_would_split(ssh, tmp_path, monkeypatch):
    (tmp_path / "my run").mkdir()
    monkeypatch.chdir(tmp_path / "my run")
    with pytest.raises(
        SetupError,
        match="the working directory is .*my run, and DeepSpeed's launcher hands it to a shell "
        "without quotes",
    ):
        planned(["run"], tmp_path / "hosts")


def test_ports_follow_from_hosts_folder_and_command():
    ports = {
        port_of(WORKERS, folder, words, {})
        for folder in ("/a", "/b")
        for words in (["run"], ["train"])
    }
    assert len(ports) == 4 and all(10000 <= port < 30000 for port in ports)
    assert port_of(WORKERS, "/a", ["run"], {}) == port_of(WORKERS, "/a", ["run"], {})
    assert port_of(WORKERS, "/a", ["run"], {"HYPENET_MASTER_PORT": "4711"}) == 4711
    for wrong in ("0", "65536", "here"):
        with pytest.raises(SetupError, match=f"HYPENET_MASTER_PORT={wrong!r} is not a port"):
            port_of(WORKERS, "/a", ["run"], {"HYPENET_MASTER_PORT": wrong})


def test_variables_go_by_name_and_secrets_never(ssh, tmp_path):
    mine = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "t",
        "MLFLOW_TRACKING_PASSWORD": "p",
        "PYTHONPATH": "src",
        "EDITOR": "vi",
        "WANDB_API_KEY": "k",
    }
    assert variables(mine, ()) == {"NCCL_DEBUG": "INFO"}
    assert variables(mine, ["EDITOR"]) == {"NCCL_DEBUG": "INFO", "EDITOR": "vi"}
    assert without_secrets(mine) == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "src", "EDITOR": "vi"}
    for names, said in (
        (["API_KEY"], "looks like a secret"),
        (["A=b"], "not a variable's name"),
        (["NOT_SET"], "it is not set here"),
    ):
        with pytest.raises(UsageError, match=said):
            variables(mine, names)
    for value in ("a\nb", "a\r", "a\u2028b", "a\udcff"):
        with pytest.raises(SetupError, match="NCCL_X has several lines or is no UTF-8 text"):
            variables({"NCCL_X": value}, ())


def test_deepspeeds_file_of_variables_counts(ssh, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nFROM_HOME=1\n")
    (tmp_path / ".deepspeed_env").write_text("FROM_HERE=a b\n")
    assert variables({"NCCL_DEBUG": "INFO"}, ()) == {
        "NCCL_DEBUG": "WARN",
        "FROM_HOME": "1",
        "FROM_HERE": "a b",
    }
    (tmp_path / ".deepspeed_env").write_text("HF_TOKEN=t\n")
    with pytest.raises(
        UsageError, match=r"\.deepspeed_env sets HF_TOKEN, which looks like a secret"
    ):
        variables({}, ())
    (tmp_path / ".deepspeed_env").write_bytes(b"A=\xff\n")
    with pytest.raises(SetupError, match=r"\.deepspeed_env: not UTF-8 text"):
        variables({}, ())
    (tmp_path / ".deepspeed_env").write_text("export\n")
    with pytest.raises(SetupError, match="'export' is not of the form NAME=VALUE"):
        variables({}, ())


def test_values_survive_deepspeeds_quoting_and_a_shell(tmp_path):
    runners = pytest.importorskip("deepspeed.launcher.multinode_runner")
    values = {"PLAIN": "ib0,ib1:2", "ODD": 'a "b" $HOME `c` \\d 100% é'}
    runner = runners.PDSHRunner.__new__(runners.PDSHRunner)
    runner.exports = {}
    for line in environment_file(values).splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    # pdsh's part
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items()).replace(
        "%%", "%"
    )
    show = subprocess.run(
        ["sh", "-c", exports + 'printf "%s\\n" "$PLAIN" "$ODD"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert show.stdout.splitlines() == list(values.values())


def test_words_stay_readable_where_they_can():
    for word in ("train", "configs/run/demo.yaml", "align.lr=3e-4", "--tp", "data=a,b:c"):
        assert packed(word) == word
    for word in ("a b", "$HOME", "100%", "it's", "[1,2]", "@x", "", "é"):
        assert (
            packed(word).startswith("@")
            and packed(packed(word)) != packed(word)
            and unpacked(packed(word)) == word
        )


def test_a_hostfile_with_other_line_ends(tmp_path):
    (tmp_path / "hosts").write_bytes(b"a\tslots=1\r\nb slots=2\r\n")
    assert read_hostfile(tmp_path / "hosts") == (Host("a", 1), Host("b", 2))


def test_options_for_ssh_that_are_not_closed(ssh, tmp_path, monkeypatch):
    ssh()
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'User=x")
    with pytest.raises(SetupError, match="PDSH_SSH_ARGS_APPEND=.* cannot be split into words"):
        planned(["run"], tmp_path / "hosts")
