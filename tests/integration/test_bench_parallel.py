"""The layout benchmark runs on CPUs: two processes give the numbers of one, and what Lightning
Attention exchanges is counted."""

import json

import pytest

from tests.processes import tiny_benchmark


@pytest.mark.slow
@pytest.mark.distributed
def test_tiny_run_writes_its_table(tmp_path):
    tiny_benchmark("parallel.py", tmp_path)
    (file,) = tmp_path.glob("parallel_*.json")
    rows = json.loads(file.read_text())
    one, two = (
        next(row for row in rows if row["name"] == f"parity, {name}")["measured"]["distill"]
        for name in ("one GPU", "CP2")
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and two[
        "grad_norms"
    ] == pytest.approx(one["grad_norms"], rel=1e-5)
    # of configs/model/tiny.yaml
    heads = 4
    width = 16
    sent = {
        found["lightning_bytes_per_exchange"]
        for row in rows
        if row["layout"] == "CP2"
        for found in row["measured"].values()
    }
    assert sent == {2 * heads * width * width * 4}
    assert "| 128 tokens, CP2 |" in next(tmp_path.glob("parallel_*.md")).read_text()
