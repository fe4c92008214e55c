"""Attention over a sequence split over 1, 2, 4 and 8 processes gives one process's numbers and
gradients, with and without documents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("context_parallel_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_groups_of_every_size_reproduce_the_dense_definitions():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=8",
        str(WORKER),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    names = {check["check"] for check in checks}
    for size in (1, 2, 4, 8):
        for op in ("lightning", "all_gather", "ring"):
            assert sum(name.startswith(f"{op} cp={size} documents=") for name in names) == 6, (
                sorted(names)
            )
    for check in checks:
        errors = {key: value for key, value in check.items() if key not in ("check", "limit")}
        assert max(errors.values()) <= check["limit"], check
