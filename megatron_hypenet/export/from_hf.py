"""Import a Hugging Face folder (a teacher or a HypeNet) as a committed checkpoint, in pieces of
some MB and with several threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint import save
from megatron_hypenet.checkpoint.format import is_committed, refuse_existing
from megatron_hypenet.checkpoint.manifest import TEACHER_LICENSE
from megatron_hypenet.checkpoint.shards import StreamedTensor
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import hf_folder, mapping, model_card, tokenizer
from megatron_hypenet.export.plan import ImportPlan, plan_import
from megatron_hypenet.export.tensors import (
    SCRATCH,
    blocks_of,
    check_finite,
    kept_dtype,
    parse_dtype,
)


def import_hf(
    hf_dir: Path | str,
    ckpt_dir: Path | str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `ckpt_dir` from the Hugging Face folder `hf_dir`; returns the model's configuration.

    Weights keep their stored dtype unless `dtype` names another. Every value must be finite. The
    tokenizer's files, config.json and generation_config.json are kept in the checkpoint, so that an
    export needs nothing else. On any error (ConfigError, ConversionError, CheckpointError) nothing
    is left at `ckpt_dir`. `workers` threads read, check and write in pieces of some MB; the result
    does not depend on their number (None: as many as suit the machine). `progress` is called with
    a line every few seconds.
    """
    hf_dir, ckpt_dir = Path(hf_dir), Path(ckpt_dir)
    refuse_existing(ckpt_dir, overwrite)
    refuse_foreign(ckpt_dir)
    plan = plan_import(hf_dir)
    files = tokenizer.read(hf_dir)
    if plan.duplicate_head:
        _check_tied_head(plan)
    tensors = {
        entry.ours: _streamed(plan, entry, kept_dtype(entry, _target_dtype(plan, entry, dtype)))
        for entry in plan.entries
    }
    with tokenizer.in_a_folder(files) as tokenizer_dir:
        save.stream_weights(
            ckpt_dir,
            tensors,
            plan.config,
            kind=plan.kind,
            tokenizer_dir=tokenizer_dir,
            extra=origin_of(hf_dir, plan.hf_config),
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    return plan.config


def origin_of(hf_dir: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest of a checkpoint notes of the Hugging Face folder that its model came
    from: `raw`, which is its config.json, its generation settings, and its licence."""
    extra: dict[str, Any] = {
        "hf_config": raw,
        "generation_config": hf_folder.read_generation_config(hf_dir),
    }
    if (stated := model_card.stated_license(hf_dir)) is not None:
        extra[TEACHER_LICENSE] = stated
    return extra


def _streamed(plan: ImportPlan, entry: mapping.Entry, dtype: torch.dtype) -> StreamedTensor:
    """Return the entry's tensor in `dtype`: its parts, one behind the other."""
    part_values = math.prod(entry.part_shape)

    def read(first: int, target: Tensor) -> None:
        done = 0
        while done < target.numel():
            at, start = divmod(first + done, part_values)
            count = min(part_values - start, target.numel() - done)
            _read_part(plan, entry.hf[at], part_values, start, target[done : done + count])
            done += count

    return StreamedTensor(entry.shape, dtype, 1, read)


def _read_part(plan: ImportPlan, name: str, num_values: int, first: int, target: Tensor) -> None:
    """Fill `target` with values of a tensor of the folder from number `first` on, cast to the
    target's dtype; ConversionError when one is not finite, before or after."""
    stored = parse_dtype(hf_folder.DTYPES[plan.weights.dtype(name)])
    where = str(plan.weights.hf_dir)
    plain = stored == target.dtype
    values = target if plain else SCRATCH[0].take(target.numel(), stored)

    def read(first: int, block: Tensor) -> None:
        plan.weights.read_values(name, first, block)

    read(first, values)
    check_finite(name, values, lambda: blocks_of(read, num_values, stored), where=where)
    if not plain:
        target.copy_(values)
        check_finite(
            f"{name} as {_name(target.dtype)}",
            target,
            lambda: (block.to(target.dtype) for block in blocks_of(read, num_values, stored)),
            where=where,
        )


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


def refuse_foreign(target: Path) -> None:
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
    weights = plan.weights
    names = (mapping.HF_HEAD, mapping.HF_EMBEDDING)
    head, embedding = (weights.shape(name) for name in names)
    dtypes = [parse_dtype(hf_folder.DTYPES[weights.dtype(name)]) for name in names]
    same = head == embedding and all(
        torch.equal(one.double(), other.double())
        for one, other in zip(
            *(
                blocks_of(partial(weights.read_values, name), math.prod(head), dtype)
                for name, dtype in zip(names, dtypes, strict=True)
            ),
            strict=True,
        )
    )
    if not same:
        raise ConversionError(
            f"{plan.weights.hf_dir}: config.json says tie_word_embeddings = true, "
            f"but lm_head.weight {list(head)} differs from"
            f" model.embed_tokens.weight {list(embedding)}. If the model has its own head, "
            "set tie_word_embeddings to false in"
            " config.json; if it is tied, remove lm_head.weight from the weights"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
