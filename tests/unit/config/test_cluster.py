import re

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.cluster import ClusterConfig, load_cluster_config, seconds_of
from megatron_hypenet.errors import ConfigError

SMALL = "nodes: 2\ngpus_per_node: 8\ntime: '01:00:00'\n"


def profile(tmp_path, text=SMALL, *overrides):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_cluster_config(path, overrides)


@pytest.mark.parametrize("name", ["h100_infiniband", "h100_pyxis", "testcluster"])
def test_profiles_of_the_repository_are_valid(repo_root, name):
    cluster = load_cluster_config(repo_root / "configs" / "cluster" / f"{name}.yaml")
    assert cluster.world_size == cluster.nodes * (cluster.gpus_per_node or 1)


def test_the_container_profile_is_the_plain_one_in_a_container(repo_root):
    plain, boxed = (
        load_cluster_config(repo_root / "configs" / "cluster" / f"h100_{kind}.yaml")
        for kind in ("infiniband", "pyxis")
    )
    assert (
        boxed.container is not None
        and boxed.variables == plain.variables
        and boxed.time == plain.time
    )


def test_one_process_per_gpu_unless_told_otherwise(tmp_path):
    assert profile(tmp_path).world_size == 16
    assert profile(tmp_path, SMALL, "tasks_per_node=4").world_size == 8


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "1.50",
        "12.10",
        "0755",
        "1:30",
        "0x1F",
        "1e3",
        "1_000",
        "yes",
        "off",
        "2026-01-01",
        "+1",
        ".inf",
        "0b1",
    ],
)
def test_variables_arrive_as_they_are_written(tmp_path, text):
    for written in (text, f"'{text}'", f'"{text}"'):
        assert profile(tmp_path, SMALL + f"variables: {{X: {written}}}\n").variables == {"X": text}
        assert profile(tmp_path, SMALL, f"variables.X={written}").variables == {"X": text}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["time=4:00"], "grace_seconds=300 leaves nothing of time='4:00'"),
        (["time='tomorrow'"], "got 'tomorrow'"),
        (["partiton=x"], "unknown key; did you mean 'partition'?"),
        (["tasks_per_node=9"], "tasks_per_node=9 is more than gpus_per_node=8"),
        (["gpus_per_node=0"], "tasks_per_node is needed where gpus_per_node is 0"),
        (["environment=[HF_TOKEN=abc]"], "'HF_TOKEN=abc' is not a variable's name"),
        (["variables={A-B: 1}"], "'A-B' is not a variable's name"),
        (
            ["variables={DEBUG: null}"],
            "variables: DEBUG: null is no text; put what the job is to get in quotes",
        ),
        (["variables={DEBUG: [1]}"], "variables: DEBUG: [1] is no text"),
        (["grace_seconds=0"], "greater than or equal to 1"),
        (["partition=''"], "partition: '' is an empty text; leave the key out, or write null"),
        (["exclude=[' ']"], "' ' is an empty text"),
        (["python=--wrap=id"], "begins with -, which srun takes for an option"),
        (["memory=1:30"], "expected a size as sbatch takes it, such as 500G"),
        (["memory=yes"], "expected a size as sbatch takes it, such as 500G"),
        (["time='\u0661:00:00'"], "expected a time limit in quotes"),
    ],
)
def test_mistakes_are_named(tmp_path, words, says):
    with pytest.raises(ConfigError) as fault:
        profile(tmp_path, SMALL, *words)
    assert says in str(fault.value)


