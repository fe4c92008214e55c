"""The benchmark of exported code runs, tiny, on a CPU."""

import json
import subprocess
import sys


def test_a_tiny_run_decodes_and_compares(repo_root, tmp_path):
    script = repo_root / "tools" / "bench" / "decode.py"
    command = [sys.executable, script, "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    exact = next(row for row in found if "accuracy" in row)
    assert exact["unpadded error"] < 1e-6 and exact["padded same tokens"] == 1
    row = next(row for row in found if "context" in row)
    assert row["generate ms"] > 0 and row["tokens equal, plain"] and row["finite"]
    assert "| context |" in next(tmp_path.glob("*.md")).read_text()
