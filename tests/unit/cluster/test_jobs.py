import json

import pytest

from megatron_hypenet.cluster.jobs import Jobs, JobState, queue, slurm
from megatron_hypenet.errors import DataError, SetupError
from tests.unit.cli.slurm_answers import Answers, attempt, run_with_jobs


@pytest.fixture
def answers(tmp_path, monkeypatch):
    return Answers(tmp_path, monkeypatch)


def test_a_submitted_job_is_remembered(tmp_path, answers):
    folder = run_with_jobs(tmp_path / "run")
    answers["sbatch"] = "echo '17;cluster'"
    job = Jobs(folder).submit(folder / "job.sbatch", "run", after=None, exclude=[])
    assert (job.id, job.part, job.script) == (17, "run", "job.sbatch")
    later = Jobs(folder).submit(folder / "job.sbatch", "finish", after=17, exclude=["n3", "n4"])
    assert Jobs(folder).all == [job, later]
    assert answers.calls("sbatch")[1].endswith(
        f"--dependency=afterok:17 --kill-on-invalid-dep=yes --exclude=n3,n4 {folder / 'job.sbatch'}"
    )


def test_what_sbatch_refuses_is_said_in_its_words(tmp_path, answers):
    folder = run_with_jobs(tmp_path / "run")
    answers["sbatch"] = "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1"
    with pytest.raises(SetupError, match="invalid partition specified: x"):
        Jobs(folder).submit(folder / "job.sbatch", "run", after=None, exclude=[])
    assert Jobs(folder).all == []


def test_an_answer_without_a_number(tmp_path, answers):
    folder = run_with_jobs(tmp_path / "run")
    with pytest.raises(SetupError, match="gave no job number"):
        Jobs(folder).submit(folder / "job.sbatch", "run", after=None, exclude=[])


def test_states_while_slurm_knows_the_job_and_afterwards(tmp_path, answers):
    folder = run_with_jobs(
        tmp_path / "run", (1, "align"), (2, "distill"), (3, "finetune"), (4, "finish"), (5, "run")
    )
    answers.queue((1, "RUNNING", "None", "n[1-2]", "9:48"), (99, "RUNNING"))
    attempt(folder, 2, 0, "started on n1", "ended with code 0")
    attempt(folder, 3, 0, "started on n1", "ended with code 5")
    attempt(folder, 4, 0, "started on n1", "cancelled by `hypenet cancel`")
    assert Jobs(folder).states() == {
        1: JobState(state="RUNNING", live=True, nodes="n[1-2]", time_left="9:48"),
        2: JobState(state="COMPLETED", live=False),
        3: JobState(state="FAILED", live=False, reason="ended with code 5"),
        4: JobState(state="CANCELLED", live=False, reason="cancelled by `hypenet cancel`"),
        5: JobState(
            state="GONE", live=False, reason="SLURM does not know it, and it never started"
        ),
    }


def test_a_waiting_job_has_a_reason_and_no_time_left(answers):
    answers.queue((1, "PENDING", "Dependency", "", "10:00"))
    assert queue([1]) == {1: JobState(state="PENDING", live=True, reason="Dependency")}


def test_the_newest_job_of_a_part_stands_in_the_order_of_the_run(tmp_path):
    jobs = Jobs(run_with_jobs(tmp_path / "run", (1, "align"), (2, "distill"), (3, "align")))
    assert [(job.id, job.part) for job in jobs.newest_of_each_part()] == [
        (3, "align"),
        (2, "distill"),
    ]


def test_attempts_are_counted_and_notes_belong_to_the_last(tmp_path):
    folder = run_with_jobs(tmp_path / "run", (1, "align"))
    for number in (0, 1, 2, 10):
        attempt(folder, 1, number)
    jobs = Jobs(folder)
    assert [path.name for path in jobs.attempts(jobs.all[0])] == [
        "attempt-0",
        "attempt-1",
        "attempt-2",
        "attempt-10",
    ]
    jobs.note(jobs.all[0], "cancelled by hand")
    assert [(event.attempt, event.text) for event in jobs.events(jobs.all[0])] == [
        (3, "cancelled by hand")
    ]


def test_no_run_folder_no_jobs_damaged_record(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        Jobs(tmp_path)
    folder = run_with_jobs(tmp_path / "run")
    with pytest.raises(DataError, match="has no SLURM jobs; submit it with `hypenet submit"):
        Jobs(folder).required()
    (folder / "jobs.json").write_text('{"jobs": [{"id": 1}]}')
    with pytest.raises(DataError, match="delete it to forget the jobs"):
        Jobs(folder)


def test_a_machine_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="squeue is not installed here; run this on a login node"):
        slurm("squeue")


def test_a_shell_inside_an_allocation_does_not_change_what_slurm_is_asked(answers, monkeypatch):
    for name in (
        "SLURM_MEM_PER_CPU",
        "SLURMD_NODENAME",
        "SBATCH_PARTITION",
        "SQUEUE_USERS",
        "PMIX_RANK",
        "SALLOC_QOS",
    ):
        monkeypatch.setenv(name, "stale")
    monkeypatch.setenv("SLURM_CONF", "/c")
    answers["sbatch"] = "env | cut -d= -f1 | grep -E '^(SLURM|SBATCH|SQUEUE|PMI|SALLOC)'"
    assert slurm("sbatch") == "SLURM_CONF\n"


@pytest.mark.parametrize(
    "change",
    [{"id": "12"}, {"id": 1.5}, {"script": "../job.sh"}, {"exclude": "n1"}, {"part": None}],
)
def test_a_damaged_record_of_jobs_is_named(tmp_path, change):
    job = {
        "id": 12,
        "part": "all",
        "script": "job.sh",
        "submitted": "",
        "after": None,
        "exclude": ["n1"],
    }
    (tmp_path / "config.yaml").touch()
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [job]}))
    assert Jobs(tmp_path).all[0].exclude == ("n1",)
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [{**job, **change}]}))
    with pytest.raises(DataError, match="forget the jobs"):
        Jobs(tmp_path)
