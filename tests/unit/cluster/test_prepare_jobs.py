"""The job array of a preparation: its shares are joined to the bytes of the whole."""

import json
import os
import subprocess

import pytest

from megatron_hypenet.cli.main import run
from megatron_hypenet.cluster import prepare_jobs

PROFILE = """nodes: 4
gpus_per_node: 8
time: '01:00:00'
partition: cpu
cpus_per_task: 2
setup: [echo ready]
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch, repo_root):
    """Provide (words of the command, folder); srun runs its command here, sbatch counts its
    calls."""
    monkeypatch.chdir(repo_root)
    lines = [json.dumps({"text": f"Text {number}."}) for number in range(300)]
    (tmp_path / "a b.jsonl").write_text("\n".join(lines))
    (tmp_path / "cluster.yaml").write_text(PROFILE)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "sbatch").write_text(
        f'#!/bin/bash\necho "$@" >>"{tmp_path}/calls"\nwc -l <"{tmp_path}/calls"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    words = ["data", "prepare", str(tmp_path / "a b.jsonl"), str(tmp_path / "out")]
    return [*words, "--tokenizer", "assets/tiny-qwen3"], tmp_path


def array(folder, tasks):
    return ["--slurm", "--cluster", str(folder / "cluster.yaml"), "--tasks", str(tasks)]


def test_a_dry_run_shows_both_scripts_and_touches_nothing(corpus, capsys):
    words, folder = corpus
    before = sorted(folder.rglob("*"))
    assert run([*words, *array(folder, 3), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in out and "#SBATCH --partition=cpu" in out
    assert "gpus" not in out and "--cpus-per-task=2" in out and "--workers 2" in out
    assert out.count("==> ") == 2 and sorted(folder.rglob("*")) == before


def test_the_scripts_make_what_one_command_makes(corpus, capsys):
    words, folder = corpus
    assert run([*words, *array(folder, 2), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["jobs"] == {"prepare": 1, "join": 2}
    calls = (folder / "calls").read_text().splitlines()
    assert calls[0] == f"--parsable {folder}/out.jobs/prepare.sbatch"
    assert calls[1].startswith("--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes")
    code = run([*words, *array(folder, 2)])
    assert code == 2 and "from an earlier array" in capsys.readouterr().err
    for number in (0, 1, 1):
        done = subprocess.run(
            ["bash", folder / "out.jobs" / "prepare.sbatch"],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "out.part-1-of-2 is there already" in done.stdout
    subprocess.run(["bash", folder / "out.jobs" / "join.sbatch"], capture_output=True, check=True)
    assert not list(folder.glob("out.part-*"))
    whole = [*words[:3], str(folder / "whole"), *words[4:]]
    assert run(whole) == 0
    for suffix in (".bin", ".idx"):
        assert (folder / f"out{suffix}").read_bytes() == (folder / f"whole{suffix}").read_bytes()


def test_what_an_earlier_array_left_is_removed_on_request(corpus):
    words, folder = corpus
    jobs = prepare_jobs.jobs_folder(folder / "out")
    jobs.mkdir()
    (folder / "out.part-7-of-9.bin").write_bytes(b"old")
    (folder / "out.part-8-of-9.preparing").mkdir()
    assert run([*words, *array(folder, 2), "--overwrite"]) == 0
    assert not list(folder.glob("out.part-*")) and (jobs / "join.sbatch").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slurm"], "needs --cluster PROFILE and --tasks N"),
        (["--tasks", "3"], "needs --cluster PROFILE and --tasks N"),
        (["--part", "0/2"], "takes no --part"),
    ],
)
def test_options_that_belong_together(corpus, capsys, more, message):
    words, folder = corpus
    more = [*array(folder, 2), *more] if "--part" in more else more
    assert run([*words, *more]) == 2 and message in capsys.readouterr().err


def test_more_tasks_than_shares(corpus, capsys):
    words, folder = corpus
    (folder / "t.txt").write_text("text")
    words[2] = str(folder / "*.txt")
    assert run([*words, *array(folder, 4)]) == 2
    assert "gives 1 shares" in capsys.readouterr().err
