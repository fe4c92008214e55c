"""Layer selection of a run: its method at work on the run's models and data, and the results in the
folder `selection/`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.checkpoint.load import read_model_config
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.halo import build_stage, datasets, tracking
from megatron_hypenet.halo.report import draw_importance
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import read_json
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.method import (
    Content,
    LayerScores,
    RankSettings,
    SelectionWork,
    selection_method,
)
from megatron_hypenet.stages.selection.ranking import Selection, rank
from megatron_hypenet.stages.selection.scores import load_scores
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.training.short_text import short_count, short_time
from megatron_hypenet.untrusted.files import has_entry


def measure(
    run: RunConfig, folder: RunFolder, aligned: Path, *, progress: Callable[[int, int], None]
) -> None:
    """Let the run's method measure every layer, with the mixers of the checkpoint `aligned`, and
    write scores.json; an interrupted attempt continues."""
    file = folder.scores_file
    known = read_json(file) if has_entry(file) else {}
    # all processes have read what is known before the first one adds to it
    groups.barrier()
    PROGRESS.note("evaluate")
    start, earlier = time.monotonic(), known.get("seconds", 0.0)
    num_layers = read_model_config(folder.teacher).num_layers
    measured = datasets.measure(run, folder)

    def save(content: Content) -> None:
        PROGRESS.note("evaluate")
        if groups.rank() == 0:
            seconds = round(earlier + time.monotonic() - start, 3)
            named = {"method": run.select.method, "num_layers": num_layers, "seconds": seconds}
            write_json(file, named | content)

    def noted(done: int, total: int) -> None:
        PROGRESS.note("evaluate")
        progress(done, total)

    work = SelectionWork(
        settings=run.select,
        num_layers=num_layers,
        num_attention=_num_attention(run, num_layers),
        known=known,
        save=save,
        progress=noted,
        models=partial(_models, run, folder, aligned),
        evaluate=measured.selection_scores,
        heldout=lambda: measured.heldout(run.select.heldout_sequences, run.select.seq_length),
        samples=partial(datasets.selection_samples, run, folder),
    )
    save(selection_method(run.select.method).measure(work))


def _models(run: RunConfig, folder: RunFolder, aligned: Path) -> tuple[HypeNetModel, AlignedMixers]:
    teacher = build_stage.load_teacher(run, folder.teacher)
    return teacher, build_stage.load_aligned(teacher, aligned)


def chosen(run: RunConfig, folder: RunFolder) -> tuple[LayerScores, Selection]:
    """Return the scores that layer selection left, and the choice that follows from them."""
    scores = load_scores(folder.scores_file)
    settings = RankSettings(
        num_attention=_num_attention(run, scores.num_layers),
        importance_cap=run.select.importance_cap,
    )
    return scores, rank(scores, settings, run.align.mixer)


def write_choice(
    run: RunConfig, folder: RunFolder, scores: LayerScores, selection: Selection
) -> None:
    """Write mixers.json, the chart of importances, and what trackers show of them."""
    write_json(folder.mixers_file, selection.to_json())
    draw_importance(folder, selection, axis=selection_method(scores.method).axis)
    losses: list[Any] = read_json(folder.scores_file).get("losses", [])
    tracking.show_selection(run, folder, cost_line(scores), losses)


def cost_line(scores: LayerScores) -> str:
    """Return what the scores cost, as a line for the log."""
    tokens = "unknown" if scores.tokens is None else short_count(scores.tokens)
    seconds = "unknown" if scores.seconds is None else short_time(scores.seconds)
    return f"layer selection: method {scores.method}, {tokens} tokens read, time {seconds}"


def _num_attention(run: RunConfig, num_layers: int) -> int:
    wanted = run.select.num_attention_layers
    return max(1, num_layers // 4) if wanted is None else wanted
