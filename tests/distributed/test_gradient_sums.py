"""Processes average the fp32 sums of their bf16 gradients without loss (sent as bf16, within bf16's
rounding) and agree on the norm."""

from pathlib import Path

import pytest

from tests.processes import torchrun

WORKER = Path(__file__).with_name("gradient_sums_worker.py")


@pytest.mark.distributed
def test_sums_and_norm_of_several_ranks(tmp_path):
    for size in (2, 4):
        output = torchrun(WORKER, size, tmp_path)
        assert "sums agree" in output, output
