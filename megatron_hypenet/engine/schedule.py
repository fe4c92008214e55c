"""Forward and backward over one step's micro-batches. Whatever pipeline parallelism needs differently belongs behind this function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from megatron_hypenet.engine.deepspeed import TrainingEngine


def forward_backward(engine: TrainingEngine, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate gradients over `batches` (engine.num_micro_batches of them); (mean loss, mean metrics) of this process.

    Results stay on the device: nothing here waits for it.
    """
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        count += 1
        loss, metrics = engine.micro_step(batch, last=count == engine.num_micro_batches)
        total = loss if total is None else total + loss
        for tag, value in metrics.items():
            sums[tag] = value.detach() if tag not in sums else sums[tag] + value.detach()
    assert total is not None and count == engine.num_micro_batches, f"{count} micro-batches for {engine.num_micro_batches}"
    return total / count, {tag: value / count for tag, value in sums.items()}