def test_no_variable_replaces_one_of_the_job_script(tmp_path, repo_root):
    text = (repo_root / "slurm" / "job.sbatch.j2").read_text()
    its_own = set(re.findall(r"^ *(?:for )?([a-z]+)(?:=| in )", text, re.MULTILINE))
    its_own |= set(re.findall(r"read -r ([a-z]+)", text))
    assert {"run", "logs", "attempt", "port", "code", "record"} <= its_own
    for name in its_own | {"UID", "SLURM_JOB_ID"}:
        for words in (f"environment=[{name}]", f"variables={{{name}: x}}"):
            with pytest.raises(ConfigError, match=rf"{name} (is a variable of|belongs to)"):
                profile(tmp_path, SMALL, words)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(ConfigError, match="3 problems"):
        profile(tmp_path, SMALL, "nodes=0", "tiem=1", "container.mounts=[a]")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("01:00:30", 3630),
        ("2-0", 172800),
        ("2-12:30", 217800),
        ("2-12:30:05", 217805),
    ],
)
def test_time_limits_in_seconds(limit, seconds):
    assert seconds_of(limit) == seconds


def test_a_warning_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"grace_seconds=300 leaves nothing of time='00:05:00'"):
        ClusterConfig(nodes=1, gpus_per_node=1, time="00:05:00")


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "2-0", "2-12:30", "2-12:30:00"])
def test_time_limits_as_sbatch_takes_them(time):
    assert ClusterConfig(nodes=1, gpus_per_node=1, time=time).time == time


CONTROL = ["\n", "\r", "\t", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"]
KEYS = [
    "gpu_type",
    "memory",
    "partition",
    "account",
    "qos",
    "python",
    "container.image",
    "container.mounts",
    "container.workdir",
    "exclude",
    "sbatch_args",
    "srun_args",
    "setup",
    "variables",
    "environment",
]


def holding(key, text):
    """Return a profile whose setting `key` is `text`, or has it as an entry."""
    outer, _, inner = key.partition(".")
    value = {"variables": {"X": text}, "container": {"image": "i"}}.get(outer, text)
    if outer in ("exclude", "sbatch_args", "srun_args", "setup", "environment"):
        value = [text]
    elif inner:
        value[inner] = [text] if inner == "mounts" else text
    return {"nodes": 1, "gpus_per_node": 1, "time": "10", outer: value}


@pytest.mark.parametrize("key", KEYS)
def test_no_text_holds_a_control_character(key):
    for character in CONTROL:
        if key == "setup" and character in "\n\t":
            continue
        with pytest.raises(ValidationError) as fault:
            ClusterConfig.model_validate(holding(key, f"--x{character}y"))
        assert key.partition(".")[0] in str(fault.value)


def test_setup_may_have_several_lines():
    text = "if true; then\n\tmodule load cuda\nfi"
    assert ClusterConfig.model_validate(holding("setup", text)).setup == (text,)


@pytest.mark.parametrize(
    "name", ["RANK", "MASTER_PORT", "PMIX_RANK", "HYPENET_HEAD_ADDRESS", "HYPENET_UNDER_WAY"]
)
def test_the_place_of_a_process_is_not_for_a_profile(tmp_path, name):
    for words in ([f"environment=[{name}]"], [f"variables={{{name}: '1'}}"]):
        with pytest.raises(ConfigError, match=f"{name} tells a process its place"):
            profile(tmp_path, SMALL, *words)


def test_variables_of_the_submitting_shells_own_job(tmp_path):
    with pytest.raises(ConfigError, match="SLURM_CPU_BIND belongs to the shell that submits"):
        profile(tmp_path, SMALL, "environment=[SLURM_CPU_BIND]")
    assert profile(tmp_path, SMALL, "variables={SLURM_CPU_BIND: none}").variables == {
        "SLURM_CPU_BIND": "none"
    }


def test_options_that_the_job_script_cannot_do_with(tmp_path):
    with pytest.raises(
        ConfigError, match=r"sbatch_args: '--array=1-3%1' is not possible .*cluster.requeue.limit"
    ):
        profile(tmp_path, SMALL, 'sbatch_args=["--array=1-3%1"]')
    with pytest.raises(ConfigError, match="srun_args: '--pty' is not possible"):
        profile(tmp_path, SMALL, "srun_args=[--pty]")
