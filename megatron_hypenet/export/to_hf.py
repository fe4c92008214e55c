"""Export a checkpoint as a Hugging Face folder, from the checkpoint's files alone, in pieces
of some MB and with several threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint import load
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.checkpoint.stream import FilePlan, Values, write_files
from megatron_hypenet.config.model import LogitsScaling, ModelConfig, check_logits_scaling
from megatron_hypenet.errors import CheckpointError, ConfigError, ConversionError
from megatron_hypenet.export import hf_config, hf_folder, mapping, model_card, tokenizer
from megatron_hypenet.export.hf_families import teacher_family
from megatron_hypenet.export.remote_code import remote_files
from megatron_hypenet.export.staging import staged
from megatron_hypenet.export.tensors import (
    SCRATCH,
    blocks_of,
    check_finite,
    kept_dtype,
    parse_dtype,
)

KEEP = "keep"
MAX_SHARD_BYTES = 5_000_000_000
_SAFETENSORS = {parse_dtype(name): code for code, name in hf_folder.DTYPES.items()}


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export: everything that is known without reading a weight."""

    folder: Path
    """The committed checkpoint that is read."""
    config: ModelConfig
    """The exported model, with the logit scaling that was asked for."""
    reader: ShardReader
    entries: list[mapping.Entry]
    dtypes: dict[str, torch.dtype]
    """HF tensor name -> dtype in the exported folder."""
    shards: list[list[mapping.Entry]]

    @property
    def family(self) -> str:
        """Return the model type of the exported folder."""
        if self.config.is_teacher:
            return teacher_family(self.config).model_type
        return hf_config.HYPENET

    def bytes(self) -> int:
        """Return the size of all exported weights."""
        return sum(_entry_bytes(entry, self.dtypes) for entry in self.entries)


def plan_export(
    ckpt_dir: Path | str,
    *,
    attn_logits_scaling: LogitsScaling = KEEP,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    hashes: bool = True,
) -> ExportPlan:
    """Resolve the checkpoint and check its tensors' names and shapes. Raises CheckpointError,
    ConfigError, ConversionError; writes nothing.

    `attn_logits_scaling`: "keep" what the checkpoint says, or the value to export ("hype 500", a
    number, None for off). Without `hashes` the files with tensors are not compared with their
    hashes, which takes as long as reading them."""
    folder = load.resolve(Path(ckpt_dir))
    config = with_logits_scaling(load.read_model_config(folder), attn_logits_scaling)
    reader = load.open_weights(folder, hashes=hashes)
    entries = mapping.entries(config)
    mapping.check_names(
        (entry.ours for entry in entries),
        reader,
        where=f"{folder} (kind: {load.read_manifest(folder).kind})",
    )
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        mapping.check_shape(entry.ours, reader.shape(entry.ours), entry.shape, where=str(folder))
        target = reader.dtype(entry.ours) if dtype is None else parse_dtype(dtype)
        dtypes |= dict.fromkeys(entry.hf, kept_dtype(entry, target))
    by_name = {entry.ours: entry for entry in entries}
    sizes = ((entry.ours, _entry_bytes(entry, dtypes)) for entry in entries)
    shards = [
        [by_name[name] for name in group] for group in hf_folder.plan_shards(sizes, max_shard_bytes)
    ]
    return ExportPlan(folder, config, reader, entries, dtypes, shards)


def with_logits_scaling(config: ModelConfig, value: LogitsScaling) -> ModelConfig:
    """Return the configuration with another logit scaling; "keep" changes nothing. ConfigError for
    a value that no model accepts."""
    if value == KEEP:
        return config
    try:
        value = check_logits_scaling(value)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if value is not None and config.is_teacher:
        raise ConfigError(
            f"attn_logits_scaling = {value!r} asked for a teacher, "
            "which has no logit scaling; leave it out, or export the student"
        )
    return config.replace(attn_logits_scaling=value)


