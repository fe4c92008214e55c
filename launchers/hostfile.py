"""Processes of one `hypenet` command on the hosts of a hostfile: DeepSpeed's launcher over pdsh and
ssh, one process per slot.

    worker-1 slots=8
    worker-2 slots=8

Rank 0 is on the first host, where the others connect to it. DeepSpeed alone would run on this
machine where the hostfile is missing, take the first address that `hostname -I` names, and print
every variable that it passes on; here each of these is decided or refused beforehand.
launchers/hostfile_job.py runs what is planned here, launchers/hostfile_rank.py is what DeepSpeed
starts on the hosts.

One file, because reading a hostfile, the command and the checks of its hosts share what a host is;
what runs is elsewhere.
"""

from __future__ import annotations

import base64
import concurrent.futures
import importlib.util
import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import SetupError, UsageError
from megatron_hypenet.process_place import chosen_port, is_host
from megatron_hypenet.untrusted.files import MIB, FileKind, has_entry, shown

HOSTFILE = FileKind(
    error=SetupError, advice="a hostfile has lines such as `worker-1 slots=8`", max_bytes=MIB
)
"""What --hostfile names."""
_VARIABLES = FileKind(
    error=SetupError, advice="it has lines of the form NAME=VALUE, as DeepSpeed reads it"
)
"""DeepSpeed's file of variables."""

CARRIED = (
    "GLOO_",
    "HF_",
    "HYPENET_",
    "MLFLOW",
    "MV2",
    "NCCL",
    "OMP_",
    "PYTHON",
    "TORCH_",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX",
)
"""Prefixes of variables that are passed to the hosts by default: those that DeepSpeed passes on,
and settings of the libraries in use."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY(?!BOARD)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_]\w*")
_SSH_SECONDS = 10
_NOTICES_DEAD_HOSTS = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# below the range from which systems take ports for outgoing connections
_LOWEST_PORT = 10000
_PORTS = 20000


@dataclass(frozen=True, slots=True)
class Host:
    """One line of a hostfile."""

    name: str
    """A name or address that ssh knows, perhaps as user@name."""
    slots: int
    """Processes there, each with the GPU of its number."""


@dataclass(frozen=True, kw_only=True)
class HostfileLaunch:
    """One process of a command for every slot of a hostfile, all names resolved."""

    words: tuple[str, ...]
    """The words after `hypenet`."""
    hostfile: Path
    hosts: tuple[Host, ...]
    address: str
    """Where rank 0 listens."""
    port: int
    variables: Mapping[str, str]
    """What the processes get on top of their host's own environment."""
    grace_seconds: float = 10.0
    """Time the others have to end by themselves after one failed."""

    @property
    def num_processes(self) -> int:
        """Return the number of processes: all slots together."""
        return sum(host.slots for host in self.hosts)

    @property
    def command(self) -> tuple[str, ...]:
        """Return DeepSpeed's launcher, as `deepspeed` would start it: this interpreter needs no
        console script on the PATH."""
        return (
            *(
                sys.executable,
                "-m",
                "deepspeed.launcher.runner",
                "--hostfile",
                str(self.hostfile),
                "--launcher",
                "pdsh",
            ),
            "--launcher_args=-N",  # lines as they are, without a host's name before each
            "--force_multi",  # over ssh even where there is one host
            "--no_ssh_check",  # all hosts were asked, not only the first
            *("--master_addr", self.address, "--master_port", str(self.port), "--no_local_rank"),
            *("--module", "launchers.hostfile_rank", *map(packed, self.words)),
        )

    @property
    def ssh_options(self) -> str:
        """Return what pdsh gives to ssh: your PDSH_SSH_ARGS_APPEND, and after a minute without an
        answer a connection ends."""
        return f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {_NOTICES_DEAD_HOSTS}".strip()

    def describe(self) -> dict[str, Any]:
        """Return the exact start, for --dry-run: the command with its own environment, the hosts
        with their ranks, and the environment there."""
        first = 0
        hosts = []
        for host in self.hosts:
            hosts.append({"host": host.name, "ranks": list(range(first, first + host.slots))})
            first += host.slots
        # DeepSpeed's doing
        search = ":".join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        environment = {"PYTHONPATH": search, **self.variables}
        return {
            "launcher": "hostfile",
            "command": shlex.join(self.command),
            "command_environment": {
                "PDSH_SSH_ARGS_APPEND": self.ssh_options,
                "DS_ENV_FILE": "a private file with the variables below",
            },
            "hosts": hosts,
            "environment": environment,
        }

    def lines(self) -> list[str]:
        """Return `describe` as lines for a person."""
        content = self.describe()
        return [
            f"start through DeepSpeed's launcher: {content['command']}",
            *(
                f"  where {name} is {value}"
                for name, value in content["command_environment"].items()
            ),
            *(
                f"  {entry['host']}: ranks {entry['ranks'][0]} to {entry['ranks'][-1]}"
                for entry in content["hosts"]
            ),
            *(
                f"  with {name}={shlex.quote(value)}"
                for name, value in content["environment"].items()
            ),
        ]


