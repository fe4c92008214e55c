import pytest

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
    plain, boxed = (load_cluster_config(repo_root / "configs" / "cluster" / f"h100_{kind}.yaml") for kind in ("infiniband", "pyxis"))
    assert boxed.container is not None and boxed.variables == plain.variables and boxed.time == plain.time


def test_one_process_per_gpu_unless_told_otherwise(tmp_path):
    assert profile(tmp_path).world_size == 16
    assert profile(tmp_path, SMALL, "tasks_per_node=4").world_size == 8


def test_numbers_become_the_text_that_variables_are(tmp_path):
    assert profile(tmp_path, SMALL + "variables: {OMP_NUM_THREADS: 8, X: 1.5}\nmemory: 0\n").variables == {
        "OMP_NUM_THREADS": "8",
        "X": "1.5",
    }


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
        (["variables={DEBUG: null}"], "variables.DEBUG: should be a valid string, got NoneType None"),
        (["grace_seconds=0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_named(tmp_path, words, says):
    with pytest.raises(ConfigError) as fault:
        profile(tmp_path, SMALL, *words)
    assert says in str(fault.value)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(ConfigError, match="3 problems"):
        profile(tmp_path, SMALL, "nodes=0", "tiem=1", "container.mounts=[a]")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("01:00:30", 3630), ("2-0", 172800), ("2-12:30", 217800), ("2-12:30:05", 217805)],
)
def test_time_limits_in_seconds(limit, seconds):
    assert seconds_of(limit) == seconds


def test_a_warning_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"grace_seconds=300 leaves nothing of time='00:05:00'"):
        ClusterConfig(nodes=1, gpus_per_node=1, time="00:05:00")


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "2-0", "2-12:30", "2-12:30:00"])
def test_time_limits_as_sbatch_takes_them(time):
    assert ClusterConfig(nodes=1, gpus_per_node=1, time=time).time == time
