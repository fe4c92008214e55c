"""A training stage in several processes that the plain command starts by itself: streams, result,
and exit codes."""

import subprocess
import sys

import pytest

TINY = """align.train_iters=3 align.log_interval=1 align.warmup_iters=1
align.save_interval=2 align.seq_length=128 guard.max_teacher_loss=100
select.recall_sequences=2 select.heldout_sequences=2
eval.recall_sequences=2 eval.heldout_sequences=2""".split()


@pytest.fixture
def align(tmp_path, repo_root):
    def start(*words):
        command = [
            sys.executable,
            "-m",
            "megatron_hypenet",
            "train",
            "configs/run/demo.yaml",
            "--stage",
            "align",
            f"output_dir={tmp_path}/run",
        ]
        return subprocess.run(
            [*command, *TINY, *words],
            cwd=repo_root,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return start


@pytest.mark.distributed
@pytest.mark.slow
def test_one_process_writes_for_all(align, tmp_path):
    ended = align("--pp", "2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path}/run/align/checkpoints/iter_0000003\n"
    assert (
        ended.stderr.count("starting 2 processes on this machine")
        == ended.stderr.count("  iter 3/3 |")
        == 1
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_divergence_keeps_its_exit_code(align):
    ended = align("--cp", "2", "align.train_iters=20", "align.lr=1e30", "align.clip_grad=0")
    assert ended.returncode == 7, ended.stderr
    assert ended.stderr.count("error: stage align diverged") == 1
