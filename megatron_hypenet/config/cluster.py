"""Cluster profiles (configs/cluster/*.yaml): the resources that `hypenet submit` requests from
SLURM, and how a job's processes are started.

They follow the rules of a run configuration: `include:`, overrides as `cluster.KEY=VALUE`, unknown
keys refused with the nearest known one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from megatron_hypenet.config import sbatch_options
from megatron_hypenet.config.fields import Count, Section
from megatron_hypenet.config.loader import load_as
from megatron_hypenet.config.model import PositiveInt
from megatron_hypenet.untrusted.files import shown

# the forms that sbatch takes: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d", re.ASCII)
_LONGEST_TIME = 30
_MEMORY = re.compile(r"[0-9]+[KMGTkmgt]?[Bb]?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# variables by which a process finds its rank: the job script and srun set these for every start
_PLACE = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PMIX?_.*|HYPENET_(UNDER_WAY|ATTEMPT_LOGS|HEAD_ADDRESS)"
)
# variables of slurm/job.sbatch.j2, those that it reads from SLURM, and those of bash that no script
# may set
_SCRIPTS_OWN = re.compile(
    r"run|attempt|logs|command|listening|try|port|head|why|task|overran|code|fault|record|state"
    r"|SLURM_JOB_ID|SLURM_JOB_NODELIST|SLURM_RESTART_COUNT"
    r"|_|IFS|UID|EUID|PPID|SHELLOPTS|BASHOPTS|BASH_VERSINFO"
)
_SHELLS_OWN = re.compile(r"(SLURMD?|SBATCH|SALLOC|SRUN)_.*")


def control_character(text: str, *, allowed: str = "") -> str | None:
    """Return the first character of `text` that ends a line or controls a terminal, as Python
    writes it; None where there is none. Unicode's line separators count, and surrogates that
    represent bytes that are not UTF-8."""
    found = (
        one
        for one in text
        if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") and one not in allowed
    )
    return next((repr(one).strip("'") for one in found), None)


def _printable(value: Any, *, allowed: str = "") -> Any:
    """Return `value`, a text or path of one line; ValueError when it has control characters."""
    if (found := control_character(str(value), allowed=allowed)) is not None:
        raise ValueError(
            f"{str(value)!r} holds the control character {found}, which could become a line of the "
            "job script; leave it out"
        )
    return value


def _printable_lines(value: str) -> str:
    text: str = _printable(value, allowed="\n\t")
    return text


Line = Annotated[str, AfterValidator(_printable)]
"""Text without line breaks and other control characters."""


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError(f"{value!r} is an empty text; leave the key out, or write null")
    return value


def _no_option(value: str) -> str:
    if value.startswith("-"):
        raise ValueError(f"{value!r} begins with -, which srun takes for an option of its own")
    return value


Word = Annotated[Line, AfterValidator(_not_blank)]
"""Text of one line that says something."""

Lines = Annotated[str, AfterValidator(_printable_lines)]
"""Text with line breaks and tabs, but without other control characters."""


def _refuse_taken(name: str) -> None:
    """Raise ValueError for a variable that the job itself sets."""
    if _PLACE.fullmatch(name):
        raise ValueError(
            f"{name} tells a process its place, and the job sets it anew; leave it out"
        )
    if _SCRIPTS_OWN.fullmatch(name):
        raise ValueError(
            f"{name} is a variable of the job script, of bash or of SLURM, which the script needs "
            "as it is; take another name, or set it where it is read"
        )


def seconds_of(limit: str) -> int:
    """Return a time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, and after D- HH, HH:MM,
    HH:MM:SS."""
    days, dash, rest = limit.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    else:
        hours = 0
        (minutes, seconds) = (numbers + [0])[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class ContainerConfig(Section):
    """A container for every process, by pyxis and enroot."""

    image: Line = Field(
        min_length=1,
        description="Image: a registry path (nvcr.io#nvidia/pytorch:25.10-py3) or a .sqsh file.",
    )
    mounts: tuple[Line, ...] = Field(
        default=(),
        description="SOURCE:TARGET[:FLAGS] each. The run folder, the data, "
        "the teacher and this repository have to be in them.",
    )
    workdir: Annotated[Path, AfterValidator(_printable)] | None = Field(
        default=None,
        description="Folder to start in inside the container; null is the one you submit from.",
    )


MailType = Literal[
    "ALL", "BEGIN", "END", "FAIL", "REQUEUE", "INVALID_DEPEND", "STAGE_OUT",
    "TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50",
]  # fmt: skip
"""Events that `sbatch --mail-type` knows, but for those of job arrays."""


class RequeueConfig(Section):
    """When a job that was stopped may start again by itself."""

    limit: Count = Field(default=20, description="Starts again at most; 0 never does.")
    without_progress: PositiveInt = Field(
        default=2,
        description="Starts in a row that may end without a new checkpoint or a finished step; "
        "then the job stays down.",
    )
    exclude_faulty: Count = Field(
        default=0,
        description="Nodes at most that submit and requeue leave out by themselves, because doctor "
        "or faults of the run named them slow or broken; 0 leaves none out.",
    )


class ClusterConfig(Section):
    """Everything about a cluster that a job script needs."""

    nodes: PositiveInt = Field(description="Nodes of a job.")
    gpus_per_node: Count = Field(description="GPUs asked for on every node; 0 computes on CPUs.")
    gpu_type: Word | None = Field(
        default=None, description="GPU type as SLURM calls it (h100); null takes any."
    )
    tasks_per_node: PositiveInt | None = Field(
        default=None, description="Processes per node; null starts one per GPU."
    )
    cpus_per_task: PositiveInt | None = Field(
        default=None, description="CPU cores per process; null takes the partition's default."
    )
    memory: Word | None = Field(
        default=None,
        description="Memory per node as sbatch takes it (0: all of it); null takes the default.",
    )
    exclusive: Annotated[bool, Field(strict=True)] = Field(
        default=True, description="Share the nodes with no other job."
    )
    time: str = Field(
        description="Time limit, in quotes: 'HH:MM:SS' or 'D-HH:MM:SS'. The job saves before it "
        "and starts again."
    )
    grace_seconds: Annotated[int, Field(ge=1, le=65535, strict=True)] = Field(
        default=300,
        description="Warning (SIGUSR2) this long before the limit; longer than one step and one "
        "save. SLURM may add 60 s.",
    )
    partition: Word | None = Field(
        default=None, description="Partition; null takes the default one."
    )
    account: Word | None = Field(default=None, description="Account that is charged.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    exclude: tuple[Word, ...] = Field(default=(), description="Nodes not to use.")
    requeue: RequeueConfig = Field(default=RequeueConfig(), description="Starting again by itself.")
    mail_user: Word | None = Field(
        default=None, description="Address that SLURM mails to; null mails nobody."
    )
    mail_type: tuple[MailType, ...] = Field(
        default=("FAIL", "END", "REQUEUE", "TIME_LIMIT_90"),
        description="Events of a job that it mails of.",
    )
    environment: tuple[str, ...] = Field(
        default=(),
        description="Variables handed on from your shell, by name only: values, and so secrets, "
        "never reach the script.",
    )
    variables: dict[str, Line] = Field(
        default={}, description="Variables set in the script, such as NCCL's."
    )
    setup: tuple[Lines, ...] = Field(
        default=(), description="Shell lines before the processes start, such as module load."
    )
    python: Annotated[Word, AfterValidator(_no_option)] | None = Field(
        default=None,
        description="Python that has this package; null is the one that submits, "
        "and python3 in a container.",
    )
    container: ContainerConfig | None = Field(
        default=None, description="Container; null runs on the node itself."
    )
    sbatch_args: tuple[Line, ...] = Field(
        default=(), description="More #SBATCH options, e.g. --comment=x."
    )
    srun_args: tuple[Line, ...] = Field(
        default=(), description="More srun options, e.g. --cpu-bind=none."
    )

    @field_validator("variables", mode="before")
    @classmethod
    def _texts_only(cls, value: Any) -> Any:
        """Refuse null, lists and mappings; the reader has kept scalars as they are written, also
        `0755` and `yes`."""
        for name, entry in value.items() if isinstance(value, dict) else ():
            if not isinstance(entry, str):
                written = "null" if entry is None else shown(repr(entry), 60)
                raise ValueError(
                    f"{name}: {written} is no text; put what the job is to get in quotes"
                )
        return value

    @field_validator("variables")
    @classmethod
    def _variable_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{shown(repr(name), 60)} is not a variable's name")
            _refuse_taken(name)
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_form(cls, value: Any) -> Any:
        text = str(value) if type(value) is int else value
        if isinstance(text, str) and not _MEMORY.fullmatch(text):
            raise ValueError(
                f"expected a size as sbatch takes it, such as 500G, or 0 for all, got {value!r}"
            )
        return text

    @field_validator("time", mode="before")
    @classmethod
    def _time_form(cls, value: Any) -> Any:
        """Refuse numbers: YAML 1.1 reads 4:00:00 as 14400, so a number is not certain to mean
        minutes."""
        if not isinstance(value, str) or not _TIME.fullmatch(value) or len(value) > _LONGEST_TIME:
            raise ValueError(
                "expected a time limit in quotes, 'HH:MM:SS' or 'D-HH:MM:SS', "
                f"got {shown(repr(value), 60)}"
            )
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a variable's name; values belong into `variables`, "
                    "secrets only into your shell"
                )
            _refuse_taken(name)
            if _SHELLS_OWN.fullmatch(name):
                raise ValueError(
                    f"{name} belongs to the shell that submits, or to the job that it is in; "
                    "put a value into `variables`"
                )
        return value

    @field_validator("sbatch_args")
    @classmethod
    def _sbatch_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        words = [word for option in value for word in sbatch_options.words_of(option)]
        sbatch_options.check_options(words, sbatch_options.SBATCH)
        return value

    @field_validator("srun_args")
    @classmethod
    def _srun_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        sbatch_options.check_options(value, sbatch_options.SRUN)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tasks_per_node is None and self.gpus_per_node == 0:
            raise ValueError(
                "tasks_per_node is needed where gpus_per_node is 0: there is no GPU to count "
                "processes by"
            )
        if self.grace_seconds >= seconds_of(self.time):
            raise ValueError(
                f"grace_seconds={self.grace_seconds} leaves nothing of time={self.time!r}: "
                "every start would be asked to stop at once"
            )
        if self.tasks_per_node is not None and 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} is more than "
                f"gpus_per_node={self.gpus_per_node}; a process has its own GPU"
            )
        return self

    @property
    def processes_per_node(self) -> int:
        """Return the number of processes that srun starts on every node."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Return the number of processes of a job."""
        return self.nodes * self.processes_per_node


def load_cluster_config(path: Path | str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read a profile and `key=value` overrides; ConfigError lists everything wrong, each with its
    origin."""
    return load_as(ClusterConfig, path, overrides)[0]
