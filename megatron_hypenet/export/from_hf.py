"""Import: a Hugging Face folder (Qwen3 or HypeNet) becomes a committed checkpoint of ours, one tensor in memory at a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint import save
from megatron_hypenet.checkpoint.format import is_committed, refuse_existing
from megatron_hypenet.checkpoint.shards import LazyTensor
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError, ConversionError
from megatron_hypenet.export import hf_config, hf_folder, mapping

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Names of the dtypes that a conversion can be asked for."""
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class ImportPlan:
    """What an import would do: everything that can be known from config.json and the headers of the weight files."""

    config: ModelConfig
    hf_config: dict[str, Any]
    weights: hf_folder.HfWeights
    entries: list[mapping.Entry]
    duplicate_head: bool
    """The folder stores the tied head a second time."""

    @property
    def kind(self) -> str:
        """What the checkpoint will be called in its manifest: teacher or student."""
        return "teacher" if self.config.is_teacher else "student"


def plan_import(hf_dir: Path) -> ImportPlan:
    """Read configuration and headers, and check names, shapes and dtypes. Raises ConfigError or ConversionError; writes nothing."""
    raw = hf_config.read_hf_config(hf_dir)
    config = hf_config.model_config_from_hf(raw, where=str(hf_dir / "config.json"))
    weights = hf_folder.HfWeights(hf_dir)
    entries = mapping.entries(config)
    tied = config.share_embeddings_and_output_weights
    duplicate_head = tied and mapping.HF_HEAD in weights
    expected = [name for entry in entries for name in entry.hf]
    mapping.check_names(expected, (name for name in weights if not (duplicate_head and name == mapping.HF_HEAD)), where=str(hf_dir))
    for entry in entries:
        for name in entry.hf:
            mapping.check_shape(name, weights.shape(name), entry.part_shape, where=str(hf_dir))
            if hf_folder.torch_dtype(weights.dtype(name)) is None:
                supported = ", ".join(DTYPES)
                raise ConversionError(
                    f"{hf_dir}: {name} is stored as {weights.dtype(name)}; supported are {supported}. Dequantize the model first"
                )
    return ImportPlan(config, raw, weights, entries, duplicate_head)


def import_hf(
    hf_dir: Path | str,
    ckpt_dir: Path | str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `ckpt_dir` from the Hugging Face folder `hf_dir`; returns the model's configuration.

    Weights keep their stored dtype unless `dtype` names another. Every value must be finite. The tokenizer's files, config.json and
    generation_config.json are kept in the checkpoint, so that an export needs nothing else. On any error (ConfigError, ConversionError,
    CheckpointError) nothing is left at `ckpt_dir`. `progress` gets a line now and then.
    """
    hf_dir, ckpt_dir = Path(hf_dir), Path(ckpt_dir)
    refuse_existing(ckpt_dir, overwrite)
    _refuse_foreign(ckpt_dir)
    plan = plan_import(hf_dir)
    if plan.duplicate_head:
        _check_tied_head(plan)
    failures: list[ConversionError] = []
    say = _Progress(progress, plan)
    tensors = {entry.ours: _lazy(plan, entry, _target_dtype(plan, entry, dtype), failures, say) for entry in plan.entries}
    extra = {"hf_config": plan.hf_config, "generation_config": hf_folder.read_generation_config(hf_dir)}
    with tempfile.TemporaryDirectory() as staging:
        files = hf_folder.tokenizer_files(hf_dir)
        for file in files:
            copyfile(file, Path(staging) / file.name)
        tokenizer = Path(staging) if files else None
        try:
            save.write_weights(ckpt_dir, tensors, plan.config, kind=plan.kind, tokenizer_dir=tokenizer, extra=extra, overwrite=overwrite)
        except CheckpointError:
            # the writer reports whatever a tensor's loader raised as its own error
            if failures:
                raise failures[0] from None
            raise
    return plan.config


def _lazy(
    plan: ImportPlan, entry: mapping.Entry, dtype: torch.dtype, failures: list[ConversionError], say: Callable[[mapping.Entry], None]
) -> LazyTensor:
    def load() -> Tensor:
        try:
            parts = []
            for name in entry.hf:
                part = plan.weights[name]
                mapping.check_tensor(name, part, entry.part_shape, where=str(plan.weights.hf_dir))
                converted = part.to(dtype)
                if converted.dtype != part.dtype:
                    mapping.check_tensor(f"{name} as {_name(dtype)}", converted, entry.part_shape, where=str(plan.weights.hf_dir))
                parts.append(converted)
        except ConversionError as error:
            failures.append(error)
            raise
        say(entry)
        return entry.join(parts)

    return LazyTensor(entry.shape, dtype, load)


def _target_dtype(plan: ImportPlan, entry: mapping.Entry, wanted: str | None) -> torch.dtype:
    if wanted is not None:
        return parse_dtype(wanted)
    stored = {plan.weights.dtype(name) for name in entry.hf}
    if len(stored) > 1:
        raise ConversionError(
            f"{plan.weights.hf_dir}: {' and '.join(entry.hf)} become one tensor but are stored as {', '.join(sorted(stored))};"
            " choose one with --dtype"
        )
    dtype = hf_folder.torch_dtype(stored.pop())
    assert dtype is not None, "plan_import refuses other dtypes"
    return dtype


def parse_dtype(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16; ConversionError lists the known names."""
    if name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _refuse_foreign(target: Path) -> None:
    """Overwriting is for checkpoints: a folder with anything else in it (the model itself, say) is never replaced."""
    if target.exists() and not (target.is_dir() and (is_committed(target) or not any(target.iterdir()))):
        raise ConversionError(f"{target} exists and is not a checkpoint, so it is not replaced; choose another folder")


def _check_tied_head(plan: ImportPlan) -> None:
    """A tied model may store its head as well, when both are the same; otherwise one of the two statements is wrong."""
    head, embedding = plan.weights[mapping.HF_HEAD], plan.weights[mapping.HF_EMBEDDING]
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ConversionError(
            f"{plan.weights.hf_dir}: config.json says tie_word_embeddings = true, but lm_head.weight {list(head.shape)} differs from"
            f" model.embed_tokens.weight {list(embedding.shape)}. If the model has its own head, set tie_word_embeddings to false in"
            " config.json; if it is tied, remove lm_head.weight from the weights"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Progress:
    """A line every few seconds."""

    def __init__(self, line: Callable[[str], None] | None, plan: ImportPlan) -> None:
        self.line, self.done, self.next = line, 0, time.monotonic() + _PROGRESS_SECONDS
        self.total = mapping.num_parameters(plan.config)

    def __call__(self, entry: mapping.Entry) -> None:
        self.done += torch.Size(entry.shape).numel()
        if self.line is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + _PROGRESS_SECONDS
            self.line(f"read {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} million weights ({100 * self.done / self.total:.0f} %)")
