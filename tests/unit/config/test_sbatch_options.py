import pytest

from megatron_hypenet.config.sbatch_options import SBATCH, SRUN, check_options, words_of


@pytest.mark.parametrize(
    "option",
    [
        "--array=1-3%1", "--array 1-3", "-a1-3", "-a 1-3", "--arr=1-3", "-Qa1-3", "--wrap=x",
        "--requeue",
        "--no-requeue", "--signal=USR1@1", "--output=x", "-o x", "-ox", "--error x", "--ntasks=3",
        "-n3",
        "--nodes=9", "-N 9", "--job-name=x", "-Jx", "--export=ALL", "--parsable", "--wait", "-W",
        "--dependency=singleton", "-d singleton", "--chdir=/", "--time=1", "--mem=1",
        "--partition=x",
        "--no-kill", "-M x", "--test-only", "--comment=x --array=1", "-C gpu -a1", "-H -a1",
        "--help",
    ],
)  # fmt: skip
def test_what_the_job_script_sets_or_cannot_do_with(option):
    with pytest.raises(ValueError, match="is not possible"):
        check_options(words_of(option), SBATCH)


@pytest.mark.parametrize(
    "option",
    [
        "--comment=x", "--comment 'a b'", "-C gpu", "--constraint=a&b", "--mem-per-cpu=4G",
        "--gres=gpu:8", "--reservation=x", "-H",
        "--exclusive=user", "--mail-type=END", "--switches=1", "--time-min=10", "-Qv", "--nice",
        "-w n1", "--gpus-per-task=1", "-L lic:2",
        "--licenses=a", "--begin=now+1hour", "--nodelist=n1", "--cpus-per-gpu=4",
    ],
)  # fmt: skip
def test_everything_else_passes(option):
    check_options(words_of(option), SBATCH)


@pytest.mark.parametrize(
    "option", ["x", "hetjob", ":", "--comment=a b", "--comment a b", "--", "-"]
)
def test_words_that_are_no_options(option):
    with pytest.raises(ValueError, match="is not an option"):
        check_options(words_of(option), SBATCH)


def test_a_quote_that_is_not_closed():
    with pytest.raises(ValueError, match="No closing quotation"):
        words_of("--comment='x")


@pytest.mark.parametrize(
    "words",
    [
        ["--nodes=1"],
        ["-n", "1"],
        ["--kill-on-bad-exit=0"],
        ["-K0"],
        ["--pty"],
        ["--label"],
        ["-r1"],
        ["hostname"],
    ],
)
def test_srun_keeps_to_the_layout(words):
    with pytest.raises(ValueError, match="is not"):
        check_options(words, SRUN)


@pytest.mark.parametrize(
    "words",
    [
        ["--cpu-bind=none"],
        ["--no-container-mount-home"],
        ["--cpu-bind", "none"],
        ["--mpi=pmix"],
        ["-u"],
    ],
)
def test_what_srun_may_be_told(words):
    check_options(words, SRUN)
