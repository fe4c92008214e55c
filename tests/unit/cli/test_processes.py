"""Who starts how many processes: the launcher, the user, or the GPUs that are there."""

import pytest
import typer

from launchers import local
from megatron_hypenet.cli import processes
from megatron_hypenet.errors import SetupError, UsageError
from tests.unit.config.test_checks import MODEL, STAGE, axes, run


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Provide a machine without launcher; call with a number of GPUs."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def with_gpus(number):
        monkeypatch.setattr(local, "visible_gpus", lambda: number)
        processes._gpus.cache_clear()

    with_gpus(0)
    yield with_gpus
    processes._gpus.cache_clear()


def under(monkeypatch, size, rank=0):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def test_a_launcher_decides(monkeypatch):
    under(monkeypatch, 6)
    assert processes.count(run(), MODEL, None) == processes.fixed(2) == 6
    assert processes.count(run(), MODEL, 6) == 6
    with pytest.raises(
        UsageError, match="--nproc 4 in a process that a launcher started as one of 6"
    ):
        processes.count(run(), MODEL, 4)
    assert processes.planned_start(6) is None
    processes.start_here(6)


def test_a_bare_task_of_srun_takes_its_place(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(
        "launchers.slurm.place_of", lambda environment: {"RANK": "3", "WORLD_SIZE": "4"}
    )
    monkeypatch.setattr(processes.os, "environ", dict(processes.os.environ))  # join writes into it
    assert (
        processes.join() == 4 and processes.os.environ["RANK"] == "3" and not processes.is_rank0()
    )


@pytest.mark.parametrize(
    ("parallel", "gpus", "nproc", "expected"),
    [
        (axes(), 0, None, 1),
        (axes(tp=2, pp=2), 0, None, 4),
        (axes(tp=2), 0, 4, 4),
        (axes(), 8, None, 4),  # 8 sequences in micro-batches of 2 keep 4 replicas busy
        (axes(tp=2), 8, None, 8),
        (axes(tp=4), 6, None, 4),
        (axes(tp=8), 8, None, 8),
        (axes(tp=3), 8, None, 3),  # broken whatever the number: the layout check speaks
        (axes(), 8, 1, 1),
        (axes(), 1, None, 1),
    ],
)
def test_the_number_without_a_launcher(machine, parallel, gpus, nproc, expected):
    machine(gpus)
    assert processes.count(run(parallel), MODEL, nproc) == expected


def test_gpus_are_left_alone_by_a_run_on_the_cpu(machine):
    machine(8)
    assert processes.count(run(device="cpu"), MODEL, None) == 1


@pytest.mark.parametrize(("parallel", "nproc"), [(axes(tp=4), None), (axes(), 4)])
def test_each_process_needs_its_gpu(machine, parallel, nproc):
    machine(2)
    with pytest.raises(SetupError, match="4 processes need a GPU each, and 2 are visible here"):
        processes.count(run(parallel), MODEL, nproc)


def test_a_batch_that_fits_nowhere_gives_one_replica(machine):
    machine(8)
    single = {**STAGE, "micro_batch_size": 1, "global_batch_size": 1}
    assert processes.count(run(align=single, distill=single, finetune=single), MODEL, None) == 1


def test_starting_hands_on_words_and_exit_code(machine, monkeypatch, capsys):
    machine(4)
    seen = []
    monkeypatch.setattr(local, "run", lambda launch: seen.append(launch) or 75)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "_threads_are_ours", False)
    processes.use_all_cores()
    processes.WORDS.set(("train", "x.yaml", "--dry-run"))
    with pytest.raises(typer.Exit) as left:
        processes.start_here(2)
    assert left.value.exit_code == 75 and "OMP_NUM_THREADS" not in processes.os.environ
    assert (seen[0].words, seen[0].num_processes) == (("train", "x.yaml"), 2)
    assert capsys.readouterr().err == "starting 2 processes on this machine with 4 GPUs\n"
    processes.start_here(1)
    assert len(seen) == 1


def test_a_number_of_threads_that_is_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    processes.use_all_cores()
    assert processes.os.environ["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def hosts(tmp_path):
    """Provide a hostfile of six slots, forgotten after the test."""
    (tmp_path / "hosts").write_text("a slots=4\nb slots=2\n")
    yield tmp_path / "hosts"
    processes.choose("local", None, None)


def test_a_hostfile_says_how_many(machine, hosts):
    machine(1)
    processes.choose("hostfile", hosts, None)
    assert processes.count(run(), MODEL, None) == processes.fixed(2) == 6
    with pytest.raises(UsageError, match="--nproc 2 with a hostfile; its slots say how many"):
        processes.count(run(), MODEL, 2)
    with pytest.raises(SetupError, match="missing: no such file; a hostfile has lines"):
        processes.choose("hostfile", hosts.with_name("missing"), None)
        processes.count(run(), MODEL, None)


def test_a_hostfiles_processes_do_not_start_more(monkeypatch, hosts):
    under(monkeypatch, 6)
    processes.choose("hostfile", hosts, ["NAME"])
    assert processes.count(run(), MODEL, None) == 6 and processes.planned_start(6) is None


def test_even_one_process_starts_on_its_host(monkeypatch, hosts):
    monkeypatch.setattr("launchers.hostfile.planned", lambda *arguments: arguments)
    processes.choose("hostfile", hosts, ["NAME"])
    token = processes.WORDS.set(("run", "x.yaml", "--dry-run"))
    try:
        start = processes.planned_start(1)
        assert start.launch == (("run", "x.yaml"), hosts, ("NAME",))
    finally:
        processes.WORDS.reset(token)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ssh", None, None), "--launcher ssh: choose one of local, hostfile"),
        (("hostfile", None, None), "--launcher hostfile needs --hostfile FILE"),
        (
            ("local", "hosts", None),
            "--hostfile and --env are for other hosts; add --launcher hostfile",
        ),
        (("local", None, ["A"]), "--hostfile and --env are for other hosts"),
    ],
)
def test_launcher_options_that_do_not_fit(words, said):
    with pytest.raises(UsageError, match=said):
        processes.choose(*words)