def planned(words: Sequence[str], hostfile: Path, names: Sequence[str] = ()) -> HostfileLaunch:
    """Return the start of `hypenet WORDS` on all hosts of `hostfile`, with the variables `names`
    passed on besides those of CARRIED. It checks tools, names, addresses, and on each host, over
    ssh, the interpreter and the working directory. Raises SetupError with all problems of the
    hosts, UsageError for variables that are not set or that look like secrets."""
    hosts = read_hostfile(hostfile)
    _check_tools()
    folder = os.getcwd()
    for what, path in (("the working directory", folder), ("this Python", sys.executable)):
        if packed(path) != path:
            raise SetupError(
                f"{what} is {path}, and DeepSpeed's launcher hands it to a shell without quotes; "
                "use a path of plain letters"
            )
    launch = HostfileLaunch(
        words=tuple(words),
        hostfile=hostfile.resolve(),
        hosts=hosts,
        address=head_address(hosts),
        port=port_of(hosts, folder, words, os.environ),
        variables=variables(os.environ, names),
    )
    check_reachable(hosts, folder)
    return launch


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the hosts, in the order of the file; lines are `NAME slots=N`, empty or comments (#).
    Raises SetupError."""
    hosts: list[Host] = []
    for number, line in enumerate(HOSTFILE.read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r").replace("\t", " ")
        # DeepSpeed, which reads the file again, takes some of these for the end of a line
        if not line.isprintable():
            raise SetupError(
                f"{path}:{number}: {shown(repr(line))} holds a control character; write it anew"
            )
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, slots = (part.strip() for part in text.partition(" "))
        count = re.fullmatch(r"slots=([1-9]\d{0,3})", slots, re.ASCII)
        if count is None:
            raise SetupError(
                f"{path}:{number}: {shown(text)!r} is not of the form `worker-1 slots=8`"
            )
        if not is_host(name):
            raise SetupError(
                f"{path}:{number}: {shown(name)!r} is not a host's name or address: letters, "
                "digits and "
                ". - _ : after a first letter or digit, perhaps with user@ before it, "
                "one host a line"
            )
        if any(
            name.rpartition("@")[2].lower() == host.name.rpartition("@")[2].lower()
            for host in hosts
        ):
            raise SetupError(
                f"{path}:{number}: {name} is there twice; give each host one line with all its "
                "slots"
            )
        hosts.append(Host(name, int(count.group(1))))
    if not hosts:
        raise SetupError(f"hostfile {path} names no host; write lines such as `worker-1 slots=8`")
    return tuple(hosts)


def head_address(hosts: Sequence[Host]) -> str:
    """Return what ssh takes the first host's name for: rank 0 listens there. Raises SetupError
    where the others could not find it by that."""
    address = _ssh_hostname(hosts[0].name)
    if _is_loopback(address) and not all(
        _is_loopback(_ssh_hostname(host.name)) for host in hosts[1:]
    ):
        raise SetupError(
            f"the first host, {hosts[0].name}, is {address} here, which for every other host is "
            "itself; write an address or name into the "
            "hostfile that means this machine everywhere"
        )
    return address


def port_of(
    hosts: Sequence[Host], folder: str, words: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Return the port on which the processes meet: HYPENET_MASTER_PORT, else one in 10000 to 29999
    that follows from hosts, folder and command."""
    if (chosen := chosen_port(environment)) is not None:
        return chosen
    text = "\n".join([*(host.name for host in hosts), folder, *words])
    return _LOWEST_PORT + zlib.crc32(text.encode(errors="surrogateescape")) % _PORTS


def variables(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the variables to pass on: CARRIED, then the lines of .deepspeed_env (in the home
    folder, then in the current one), then `names`; never a value that looks like a secret.
    DeepSpeed writes the values into command lines, which all users of the hosts can read."""
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(CARRIED) and not _SECRET.search(name)
    }
    found.pop("PYTHONPATH", None)  # DeepSpeed puts the working directory before it
    for folder in (Path.home(), Path()):
        path = folder / environment.get("DS_ENV_FILE", ".deepspeed_env")
        for line in _VARIABLES.read_text(path).splitlines() if has_entry(path) else ():
            name, equals, value = line.partition("=")
            if not equals:
                raise SetupError(f"{path}: {line!r} is not of the form NAME=VALUE")
            found[_open_name(name.strip(), f"{path} sets")] = value.strip()
    for name in names:
        if _open_name(name, "--env names") not in environment:
            raise UsageError(
                f"--env {name}: it is not set here; export it, or leave the option out"
            )
        found[name] = environment[name]
    broken = [name for name, value in found.items() if not _is_one_line(value)]
    if broken:
        raise SetupError(
            f"{broken[0]} has several lines or is no UTF-8 text, which DeepSpeed's launcher cannot "
            "hand on; unset it here"
        )
    return found


def _is_one_line(value: str) -> bool:
    """Return whether the launcher, which reads the values as lines of a file, gets this one
    whole."""
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, as Python keeps them
        return False
    return len(value.splitlines()) <= 1 and not value.endswith(("\n", "\r")) and "\0" not in value


def environment_file(values: Mapping[str, str]) -> str:
    """Write `values` as DeepSpeed's DS_ENV_FILE: it puts double quotes around what is not plain,
    and pdsh replaces what follows a %."""
    quoted = {
        name: re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
        for name, value in values.items()
    }
    return "".join(f"{name}={value}\n" for name, value in quoted.items())


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for DeepSpeed's launcher itself, which passes on variables by
    prefix."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}


def packed(word: str) -> str:
    """Return `word` in letters that neither DeepSpeed, pdsh nor the hosts' shells touch; most words
    stay as they are."""
    if re.fullmatch(r"[\w=:,./+-]+", word, re.ASCII):
        return word
    return "@" + base64.urlsafe_b64encode(os.fsencode(word)).decode()


def unpacked(word: str) -> str:
    """Return what `packed` was given."""
    return os.fsdecode(base64.urlsafe_b64decode(word[1:])) if word.startswith("@") else word


def ssh_command(host: str, *words: str) -> list[str]:
    """Return the command that runs `words` on `host`, with the options that pdsh gives to ssh, and
    never a question."""
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    try:
        options = shlex.split(given)
    except ValueError as error:
        raise SetupError(
            f"PDSH_SSH_ARGS_APPEND={given!r} cannot be split into words: {error}; "
            "correct or unset it"
        ) from error
    return [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={_SSH_SECONDS}",
        *options,
        host,
        *words,
    ]


def check_reachable(hosts: Sequence[Host], folder: str) -> None:
    """Ask every host, all at once, whether it has this interpreter and `folder`. Raises SetupError
    with what each says that does not."""
    inside = f"cd {shlex.quote(folder)} && test -x {shlex.quote(sys.executable)}"
    with concurrent.futures.ThreadPoolExecutor(max_workers=64) as pool:
        said = list(pool.map(lambda host: _ask(host.name, inside), hosts))
    problems = [f"  {host.name}: {text}" for host, text in zip(hosts, said, strict=True) if text]
    if problems:
        raise SetupError(
            "\n".join([f"{len(problems)} of {len(hosts)} hosts cannot be used:", *problems])
        )


def _ask(host: str, inside: str) -> str:
    """Return what is wrong with `host`; nothing when `inside` succeeds there."""
    try:
        done = subprocess.run(
            ssh_command(host, f"sh -c {shlex.quote(inside)}"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * _SSH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"ssh got no answer within {3 * _SSH_SECONDS} s"
    if done.returncode == 255:
        said = done.stderr.strip() or "no connection"
        return f"ssh: {said.splitlines()[-1]}; it must work without a password"
    return (
        ""
        if done.returncode == 0
        else f"it has no {os.getcwd()} or no {sys.executable}; both must be the same on all hosts"
    )


def _check_tools() -> None:
    missing = [tool for tool in ("ssh", "pdsh") if shutil.which(tool) is None]
    if importlib.util.find_spec("deepspeed") is None:
        missing.append("deepspeed (pip install deepspeed)")
    if missing:
        raise SetupError(
            f"the hostfile launcher needs {' and '.join(missing)}, not found here; "
            "apt-get install openssh-client pdsh"
        )


def _ssh_hostname(name: str) -> str:
    """Return the host name that ssh's settings give to `name`, which the system can look up. Raises
    SetupError."""
    done = subprocess.run(
        [*ssh_command(name)[:-1], "-G", name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    match = re.search(r"^hostname (\S+)$", done.stdout, re.MULTILINE)
    if match is None:
        raise SetupError(f"ssh does not understand the host {name!r}: {done.stderr.strip()}")
    try:
        socket.getaddrinfo(match.group(1), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(
            f"the host {name!r} of the hostfile cannot be looked up ({match.group(1)}): "
            f"{error.strerror or error}"
        ) from error
    return match.group(1)


def _is_loopback(name: str) -> bool:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return all(
        ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found
    )


def _open_name(name: str, who: str) -> str:
    """Return `name`, if it is a variable's and its value may be seen by others. Raises
    UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{who} {name!r}, which is not a variable's name; values are taken from your "
            "environment"
        )
    if _SECRET.search(name):
        raise UsageError(
            f"{who} {name}, which looks like a secret: DeepSpeed writes values into command lines "
            "that everybody on the hosts can read. "
            "Set it on the hosts themselves, or keep it in a file"
        )
    return name
