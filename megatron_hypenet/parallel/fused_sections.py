"""One projection that holds several matrices, sharded section by section.

A mixer projects q, k, v and its gate with one column-parallel matrix: one product, and under
sequence parallelism one gather. Rank r holds the rows `[q_r; k_r; v_r; gate_r]`, so cutting or
joining the fused matrix as a whole would mix the sections up when the number of ranks changes. In
checkpoints each section is therefore a tensor of its own, `<key>.<section>`, in its global
shape."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def split_factory(fused: ShardedTensor, sections: Mapping[str, int]) -> ShardedTensorFactory:
    """Describe a fused weight [sum of local rows, h] as one logical tensor per section.

    `sections` gives this rank's rows of each section, in order. Works for optimizer state of the
    same shape too."""
    template = fused.without_data()
    axis = template.prepend_axis_num
    fragments = template.axis_fragmentations[axis]
    rank = template.global_offset[axis] // template.local_shape[0]

    @torch.no_grad()
    def build(
        key: str, tensor: Tensor | None, replica_id: Any, flattened_range: slice | None = None
    ) -> dict[str, ShardedTensor]:
        parts = {}
        start = 0
        for name, rows in sections.items():
            shape, offset = list(template.global_shape), list(template.global_offset)
            shape[axis], offset[axis] = rows * fragments, rows * rank
            parts[name] = replace(
                template,
                key=f"{key}.{name}",
                data=None if tensor is None else tensor[start : start + rows],
                dtype=template.dtype if tensor is None else tensor.dtype,
                local_shape=(rows, *template.local_shape[1:]),
                global_shape=tuple(shape),
                global_offset=tuple(offset),
                replica_id=replica_id,
            )
            start += rows
        return parts

    @torch.no_grad()
    def merge(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts[name] for name in sections], dim=0)

    return ShardedTensorFactory(fused.key, fused.data, build, merge, fused.replica_id)
