"""The scripts in examples/ run as their first lines say, on the CPU, with the bundled teacher."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def example(repo_root, tmp_path):
    """Provide a function from the name of a script and its arguments to what it prints."""

    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, str(repo_root / "examples" / name), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_example_is_run_here(repo_root):
    names = {path.name for path in (repo_root / "examples").glob("*.py")}
    assert names == {"load_and_score.py", "convert_and_verify.py", "distil_toy.py"}


def test_a_model_is_loaded_and_scores_text(example):
    printed = example("load_and_score.py")
    loss = float(re.search(r"loss (\d+\.\d+) nats", printed).group(1))
    # the teacher's held-out loss is 3.16; guessing among its 2,048 tokens costs 7.6
    assert 2.5 < loss < 4.0
    assert printed.count("  token ") == 5


def test_conversion_is_verified_in_both_directions(example, tmp_path):
    printed = example("convert_and_verify.py", "--out", tmp_path / "out")
    counts = re.findall(r"(\d+) of (\d+) tensors are bit-equal", printed)
    assert len(counts) == 2 and all(equal == compared for equal, compared in counts)
    assert (tmp_path / "out" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("mixer", ["lightning_attn", "gated_delta_net"])
def test_a_toy_is_distilled(example, tmp_path, mixer):
    printed = example("distil_toy.py", "--steps", 4, "--out", tmp_path / "toy", "--mixer", mixer)
    losses = {
        stage: (float(first), float(last))
        for stage, first, last in re.findall(
            r"(\w+) +loss ([\d.]+) at step 1, ([\d.]+) at step 4", printed
        )
    }
    assert list(losses) == ["align", "distill"]
    assert losses["align"][1] < losses["align"][0]
    assert (tmp_path / "toy" / "distill" / "checkpoints" / "iter_0000004").is_dir()
