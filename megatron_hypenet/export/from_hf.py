"""Import a Hugging Face folder (Qwen3 or HypeNet) as a committed checkpoint, with one tensor in
memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.checkpoint import save
from megatron_hypenet.checkpoint.format import is_committed, refuse_existing
from megatron_hypenet.checkpoint.shards import LazyTensor
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError, ConversionError
from megatron_hypenet.export import hf_folder, mapping, tokenizer
from megatron_hypenet.export.plan import ImportPlan, plan_import
from megatron_hypenet.export.tensors import check_tensor, join, kept_dtype, parse_dtype

_PROGRESS_SECONDS = 5.0


def import_hf(
    hf_dir: Path | str,
    ckpt_dir: Path | str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `ckpt_dir` from the Hugging Face folder `hf_dir`; returns the model's configuration.

    Weights keep their stored dtype unless `dtype` names another. Every value must be finite. The
    tokenizer's files, config.json and generation_config.json are kept in the checkpoint, so that an
    export needs nothing else. On any error (ConfigError, ConversionError, CheckpointError) nothing
    is left at `ckpt_dir`. `progress` is called with a line every few seconds.
    """
    hf_dir, ckpt_dir = Path(hf_dir), Path(ckpt_dir)
    refuse_existing(ckpt_dir, overwrite)
    _refuse_foreign(ckpt_dir)
    plan = plan_import(hf_dir)
    files = tokenizer.read(hf_dir)
    if plan.duplicate_head:
        _check_tied_head(plan)
    failures: list[ConversionError] = []
    say = _Progress(progress, plan)
    tensors = {
        entry.ours: _lazy(
            plan, entry, kept_dtype(entry, _target_dtype(plan, entry, dtype)), failures, say
        )
        for entry in plan.entries
    }
    extra = {
        "hf_config": plan.hf_config,
        "generation_config": hf_folder.read_generation_config(hf_dir),
    }
    with temporary_folder() as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        tokenizer_files = staging if files else None
        try:
            save.write_weights(
                ckpt_dir,
                tensors,
                plan.config,
                kind=plan.kind,
                tokenizer_dir=tokenizer_files,
                extra=extra,
                overwrite=overwrite,
            )
        except CheckpointError:
            # the writer reports whatever a tensor's loader raised as its own error
            if failures:
                raise failures[0] from None
            raise
    return plan.config


def _lazy(
    plan: ImportPlan,
    entry: mapping.Entry,
    dtype: torch.dtype,
    failures: list[ConversionError],
    say: Callable[[mapping.Entry], None],
) -> LazyTensor:
    def load() -> Tensor:
        try:
            parts = []
            for name in entry.hf:
                part = plan.weights[name]
                check_tensor(name, part, entry.part_shape, where=str(plan.weights.hf_dir))
                converted = part.to(dtype)
                if converted.dtype != part.dtype:
                    check_tensor(
                        f"{name} as {_name(dtype)}",
                        converted,
                        entry.part_shape,
                        where=str(plan.weights.hf_dir),
                    )
                parts.append(converted)
        except ConversionError as error:
            failures.append(error)
            raise
        say(entry)
        return join(entry, parts)

    return LazyTensor(entry.shape, dtype, load)


def _target_dtype(plan: ImportPlan, entry: mapping.Entry, wanted: str | None) -> torch.dtype:
    if wanted is not None:
        return parse_dtype(wanted)
    stored = {plan.weights.dtype(name) for name in entry.hf}
    if len(stored) > 1:
        raise ConversionError(
            f"{plan.weights.hf_dir}: {' and '.join(entry.hf)} become one tensor but are stored as "
            f"{', '.join(sorted(stored))};"
            f" choose one: `hypenet convert import {plan.weights.hf_dir} CKPT_DIR --dtype float32`"
            " (or bfloat16), and give CKPT_DIR as the teacher"
        )
    return parse_dtype(hf_folder.DTYPES[stored.pop()])  # plan_import refuses others


def _refuse_foreign(target: Path) -> None:
    """Raise ConversionError unless an existing folder is a checkpoint or empty: a folder with other
    files (the model itself, for example) is never replaced."""
    if target.exists() and not (
        target.is_dir() and (is_committed(target) or not any(target.iterdir()))
    ):
        raise ConversionError(
            f"{target} exists and is not a checkpoint, so it is not replaced; choose another folder"
        )


def _check_tied_head(plan: ImportPlan) -> None:
    """Raise ConversionError when a tied model stores a head that differs from its embedding."""
    head, embedding = plan.weights[mapping.HF_HEAD], plan.weights[mapping.HF_EMBEDDING]
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ConversionError(
            f"{plan.weights.hf_dir}: config.json says tie_word_embeddings = true, "
            f"but lm_head.weight {list(head.shape)} differs from"
            f" model.embed_tokens.weight {list(embedding.shape)}. If the model has its own head, "
            "set tie_word_embeddings to false in"
            " config.json; if it is tied, remove lm_head.weight from the weights"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Progress:
    """Calls the progress function every few seconds."""

    def __init__(self, line: Callable[[str], None] | None, plan: ImportPlan) -> None:
        self.line = line
        self.done = 0
        self.next = time.monotonic() + _PROGRESS_SECONDS
        self.total = mapping.num_parameters(plan.config)

    def __call__(self, entry: mapping.Entry) -> None:
        self.done += torch.Size(entry.shape).numel()
        if self.line is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + _PROGRESS_SECONDS
            self.line(
                f"read {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} million weights "
                f"({100 * self.done / self.total:.0f} %)"
            )
