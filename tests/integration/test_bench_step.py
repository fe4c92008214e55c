"""The step benchmark runs each stage on a CPU and reports its speed."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_tiny_run_writes_its_table(repo_root, tmp_path):
    command = [
        sys.executable,
        str(repo_root / "tools/bench/step.py"),
        "--tiny",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = tmp_path.glob("step_*.json")
    rows = json.loads(file.read_text())
    assert [row["stage"] for row in rows] == ["align", "distill", "finetune"]
    assert all(
        row["tokens_per_second"] > 0 and row["tflops"] > 0 and len(row["losses"]) == 3
        for row in rows
    )
    assert next(tmp_path.glob("step_*.png")).stat().st_size > 1000
    assert "| finetune | 2 x 64 |" in next(tmp_path.glob("step_*.md")).read_text()
