"""Estimate what a run takes on the disk, from shapes and settings alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from megatron_hypenet.byte_sizes import size_text
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, ParallelConfig, RunConfig, StageConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.stages.footprint import ACCUMULATION_BYTES, StageRank
from megatron_hypenet.stages.spec import stage_spec

STATE = 3 * ACCUMULATION_BYTES
"""Bytes for each trained weight of AdamW's fp32 master and two moments in a checkpoint."""
TEXT_BYTES_PER_TOKEN = 3
"""A cautious value: English has about 4.5 with a vocabulary of 150,000, code about 3."""
PACKED = 4
"""Bytes of text in a byte of a compressed file, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """Bytes of a run folder."""

    parts: dict[str, float]
    """What stays at the end, by the step that leaves it."""
    saving: float
    """The largest save, which is written before an older one is deleted."""

    @property
    def peak(self) -> float:
        """Return the most that the folder takes at one time."""
        return sum(self.parts.values()) + self.saving


def disk_need(shape: ModelConfig, run: RunConfig, *, text_bytes: float = 0.0) -> DiskNeed:
    """Return the need of a whole run with a teacher of `shape`. `text_bytes` is the text that it
    tokenizes by itself, unpacked; logs and figures are left out."""
    teacher, student = teacher_and_student(shape, run.align.spec)
    single = run.precision == "float32" or (run.precision == "auto" and run.device == "cpu")
    element = 4 if single else 2
    parts = {
        "teacher": element * _weights(run.distill, teacher),
        "data": text_bytes / TEXT_BYTES_PER_TOKEN * (2 if shape.vocab_size < 65_500 else 4),
        "assemble": element * _weights(run.distill, student),
    }
    saves = []
    for name in STAGES:
        config = run.stage(name)
        spec = stage_spec(name)
        trained = spec.student_shape(teacher, student, run.align.spec)
        weights = spec.footprint(_alone(config, trained), teacher, trained).trained
        saves.append(weights * (element + STATE))
        weights_only = run.checkpoint.finished == "weights"
        parts[name] = weights * element if weights_only else saves[-1] * _kept(config, run)
    exported = 4 if run.export.dtype == "float32" else element
    parts["export"] = exported * _weights(run.distill, student)
    return DiskNeed(parts=parts, saving=max(saves))


def _kept(config: StageConfig, run: RunConfig) -> int:
    """Return the number of checkpoints of a stage that stay."""
    settings = run.checkpoint
    made = ceil(config.train_iters / config.save_interval)
    marked = config.train_iters // settings.keep_every if settings.keep_every else 0
    return min(made, settings.keep_last + marked)


def _alone(config: StageConfig, model: ModelConfig) -> StageRank:
    """Return one process that holds all layers."""
    return StageRank(config, ParallelConfig(), 1, (model.num_layers,), 0)


def _weights(config: StageConfig, model: ModelConfig) -> float:
    return _alone(config, model).parameters(model)


def text_bytes(run: RunConfig) -> float:
    """Return the bytes of text that a run tokenizes, unpacked; sources that are not here count
    nothing. Raises DataError for one that cannot be read."""
    from megatron_hypenet.data.sources import find_files, is_pattern, is_prepared

    total = 0.0
    for source in run.data.every_source:
        if is_prepared(source.path) or not (source.path.exists() or is_pattern(source.path)):
            continue
        for file in find_files(source.path).files:
            packed = file.codec or file.kind == ".parquet"
            total += file.size * (PACKED if packed else 1)
    return total


def free_bytes(folder: Path) -> int:
    """Return the bytes that the disk of `folder` has for it: free ones, and those that it takes
    already."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    own = sum(
        path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )
    return shutil.disk_usage(place).free + own


def refuse_small_disk(need: DiskNeed, folder: Path) -> None:
    """Raise SetupError when the disk of the run folder has less than the run takes."""
    there = free_bytes(folder)
    if there < need.peak:
        raise SetupError(
            f"output_dir={folder}: the run takes about {size_text(need.peak)} on the disk "
            f"({described(need)}), where {size_text(there)} are free, counting what the run "
            "has there already; choose another disk, lower checkpoint.keep_last, or set "
            "checkpoint.finished=weights"
        )


def described(need: DiskNeed) -> str:
    """Return the parts of a need, largest first."""
    parts = sorted(
        {**need.parts, "one save under way": need.saving}.items(), key=lambda one: -one[1]
    )
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts if size)
