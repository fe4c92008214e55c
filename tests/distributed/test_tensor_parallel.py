"""Two processes that split the model give one process's numbers: float64 logits, losses and
gradients, with and without SP."""

from pathlib import Path

import pytest

from tests.processes import torchrun

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


@pytest.mark.distributed
def test_two_ranks_reproduce_one_process(tmp_path):
    for size in (1, 2):
        output = torchrun(WORKER, size, tmp_path)
    assert "parity" in output, output
