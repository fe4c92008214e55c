"""Attention over a sequence split over 1, 2, 4 and 8 processes gives one process's numbers and
gradients, with and without documents."""

import json
from pathlib import Path

import pytest

from tests.processes import torchrun

WORKER = Path(__file__).with_name("context_parallel_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_groups_of_every_size_reproduce_the_dense_definitions():
    output = torchrun(WORKER, 8, timeout=280)
    checks = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    names = {check["check"] for check in checks}
    for size in (1, 2, 4, 8):
        for op in ("lightning", "all_gather", "ring"):
            assert sum(name.startswith(f"{op} cp={size} documents=") for name in names) == 6, (
                sorted(names)
            )
    for check in checks:
        errors = {key: value for key, value in check.items() if key not in ("check", "limit")}
        assert max(errors.values()) <= check["limit"], check
