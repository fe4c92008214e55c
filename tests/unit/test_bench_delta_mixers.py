"""The benchmark of the delta-rule mixers runs, tiny, on a CPU."""

import json
import subprocess
import sys


def test_a_tiny_run_times_both_mixers(repo_root, tmp_path):
    script = repo_root / "tools" / "bench" / "delta_mixers.py"
    command = [sys.executable, script, "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = [row for row in found if "mixer" in row]
    assert [row["mixer"] for row in rows] == ["gated_delta_net", "kimi_delta_attention"]
    assert all(row["mixer ms"] > 0 for row in rows)
    assert "| mixer |" in next(tmp_path.glob("*.md")).read_text()
