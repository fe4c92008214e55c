"""`hypenet submit`: hand a run to SLURM."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hypenet.cli import completion
from megatron_hypenet.cli.options import (
    ConfigArgument,
    ContextParallelOption,
    DryRunOption,
    JsonOption,
    OverridesArgument,
    OverwriteOption,
    PipelineParallelOption,
    RedoOption,
    TensorParallelOption,
    collect_overrides,
)

if TYPE_CHECKING:
    from megatron_hypenet.cluster.job_script import JobScript
    from megatron_hypenet.cluster.jobs import Job
    from megatron_hypenet.config.cluster import ClusterConfig
    from megatron_hypenet.config.schema import RunConfig

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PREFIX = "cluster."


@app.command()
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            help="Cluster profile, e.g. configs/cluster/h100_infiniband.yaml.",
            autocompletion=completion.presets("cluster"),
        ),
    ] = None,
    chain: Annotated[
        bool,
        typer.Option("--chain", help="One job per training stage, each after the one before it."),
    ] = False,
    after: Annotated[
        int | None,
        typer.Option("--after", metavar="JOBID", help="Start only once this job has succeeded."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Same as cluster.nodes=N.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="LIMIT", help="Time limit, e.g. 24:00:00 or 2-00:00:00."),
    ] = None,
    partition: Annotated[
        str | None, typer.Option("--partition", help="Same as cluster.partition=NAME.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", help="Same as cluster.account=NAME.")
    ] = None,
    qos: Annotated[str | None, typer.Option("--qos", help="Same as cluster.qos=NAME.")] = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    overwrite: OverwriteOption = False,
    redo_from: RedoOption = None,
    test_only: Annotated[
        bool,
        typer.Option(
            "--test-only", help="Ask SLURM whether and when the jobs could start; submit nothing."
        ),
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the job scripts into the run folder and submit them; the jobs continue by themselves
    after their time limit.

    KEY=VALUE settings that begin with "cluster." win over the profile, all others over the run
    configuration.

    Examples:

      hypenet submit configs/run/distill_2b.yaml --cluster configs/cluster/h100_infiniband.yaml
        teacher=/models/Qwen3-1.7B data=corpus --nodes 4 --tp 2 --cp 2 --chain

      hypenet submit configs/run/quickstart.yaml --cluster my.yaml cluster.requeue.limit=3
        teacher=/models/Qwen3-0.6B data=corpus.txt --dry-run
    """
    from megatron_hypenet.cli.pipeline import refuse_in_use
    from megatron_hypenet.config.cluster import load_cluster_config
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.errors import UsageError

    if cluster is None:
        raise UsageError(
            "--cluster is missing: name a profile, such as configs/cluster/h100_infiniband.yaml or "
            "a copy of yours"
        )
    for_run, for_cluster = split_overrides(
        overrides or [], nodes=nodes, time=time, partition=partition, account=account, qos=qos
    )
    profile = load_cluster_config(cluster, for_cluster)
    settings = load_run_config(config, collect_overrides(for_run, tp=tp, pp=pp, cp=cp))
    profile = with_measured_grace(profile, settings.output_dir)
    if not (test_only or dry_run):
        refuse_in_use(settings.output_dir)
    scripts = checked_scripts(
        settings, profile, chain=chain, overwrite=overwrite, redo_from=redo_from
    )
    if test_only:
        try_out(scripts, as_json=as_json)
    elif dry_run:
        show_scripts(scripts, as_json=as_json)
    else:
        jobs = send(
            settings, profile, scripts, after=after, overwrite=overwrite, redo_from=redo_from
        )
        show_jobs(settings.output_dir, jobs, as_json=as_json)


def split_overrides(
    words: Sequence[str], **options: str | int | None
) -> tuple[list[str], list[str]]:
    """Return (settings of the run, settings of the profile); `options` are profile settings by
    name, None where the user gave none."""
    for_run = [word for word in words if not word.removeprefix("--").startswith(PREFIX)]
    for_cluster = [
        word.removeprefix("--").removeprefix(PREFIX) for word in words if word not in for_run
    ]
    # JSON text is quoted YAML: a time limit must stay the text that it is
    for_cluster += [
        f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None
    ]
    return for_run, for_cluster


def with_measured_grace(profile: ClusterConfig, folder: Path) -> ClusterConfig:
    """Return `profile` with as much warning as this run's steps and saves were measured to need,
    where it gives less; says so then."""
    from megatron_hypenet.config.cluster import ClusterConfig
    from megatron_hypenet.training import grace_period

    needed = grace_period.read(folder).get("grace_seconds", 0)
    if not isinstance(needed, int) or needed <= profile.grace_seconds:
        return profile
    print(
        f"grace_seconds {profile.grace_seconds} -> {needed}: what a step and a save of this run "
        f"took ({folder / grace_period.FILE})",
        file=sys.stderr,
    )
    return ClusterConfig.model_validate({**profile.model_dump(), "grace_seconds": needed})


