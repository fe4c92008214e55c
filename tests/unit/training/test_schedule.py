"""Micro-batches add up to means, and only the last one closes the step."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups
from megatron_hypenet.training.schedule import forward_backward


@pytest.fixture(autouse=True)
def process_groups():
    groups.init_parallel(ParallelConfig())


class CountingEngine:
    num_micro_batches = 3

    def __init__(self):
        self.last = []

    def micro_step(self, batch, *, last):
        self.last.append(last)
        return batch["x"], {"twice": 2 * batch["x"]}


def batches(*values):
    return ({"x": torch.tensor(value)} for value in values)


def test_means_and_boundary():
    engine = CountingEngine()
    loss, metrics = forward_backward(engine, batches(1.0, 2.0, 6.0))
    assert (float(loss), float(metrics["twice"]), engine.last) == (3.0, 6.0, [False, False, True])


def test_wrong_number_of_micro_batches_is_our_own_fault():
    with pytest.raises(AssertionError, match="2 micro-batches for 3"):
        forward_backward(CountingEngine(), batches(1.0, 2.0))
