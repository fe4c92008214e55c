"""Processes average the fp32 sums of their bf16 gradients without loss (sent as bf16, within bf16's
rounding) and agree on the norm."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("gradient_sums_worker.py")


@pytest.mark.distributed
def test_sums_and_norm_of_several_ranks(tmp_path):
    for size in (2, 4):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
            str(WORKER),
            str(tmp_path),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "sums agree" in result.stdout, result.stdout
