"""The sbatch scripts of a run: its jobs, what each one does, and their text from
slurm/job.sbatch.j2.

Not a verb: `submit` writes and sends them, `requeue` sends them again.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hypenet.config import sbatch_options
from megatron_hypenet.config.bundled import REPO_ROOT, bundle
from megatron_hypenet.config.cluster import ClusterConfig, control_character
from megatron_hypenet.config.schema import STAGES
from megatron_hypenet.errors import ConfigError, SavedAndRequeue, SetupError

TEMPLATES = bundle() / "slurm"
TEMPLATE = "job.sbatch.j2"
WHOLE = "run"
LAST = "finish"

_DOES = {
    WHOLE: "the whole run",
    **{name: f"stage {name}, and the steps before it that are not done" for name in STAGES},
    LAST: "what comes after the stages",
}

_BY_SIGNAL = 128
_CODES = {
    "saved": SavedAndRequeue.exit_code,
    "setup": SetupError.exit_code,
    "by_signal": _BY_SIGNAL,
    "killed": _BY_SIGNAL + signal.SIGKILL,
}
"""Exit codes that the script decides by; from `by_signal` on, a signal ended the process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobScript:
    """One job of a run."""

    part: str
    """What it does of the run: "run" does all of it, in a chain there are the stages and
    "finish"."""
    path: Path
    """Where the script belongs in the run folder."""
    text: str


def job_scripts(
    run_folder: Path, cluster: ClusterConfig, *, chain: bool, on_event: Sequence[str] = ()
) -> list[JobScript]:
    """Return the scripts of a run in order, from the configuration in its folder; `chain` gives
    every training stage a job of its own, and `on_event` has the commands that run at a new
    start.

    Raises ConfigError for paths that a job script cannot hold.
    """
    check_paths(run_folder)
    parts = (*STAGES, LAST) if chain else (WHOLE,)
    return [_script(part, run_folder.absolute(), cluster, on_event) for part in parts]


def _script(part: str, folder: Path, cluster: ClusterConfig, on_event: Sequence[str]) -> JobScript:
    config = str(folder / "config.yaml")
    words = ["train", config, "--stage", part] if part in STAGES else ["run", config]
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    text = render(
        title=f"{folder.name}: {_DOES[part]}",
        name=f"{folder.name}-{part}",
        cluster=cluster,
        run=str(folder),
        cwd=str(Path.cwd()),
        repo=str(REPO_ROOT),
        command=shlex.join([python, "-m", "launchers.slurm", *words]),
        codes=_CODES,
        on_event=list(on_event),
    )
    return JobScript(
        part=part,
        path=folder / ("job.sbatch" if part == WHOLE else f"job_{part}.sbatch"),
        text=text,
    )


def check_paths(run_folder: Path) -> None:
    """Raise ConfigError that names the path which sbatch or a shell would take for something
    else."""
    paths = {
        "output_dir": run_folder.absolute(),
        "the current folder": Path.cwd(),
        "this repository": REPO_ROOT,
        "this Python": Path(sys.executable),
    }
    for name, path in paths.items():
        if (found := control_character(str(path))) is not None:
            raise ConfigError(
                f"{name}: {str(path)!r} holds the control character {found}, which could become a "
                "line of the job script; use another folder"
            )
    if "\\" in str(run_folder.absolute()):
        raise ConfigError(
            f"output_dir: {str(run_folder.absolute())!r} holds a backslash: "
            "in the name of a log file "
            "SLURM drops it, and no longer puts in the job's number; choose another output_dir"
        )


def sbatch_quoted(value: object) -> str:
    """Quote `value` as one word of an #SBATCH line. sbatch takes a backslash for an escape inside
    all quotes, and knows no $ or `."""
    text = str(value)
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def render(*, template: str = TEMPLATE, **values: object) -> str:
    """Render the template with these values; a missing value is an error."""
    import jinja2

    if not (TEMPLATES / template).is_file():
        raise SetupError(
            f"{TEMPLATES / template} is missing: submitting needs the repository's slurm/; "
            "install with `pip install -e .`"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a shell script; `quote` is its escaping
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["sbatch"] = sbatch_quoted
    environment.filters["sbatch_words"] = lambda option: " ".join(
        map(sbatch_quoted, sbatch_options.words_of(option))
    )
    return environment.get_template(template).render(**values)


def missing_variables(cluster: ClusterConfig, environment: Iterable[str]) -> list[str]:
    """Return the variables that the profile passes on from the shell and that are not set there."""
    present = set(environment)
    return [name for name in cluster.environment if name not in present]
