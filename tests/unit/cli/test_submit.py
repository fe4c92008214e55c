import json
import re

import pytest

from megatron_hypenet.cli import main as cli
from megatron_hypenet.cli.submit import split_overrides
from tests.tiny_run import write_config, write_teacher
from tests.unit.cli.slurm_answers import Answers

PROFILE = "nodes: 1\ngpus_per_node: 0\ntasks_per_node: 2\ntime: '01:00:00'\n"


@pytest.fixture
def run(tmp_path):
    """Provide (configuration, profile) of a run that can be submitted."""
    write_teacher(tmp_path / "qwen3")
    profile = tmp_path / "cluster.yaml"
    profile.write_text(PROFILE)
    return write_config(tmp_path), profile


def invoke(capsys, *words):
    code = cli.run([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_settings_of_run_and_profile_are_distinguished():
    words = ["align.lr=1e-3", "cluster.nodes=3", "--cluster.time='10'", "teacher=x"]
    for_run, for_cluster = split_overrides(words, nodes=4, time="4:00:00", qos=None)
    assert for_run == ["align.lr=1e-3", "teacher=x"]
    assert for_cluster == ["nodes=3", "time='10'", "nodes=4", 'time="4:00:00"']


def test_dry_run_prints_the_script_and_touches_nothing(run, tmp_path, capsys):
    config, profile = run
    before = sorted(tmp_path.rglob("*"))
    code, out, err = invoke(
        capsys, "submit", config, "--cluster", profile, "--time", "4:00:00", "--dry-run"
    )
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    (line,) = err.splitlines()
    told = rf"disk: up to [\d.]+ MiB in {tmp_path}/run, where [\d,.]+ [GM]iB are free"
    assert re.fullmatch(told, line)
    assert "#SBATCH --time=4:00:00" in out and f"==> {tmp_path}/run/job.sbatch" in out
    code, out, _ = invoke(
        capsys, "submit", config, "--cluster", profile, "--chain", "--dry-run", "--json"
    )
    assert code == 0 and [one["part"] for one in json.loads(out)["scripts"]] == [
        "align",
        "distill",
        "finetune",
        "finish",
    ]


def test_the_warning_is_as_early_as_measured_steps_and_saves_need(run, tmp_path, capsys):
    config, profile = run
    (tmp_path / "run").mkdir()
    for measured, asked in ((20, 300), (900, 900)):
        (tmp_path / "run" / "timing.json").write_text(json.dumps({"grace_seconds": measured}))
        code, out, err = invoke(capsys, "submit", config, "--cluster", profile, "--dry-run")
        assert (
            code == 0
            and f"#SBATCH --signal=USR2@{asked}\n" in out
            and ("grace_seconds 300 -> 900" in err) == (measured == 900)
        )


def test_jobs_of_a_chain_wait_for_each_other(run, tmp_path, capsys, monkeypatch):
    config, profile = run
    answers = Answers(tmp_path, monkeypatch)
    answers["sbatch"] = f"wc -l < {tmp_path}/calls"  # the first gets number 1, and so on
    code, out, err = invoke(
        capsys,
        "submit",
        config,
        "--cluster",
        profile,
        "--chain",
        "--after",
        "77",
        "--account",
        "lab",
    )
    assert code == 0
    calls = answers.calls("sbatch")
    assert [call.partition("afterok:")[2].partition(" ")[0] for call in calls] == [
        "77",
        "1",
        "2",
        "3",
    ]
    assert out.splitlines()[1] == f"job 2 (distill), after job 1: {tmp_path}/run/job_distill.sbatch"
    assert (
        f"hypenet status {tmp_path}/run" in err and f"tensorboard --logdir {tmp_path}/run/tb" in err
    )
    assert "#SBATCH --account=lab" in (tmp_path / "run" / "job_align.sbatch").read_text()
    assert (tmp_path / "run" / "config.yaml").is_file() and (tmp_path / "run" / "logs").is_dir()


def test_a_run_with_living_jobs_is_not_submitted_again(run, tmp_path, capsys, monkeypatch):
    config, profile = run
    answers = Answers(tmp_path, monkeypatch)
    answers["sbatch"] = "echo 5"
    assert invoke(capsys, "submit", config, "--cluster", profile)[0] == 0
    answers.queue((5, "PENDING"))
    code, _, err = invoke(capsys, "submit", config, "--cluster", profile)
    assert (
        code == 2 and "has jobs that are not done (5)" in err and len(answers.calls("sbatch")) == 1
    )
    answers.queue((5, "COMPLETED"))
    assert invoke(capsys, "submit", config, "--cluster", profile)[0] == 0


def test_test_only_asks_slurm_and_touches_nothing(run, tmp_path, capsys, monkeypatch):
    config, profile = run
    answers = Answers(tmp_path, monkeypatch)
    answers["sbatch"] = "cat > asked; echo 'sbatch: Job 3 to start at noon' >&2"
    monkeypatch.chdir(tmp_path)
    code, out, _ = invoke(capsys, "submit", config, "--cluster", profile, "--test-only")
    assert (
        code == 0
        and out == "job.sbatch: Job 3 to start at noon\n"
        and not (tmp_path / "run").exists()
    )
    assert (tmp_path / "asked").read_text().startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "--cluster is missing"),
        (["--cluster", "no.yaml"], 3, "no.yaml: no such configuration file"),
        (
            ["--cluster", "PROFILE", "cluster.nodse=3"],
            3,
            "nodse: unknown key; did you mean 'nodes'?",
        ),
        (["--cluster", "PROFILE", "--nodes", "3"], 3, "global_batch_size=2 is not a multiple of"),
        (
            ["--cluster", "PROFILE", "cluster.environment=[NOT_SET_ANYWHERE]"],
            4,
            "hands on NOT_SET_ANYWHERE from your shell, where it is not set",
        ),
        (
            ["--cluster", "PROFILE", "cluster.sbatch_args=[--array=1-3]"],
            3,
            "'--array=1-3' is not possible",
        ),
        (
            ["--cluster", "PROFILE", "--partition", "x\n#SBATCH --wrap=y"],
            3,
            "partition: 'x\\n#SBATCH --wrap=y' holds",
        ),
        (
            ["--cluster", "PROFILE", 'data="x\\u2028y"'],
            3,
            "data.train: 'x\\u2028y' holds the control character",
        ),
        (["--cluster", "PROFILE", "teacher=nowhere"], 5, "teacher nowhere does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_queued(
    run, tmp_path, capsys, monkeypatch, words, code, says
):
    config, profile = run
    answers = Answers(tmp_path, monkeypatch)
    got, out, err = invoke(
        capsys, "submit", config, *(profile if word == "PROFILE" else word for word in words)
    )
    assert got == code and says in err and out == ""
    assert answers.calls() == [] and not (tmp_path / "run").exists()


def test_large_text_is_not_tokenized_by_a_gpu_job(run, tmp_path, capsys, monkeypatch):
    from megatron_hypenet.data import check

    config, profile = run
    monkeypatch.setattr(check, "MOST_TEXT_BYTES", 10)
    text = tmp_path / "long.txt"
    text.write_text("text " * 10)
    words = ("submit", config, "--cluster", profile, "--dry-run", "device=auto")
    words = (*words, f"data={text}")
    assert invoke(capsys, *words)[0] == 0
    code, _, err = invoke(capsys, *words, "cluster.gpus_per_node=2")
    assert code == 5 and "prepare it first" in err and "hypenet data prepare" in err
    (tmp_path / "bad.jsonl").write_text("{}")
    code, _, err = invoke(capsys, *words, f"data={tmp_path}/bad.jsonl")
    assert code == 5 and "bad.jsonl, line 1: no text under 'text'" in err


def test_a_run_that_the_disk_cannot_hold_is_refused(run, capsys, monkeypatch):
    from megatron_hypenet.planning import disk

    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    config, profile = run
    code, out, err = invoke(capsys, "submit", config, "--cluster", profile, "--dry-run")
    assert code == 4 and out == "" and "the run takes about" in err and "another disk" in err
