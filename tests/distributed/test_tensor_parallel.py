"""Two processes that split the model give one process's numbers: float64 logits, losses and
gradients, with and without SP."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


@pytest.mark.distributed
def test_two_ranks_reproduce_one_process(tmp_path):
    for size in (1, 2):
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
    assert "parity" in result.stdout, result.stdout