def export_hf(
    ckpt_dir: Path | str,
    hf_dir: Path | str,
    *,
    attn_logits_scaling: LogitsScaling = KEEP,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `hf_dir` so that transformers loads it offline; returns the exported model's
    configuration.

    A teacher becomes a folder of its family; anything else a HypeNet folder with our modelling code
    (trust_remote_code). Weights keep their dtype unless `dtype` names another, and must be finite.
    The folder appears complete or not at all. Raises CheckpointError, ConfigError, ConversionError.
    `workers` threads read, check and write in pieces of some MB, while the checkpoint's files are
    compared with their hashes; the result does not depend on their number (None: as many as suit
    the machine). `progress` gets a line every few seconds and one per weight file.
    """
    hf_dir = Path(hf_dir)
    refuse_existing(hf_dir, overwrite)
    plan = plan_export(
        ckpt_dir,
        attn_logits_scaling=attn_logits_scaling,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        hashes=False,
    )
    manifest = load.read_manifest(plan.folder)
    with staged(hf_dir, refuse=lambda: refuse_existing(hf_dir, overwrite)) as temporary:
        with load.comparing_hashes(plan.folder):
            _write_weights(plan, temporary, workers, progress)
        main_dtype = str(plan.dtypes[mapping.HF_EMBEDDING]).removeprefix("torch.")
        config = hf_config.hf_config_from_model(
            plan.config, torch_dtype=main_dtype, origin=manifest.hf_config
        )
        hf_folder.write_json(temporary / "config.json", config)
        hf_folder.write_json(
            temporary / hf_folder.GENERATION,
            _generation_config(config, _noted_generation_config(plan.folder, manifest)),
        )
        if (tokenizer_dir := load.tokenizer_dir(plan.folder)) is not None:
            tokenizer.export(tokenizer_dir, temporary, progress)
        if plan.family == hf_config.HYPENET:
            for name, text in remote_files(set(config["mixer_types"])).items():
                (temporary / name).write_text(text, encoding="utf-8")
            card = model_card.model_card(plan.config, plan.folder, manifest)
            (temporary / model_card.FILE).write_text(card, encoding="utf-8")
    return plan.config


def _write_weights(
    plan: ExportPlan, folder: Path, workers: int | None, progress: Callable[[str], None] | None
) -> None:
    count = len(plan.shards)
    weight_map: dict[str, str] = {}
    files = []
    for number, group in enumerate(plan.shards, start=1):
        file = hf_folder.SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        parts = {name: (entry, at) for entry in group for at, name in enumerate(entry.hf)}
        described = {
            name: (_SAFETENSORS[plan.dtypes[name]], entry.part_shape)
            for name, (entry, _) in parts.items()
        }
        header, order = hf_folder.weights_header(described)
        values = [_values(plan, *parts[name], plan.dtypes[name]) for name in order]
        files.append((FilePlan(folder / file, [header, *values]), len(parts)))
        weight_map |= dict.fromkeys(parts, file)
    write_files([file for file, _ in files], workers=workers, progress=progress)
    if progress is not None:
        for written, tensors in files:
            progress(f"{written.path.name}: {tensors} tensors, {written.num_bytes / 1e6:,.1f} MB")
    if count > 1:
        index = {
            "metadata": {"total_size": plan.bytes()},
            "weight_map": dict(sorted(weight_map.items())),
        }
        hf_folder.write_json(folder / hf_folder.INDEX, index)


def _values(plan: ExportPlan, entry: mapping.Entry, at: int, dtype: torch.dtype) -> Values:
    """Return the bytes of part `at` of our tensor, in `dtype`."""
    reader, name = plan.reader, entry.ours
    stored, unit = reader.dtype(name), reader.unit(name)
    part_values = math.prod(entry.part_shape)

    def read(first: int, target: Tensor) -> None:
        reader.read_values(name, first, target)

    def blocks() -> Iterator[Tensor]:
        return blocks_of(read, math.prod(entry.shape), stored, unit)

    def fill(first_byte: int, view: memoryview) -> None:
        target = torch.frombuffer(view, dtype=dtype)
        values = target if stored == dtype else SCRATCH[0].take(target.numel(), stored)
        read(at * part_values + first_byte // dtype.itemsize, values)
        check_finite(name, values, blocks, where=str(plan.folder))
        if values is not target:
            target.copy_(values)
            check_finite(
                f"{name} as {dtype}",
                target,
                lambda: (block.to(dtype) for block in blocks()),
                where=str(plan.folder),
            )

    return Values(num_bytes=part_values * dtype.itemsize, unit=unit * dtype.itemsize, fill=fill)


def _entry_bytes(entry: mapping.Entry, dtypes: dict[str, torch.dtype]) -> int:
    return torch.Size(entry.shape).numel() * dtypes[entry.hf[0]].itemsize


def _generation_config(config: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
    """Return the original generation settings, or the token ids alone: greedy decoding."""
    tokens = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config[key] is not None
    }
    return {
        **tokens,
        **{key: value for key, value in (origin or {}).items() if key != "transformers_version"},
    }


def _noted_generation_config(folder: Path, manifest: load.Manifest) -> dict[str, Any] | None:
    """Return the generation_config.json that came with the weights; CheckpointError when the
    checkpoint holds something else for it."""
    noted = manifest.extra.get("generation_config")
    if noted is not None and not isinstance(noted, dict):
        raise CheckpointError(
            f"{folder}: its manifest notes a generation_config that is no object but "
            f"{type(noted).__name__}; use another checkpoint"
        )
    return noted


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise ConversionError if something exists at `target`, unless it may be replaced and is an
    exported folder or empty."""
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(
            f"{target} already exists; choose another folder, or allow overwriting (--overwrite)"
        )
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConversionError(
            f"{target} is not a Hugging Face folder (no config.json), so it is not replaced; "
            "choose another folder"
        )
