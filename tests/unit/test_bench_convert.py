"""The benchmark of conversions runs to its end on a tiny model, and leaves nothing behind."""

import json
import subprocess
import sys


def test_tiny_model(repo_root, tmp_path):
    command = [sys.executable, repo_root / "tools/bench/convert.py", "--size", "tiny"]
    options = ["--rounds", "1", "--no-logits", "--work", tmp_path / "work", "--out", tmp_path]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (rows,) = json.loads((tmp_path / "convert_tiny.json").read_text())
    assert [row["name"] for row in rows] == [
        "cp -r",
        "import",
        "export",
        "verify --tensors-only",
        "safetensors load + save",
    ]
    assert rows[0]["ratio"] == 1 and 0 < rows[0]["peak_mib"] < 100
    assert "| import |" in done.stdout and not (tmp_path / "work").exists()
