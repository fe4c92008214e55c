"""The step benchmark runs each stage on a CPU and reports its speed."""

import json

import pytest

from tests.processes import tiny_benchmark


@pytest.mark.slow
def test_tiny_run_writes_its_table(tmp_path):
    tiny_benchmark("step.py", tmp_path)
    (file,) = tmp_path.glob("step_*.json")
    rows = json.loads(file.read_text())
    assert [row["stage"] for row in rows] == ["align", "distill", "finetune"]
    assert all(
        row["tokens_per_second"] > 0 and row["tflops"] > 0 and len(row["losses"]) == 3
        for row in rows
    )
    assert next(tmp_path.glob("step_*.png")).stat().st_size > 1000
    assert "| finetune | 2 x 64 |" in next(tmp_path.glob("step_*.md")).read_text()