def checked_scripts(
    settings: RunConfig,
    profile: ClusterConfig,
    *,
    chain: bool,
    overwrite: bool,
    redo_from: str | None = None,
) -> list[JobScript]:
    """Return the scripts, after all checks that a job would otherwise fail in hours later; touches
    nothing."""
    from megatron_hypenet.cli import pipeline
    from megatron_hypenet.cluster.job_script import job_scripts, missing_variables
    from megatron_hypenet.errors import SetupError

    missing = missing_variables(profile, os.environ)
    if missing:
        raise SetupError(
            f"the profile hands on {', '.join(missing)} from your shell, where it is not set; "
            "export it, or take it off the list"
        )
    check_texts(settings)
    scripts = job_scripts(settings.output_dir, profile, chain=chain, on_event=settings.on_event)
    found = pipeline.checked(
        settings,
        overwrite=overwrite,
        redo_from=redo_from,
        world_size=profile.world_size,
        on_gpus=profile.gpus_per_node > 0,
    )
    from megatron_hypenet.byte_sizes import size_text
    from megatron_hypenet.planning.disk import (
        disk_need,
        free_bytes,
        refuse_small_disk,
        text_bytes,
    )

    need = disk_need(found.shape, settings, text_bytes=text_bytes(settings))
    refuse_small_disk(need, settings.output_dir)
    print(
        f"disk: up to {size_text(need.peak)} in {settings.output_dir}, where "
        f"{size_text(free_bytes(settings.output_dir))} are free",
        file=sys.stderr,
    )
    return scripts


def check_texts(settings: RunConfig) -> None:
    """Raise ConfigError that names the settings which hold line breaks or other control
    characters."""
    from megatron_hypenet.config.cluster import control_character
    from megatron_hypenet.errors import ConfigError

    texts = _texts("", settings.model_dump(mode="json"))
    bad = [
        (key, text, found) for key, text in texts if (found := control_character(text)) is not None
    ]
    if bad:
        raise ConfigError(
            "\n".join(
                f"{key}: {text!r} holds the control character {found}; leave it out"
                for key, text, found in bad
            )
        )


def _texts(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield the texts in nested settings, each with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(key, inner)


def try_out(scripts: Sequence[JobScript], *, as_json: bool) -> None:
    """Let sbatch say whether each script could run and when; SetupError with its words when one
    could not."""
    from megatron_hypenet.cluster.jobs import slurm

    said = []
    for script in scripts:
        answer = slurm("sbatch", "--test-only", stdin=script.text)
        said.append((script.path.name, answer.strip().removeprefix("sbatch: ")))
        if not as_json:
            print(": ".join(said[-1]))
    if as_json:
        print(json.dumps({"tested": [{"script": name, "says": text} for name, text in said]}))


def show_scripts(scripts: Sequence[JobScript], *, as_json: bool) -> None:
    """Print what --dry-run says."""
    if as_json:
        print(
            json.dumps(
                {
                    "scripts": [
                        {"part": one.part, "path": str(one.path), "text": one.text}
                        for one in scripts
                    ]
                }
            )
        )
        return
    for script in scripts:
        print(f"==> {script.path}\n{script.text}")


def send(
    settings: RunConfig,
    profile: ClusterConfig,
    scripts: Sequence[JobScript],
    *,
    after: int | None,
    overwrite: bool,
    redo_from: str | None = None,
) -> list[Job]:
    """Make the run folder, write the scripts into it and submit them in order. Raises UsageError
    while jobs of this run are alive."""
    from megatron_hypenet.atomic_files import write_text
    from megatron_hypenet.cli.pipeline import take_over
    from megatron_hypenet.cluster.jobs import Jobs, refuse_live_jobs
    from megatron_hypenet.halo.run_folder import RunFolder

    folder = RunFolder(settings.output_dir)
    with folder.owned():
        refuse_live_jobs(folder.root)  # again: of two that submit at the same time, one was first
        for line in take_over(settings, folder, overwrite=overwrite, redo_from=redo_from):
            print(line, file=sys.stderr)
        folder.log_file.parent.mkdir(parents=True, exist_ok=True)
        jobs = Jobs(folder.root)
        sent: list[Job] = []
        for script in scripts:
            write_text(script.path, script.text)
            before = sent[-1].id if sent else after
            sent.append(
                jobs.submit(
                    script.path,
                    script.part,
                    after=before,
                    exclude=profile.exclude,
                    exclude_faulty=profile.requeue.exclude_faulty,
                )
            )
        for node in sent[0].left_out:
            print(f"left out: {node} (`hypenet status {folder.root}` says why)", file=sys.stderr)
    return sent


def show_jobs(folder: Path, jobs: Sequence[Job], *, as_json: bool) -> None:
    """Print job numbers on stdout, and what to do next on stderr."""
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(folder),
                    "jobs": [
                        {"id": job.id, "part": job.part, "script": str(folder / job.script)}
                        for job in jobs
                    ],
                }
            )
        )
        return
    for job in jobs:
        waits = f", after job {job.after}" if job.after else ""
        print(f"job {job.id} ({job.part}){waits}: {folder / job.script}")
    word = shlex.quote(str(folder))
    tensorboard = shlex.quote(str(folder.absolute() / "tb"))
    print(
        f"status       hypenet status {word}\n"
        f"logs         hypenet logs {word}      ({folder / 'logs' / f'job-{jobs[0].id}.log'})\n"
        f"TensorBoard  tensorboard --logdir {tensorboard} --reload_multifile=true --port 6006\n"
        "             from elsewhere: ssh -N -L 6006:localhost:6006 "
        f"{getpass.getuser()}@{socket.gethostname()}, then http://localhost:6006",
        file=sys.stderr,
    )
