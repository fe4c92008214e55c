"""The benchmark of preparation runs, tiny."""

import json
import subprocess
import sys


def test_a_tiny_run_compares_with_the_tokenizer(repo_root, tmp_path):
    script = repo_root / "tools" / "bench" / "prepare.py"
    words = ["--sample", "0.0003", "--gigabytes", "0.0004", "--rounds", "1", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "prepare.json").read_text())
    assert [(one["what"], one["processes"]) for one in found] == [
        ("tokenizer", 1),
        ("prepare", 1),
        ("tokenizer", 2),
        ("prepare", 2),
    ]
    assert all(one["seconds"] > 0 and one["cpu_seconds"] > 0 for one in found)
    assert "| 2 | prepare |" in done.stdout and "whole corpus: 0.00 GB" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]
