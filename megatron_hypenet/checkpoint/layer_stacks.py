"""Megatron stores the same tensor of all layers as one, stacked along a first axis. Here each layer
becomes a tensor of its own again, in the index alone: nothing is read.

`dist_checkpointing` writes a stack in pieces of one layer, [1, ...] at [layer, ...], whatever the
pipeline layout was, and names it without a layer number: decoder.layers.mlp.linear_fc2.weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_hypenet.checkpoint.safety import PICKLE
from megatron_hypenet.checkpoint.shard_index import METADATA, Piece, StoredTensor
from megatron_hypenet.untrusted.files import shown


def unstacked(
    tensors: Mapping[str, StoredTensor], folder: Path, prefix: str
) -> dict[str, StoredTensor]:
    """Return `tensors`, the index of `folder`, with each stack replaced by its layers.

    A stack is a tensor whose name goes on behind `prefix` with anything but a number; its layers
    get the number there. CheckpointError when a piece spans several layers, or a layer is there
    twice.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix(prefix)
        is_stack = name.startswith(prefix) and not rest.split(".")[0].isdecimal()
        entries = _layers(name, tensor, folder) if is_stack else [tensor]
        for layer, entry in enumerate(entries):
            own = f"{prefix}{layer}.{rest}" if is_stack else name
            if own in found:
                _refuse(folder, own, "is there twice, by itself and in a stack of layers")
            found[own] = entry
    return found


def _layers(name: str, stack: StoredTensor, folder: Path) -> list[StoredTensor]:
    for piece in stack.pieces:
        if piece.shape and piece.shape[0] != 1:
            _refuse(
                folder,
                name,
                f"is stored in pieces of {piece.shape[0]} layers, where Megatron writes one",
            )
    # a damaged index may claim any number of layers without a value
    if not stack.shape or stack.shape[0] > len(stack.pieces):
        _refuse(folder, name, f"has the shape {list(stack.shape)}, which is no stack of layers")
    pieces: list[list[Piece]] = [[] for _ in range(stack.shape[0])]
    for piece in stack.pieces:
        pieces[piece.offset[0]].append(
            replace(piece, offset=piece.offset[1:], shape=piece.shape[1:], stored_shape=piece.shape)
        )
    return [StoredTensor(stack.shape[1:], stack.dtype, tuple(layer)) for layer in pieces]


def _refuse(folder: Path, name: str, reason: str) -> None:
    PICKLE.refuse(folder / METADATA, f"{shown(name)} {reason}")
