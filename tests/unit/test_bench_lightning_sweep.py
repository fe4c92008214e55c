"""The sweep of the kernels' launch parameters runs in Triton's interpreter, and its variants
agree."""

import json
import os
import subprocess
import sys

import pytest


def test_a_tiny_sweep_has_no_failures(repo_root, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "sweep.json"
    command = [
        sys.executable,
        repo_root / "tools" / "bench" / "lightning_sweep.py",
        "--tiny",
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ})
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["kernel"] for row in rows} == {"states", "scan", "dkdv"}
    assert all(row.get("error", 1.0) < 2e-3 for row in rows), [
        row for row in rows if "failed" in row or row["error"] >= 2e-3
    ]
