"""The mixer's benchmark runs, tiny, on a CPU, and both forms compute the same thing."""

import json
import subprocess
import sys


def test_a_tiny_run_agrees_with_float64(repo_root, tmp_path):
    command = [
        sys.executable,
        repo_root / "tools" / "bench" / "mixer.py",
        "--tiny",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [row["form"] for row in rows] == ["ours", "unfused"]
    assert all(row["error y"] < 2e-2 and row["error dx"] < 3e-2 for row in rows), rows
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000
    assert "| form |" in next(tmp_path.glob("*.md")).read_text()
