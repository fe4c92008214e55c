"""What a run shows in its trackers beside the points of its stages: configuration, layout and
versions as text, pictures, and the table of settings and results."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hypenet.config.loader import dump_config
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.halo.fingerprints import flat_settings
from megatron_hypenet.halo.report import read_report
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import software
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.training.tags import (
    BY_LENGTH,
    LM_LOSS,
    RECALL,
    REPORT,
    SELECTION_KL,
    TASKS,
)
from megatron_hypenet.training.trackers.base import Guarded, Tracker
from megatron_hypenet.training.trackers.tensorboard import TensorBoard

logger = logging.getLogger(__name__)

SELECTION = "selection"
RESULTS = "report"
EVALUATION = "tasks"
"""Names of the parts of a run that are no training stage, as folders of TensorBoard."""

HPARAMS = (
    "output_dir", "teacher", "align.mixer", "*.lr", "*.train_iters", "*.global_batch_size",
    "distill.seq_length", "finetune.seq_length", "select.num_attention_layers",
    "data.recall_fraction", "seed", "data.seed",
)  # fmt: skip
"""Settings by which finished runs are compared, as rules."""


def of_stage(
    run: RunConfig, folder: RunFolder, stage: str, layers: Sequence[int], step: int
) -> list[Tracker]:
    """Open the trackers of a training stage for the steps after `step`, and show in them what it
    runs with; `layers` per pipeline stage."""
    board = TensorBoard(folder.tensorboard / stage, step, layout=True)
    trackers = [board, *_services(run, folder, stage)]
    for tracker in trackers:
        for tag, text in texts(run, layers).items():
            tracker.text(tag, text)
    return trackers


def texts(run: RunConfig, layers: Sequence[int]) -> dict[str, str]:
    """Return configuration, layout and versions by tag."""
    parallel = run.parallel
    found = software()
    versions = {**found["versions"], "commit": found["git_commit"] or "not in a git checkout"}
    layout = {
        "processes": groups.world_size(),
        "tensor parallel": parallel.tensor_model_parallel_size,
        "pipeline parallel": parallel.pipeline_model_parallel_size,
        "context parallel": parallel.context_parallel_size,
        "data parallel": groups.world_size() // parallel.model_parallel_size,
        "ZeRO stage": parallel.zero_stage,
        "chunks per pipeline stage": parallel.virtual_pipeline_model_parallel_size,
        "layers per chunk" if parallel.interleaved else "layers per pipeline stage": ", ".join(
            map(str, layers)
        ),
        "device": torch.cuda.get_device_name() if device().type == "cuda" else "CPU",
    }
    return {
        "run/config": dump_config(run),
        "run/layout": _table(layout),
        "run/versions": _table(versions),
    }


def show_selection(
    run: RunConfig, folder: RunFolder, cost: str, losses: Sequence[float] = ()
) -> None:
    """Show the picture of layer importances, what they cost, and the losses of the steps of a
    method that learns."""
    for tracker in _anew(run, folder, SELECTION):
        tracker.text("report/selection", cost)
        for step, loss in enumerate(losses, start=1):
            tracker.scalars(step, {SELECTION_KL: loss})
        tracker.image("report/importance", folder.importance_plot.read_bytes())
        tracker.close()


def show_report(run: RunConfig, folder: RunFolder) -> None:
    """Show the picture of the report, and its results for the last model beside the settings."""
    row = read_report(folder)["rows"][-1]
    metrics = {REPORT + LM_LOSS: row["heldout_loss"]}
    for multiple, recall in row["recall"].items():
        metrics[f"{REPORT}{RECALL}-{multiple}x"] = recall
    for tracker in _anew(run, folder, RESULTS):
        tracker.image("report/figure", folder.report_plot.read_bytes())
        tracker.results(_decisive(run), metrics)
        tracker.close()


def show_evaluation(
    run: RunConfig, folder: RunFolder, rows: Sequence[Mapping[str, Any]], picture: Path | None
) -> None:
    """Show the rows of `hypenet eval`, a part for each model: scores by context length, as means
    over depths, and the heat map in each."""
    for model in dict.fromkeys(row["model"] for row in rows):
        points: dict[tuple[int, str], list[float]] = {}
        for row in rows:
            if row["model"] == model and "position" not in row:
                where = BY_LENGTH if row["task"] == "loss" else TASKS
                tag = where + "/".join(str(row[key]) for key in ("task", "way") if key in row)
                points.setdefault((row.get("length", 0), tag), []).append(row["score"])
        for tracker in _anew(run, folder, f"{EVALUATION}/{model}"):
            for (length, tag), scores in sorted(points.items()):
                tracker.scalars(length, {tag: sum(scores) / len(scores)})
            if picture is not None:
                tracker.image("tasks/figure", picture.read_bytes())
            tracker.close()


def _decisive(run: RunConfig) -> dict[str, Any]:
    """Return the settings of HPARAMS; all of them would hide these."""
    flat = flat_settings(run.model_dump(mode="json"))
    return {
        key: flat[key]
        for rule in HPARAMS
        for key in sorted(flat)
        if fnmatch.fnmatchcase(key, rule) and flat[key] is not None
    }


def _table(rows: Mapping[str, Any]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _anew(run: RunConfig, folder: RunFolder, part: str) -> list[Tracker]:
    """Open the trackers of a part that is shown as a whole, in the place of an earlier one."""
    place = folder.tensorboard / part
    shutil.rmtree(place, ignore_errors=True)
    try:
        return [TensorBoard(place), *_services(run, folder, part)]
    except SetupError as error:  # the work is done, and a service is no reason to lose it
        logger.warning("WARNING: %s", error)
        return [TensorBoard(place)]


def _services(run: RunConfig, folder: RunFolder, part: str) -> list[Tracker]:
    """Open what `trackers` asks for. A part has the same name in every start of a run. Raises
    SetupError for a library that is missing, and for a service that does not take the run."""
    group = folder.root.absolute().name
    place = f"{folder.root.absolute()}/{part}"
    run_id = hashlib.sha256(place.encode()).hexdigest()[:16]
    opened: list[Tracker] = []
    for name, kind, config in (
        ("wandb", "Wandb", run.trackers.wandb),
        ("mlflow", "Mlflow", run.trackers.mlflow),
    ):
        if config is None:
            continue
        module = importlib.import_module(f"megatron_hypenet.training.trackers.{name}")
        options = {"folder": folder.tensorboard} if name == "wandb" else {}
        try:
            tracker = getattr(module, kind)(
                config, run_id=run_id, group=group, part=part, **options
            )
        except Exception as error:  # whatever a foreign client raises
            raise SetupError(
                f"trackers.{name}: {type(error).__name__}: {error}; set trackers.{name}=null to "
                "run without it"
            ) from error
        opened.append(Guarded(tracker))
    return opened
