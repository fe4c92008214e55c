"""Write a teacher's checkpoint as a checkpoint of megatron-core's GPTModel, which Megatron-LM
loads, in pieces of some MB and with several threads.

    OUT/latest_checkpointed_iteration.txt    "release": weights without training state
    OUT/release/                             .metadata, metadata.json, common.pt, __0_0.distcp
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hypenet.checkpoint import load
from megatron_hypenet.checkpoint.shard_writer import stream_pieces
from megatron_hypenet.checkpoint.shards import Shard, ShardReader
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import mapping, megatron_names
from megatron_hypenet.export.megatron_args import (
    Padding,
    arguments_of,
    check_family,
    common_state,
)
from megatron_hypenet.export.row_blocks import Assembled, streamed
from megatron_hypenet.export.staging import staged
from megatron_hypenet.export.tensors import parse_dtype

TRACKER = "latest_checkpointed_iteration.txt"
"""File that names Megatron-LM's newest save: a number, or RELEASE."""
RELEASE = "release"


@dataclass(frozen=True)
class ToMegatronPlan:
    """Everything that is known of a conversion without reading a weight."""

    folder: Path
    """The committed checkpoint that is read."""
    config: ModelConfig
    reader: ShardReader
    padding: Padding
    tensors: list[Assembled]
    """Megatron's tensors, layer by layer."""
    dtypes: dict[str, torch.dtype]
    """Dtype of each of them."""

    @property
    def vocab_rows(self) -> int:
        """Return the number of rows of Megatron's embedding and head."""
        return self.padding.rows(self.config.vocab_size)

    def bytes(self) -> int:
        """Return the size of all converted weights."""
        return sum(math.prod(t.shape) * self.dtypes[t.name].itemsize for t in self.tensors)


def plan_to_megatron(
    ckpt_dir: Path | str,
    *,
    padding: Padding | None = None,
    dtype: str | None = None,
    hashes: bool = True,
) -> ToMegatronPlan:
    """Resolve the checkpoint and check its tensors' names, shapes and dtypes; writes nothing.

    Without `hashes` the files with tensors are not compared with their hashes. ConversionError for
    a student and for tensors that do not fit; CheckpointError as `load.open_weights`."""
    padding = padding or Padding()
    folder = load.resolve(Path(ckpt_dir))
    config = load.read_model_config(folder)
    if not config.is_teacher:
        raise ConversionError(
            f"{folder} is a HypeNet student (mixers {', '.join(config.used_mixers)}), which "
            "Megatron's GPTModel cannot hold: to-megatron converts Qwen3 teachers, and "
            "`hypenet convert export` a student"
        )
    check_family(config, where=str(folder))
    reader = load.open_weights(folder, hashes=hashes)
    entries = mapping.entries(config)
    mapping.check_names((entry.ours for entry in entries), reader, where=str(folder))
    for entry in entries:
        mapping.check_shape(entry.ours, reader.shape(entry.ours), entry.shape, where=str(folder))
    tensors = megatron_names.theirs_from_ours(config, padding.rows(config.vocab_size))
    dtypes = {
        tensor.name: tensor.dtype(reader) if dtype is None else parse_dtype(dtype)
        for tensor in tensors
    }
    _check_stacks(dtypes, folder)
    return ToMegatronPlan(folder, config, reader, padding, tensors, dtypes)


def to_megatron(
    ckpt_dir: Path | str,
    out: Path | str,
    *,
    padding: Padding | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Write `out`, which must not exist, from a teacher's checkpoint; returns its configuration.

    Weights keep their dtype unless `dtype` names another, and must be finite. Embedding and head
    get rows of zeros up to the size that `padding` says. The folder appears complete or not at all.
    Errors as for `plan_to_megatron`. `workers` and `progress` are those of `stream.write_files`;
    the checkpoint's files are compared with their hashes meanwhile.
    """
    out = Path(out)
    refuse_existing(out)
    plan = plan_to_megatron(ckpt_dir, padding=padding, dtype=dtype, hashes=False)
    with staged(out, refuse=lambda: refuse_existing(out)) as temporary:
        with load.comparing_hashes(plan.folder):
            stream_pieces(
                temporary / RELEASE,
                [_shard(plan, tensor) for tensor in plan.tensors],
                objects=dict.fromkeys(
                    megatron_names.extra_state_keys(plan.config.num_layers), _empty_object()
                ),
                common=common_state(arguments_of(plan.config, plan.padding)),
                workers=workers,
                progress=progress,
            )
        (temporary / TRACKER).write_text(RELEASE)
    return plan.config


def refuse_existing(target: Path) -> None:
    """Raise ConversionError if anything exists at `target`: it may hold someone's training."""
    if target.exists() or target.is_symlink():
        raise ConversionError(f"{target} already exists; choose another folder, or delete it")


def _shard(plan: ToMegatronPlan, tensor: Assembled) -> Shard:
    """Return a tensor as one piece; that of a layer as its part of the stack."""
    stack, layer = megatron_names.split_stack(tensor.name)
    dtype = plan.dtypes[tensor.name]
    if layer is None:
        return Shard.whole(tensor.name, streamed(plan.reader, tensor, dtype))
    return Shard(
        stack,
        streamed(plan.reader, tensor, dtype, leading=(1,)),
        (plan.config.num_layers, *tensor.shape),
        (layer, *(0 for _ in tensor.shape)),
    )


def _check_stacks(dtypes: dict[str, torch.dtype], folder: Path) -> None:
    """Raise ConversionError when layers of one stack have different dtypes."""
    found: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        stack = megatron_names.split_stack(name)[0]
        if found.setdefault(stack, dtype) != dtype:
            raise ConversionError(
                f"{folder}: the layers of {stack} are stored as {found[stack]} and {dtype}, and "
                "Megatron stores them as one tensor; choose one with --dtype"
            )


def _empty_object() -> bytes:
    """Return an object of `dist_checkpointing` without content: a list with None."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()
