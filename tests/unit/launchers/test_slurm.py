import os

import pytest

from launchers import slurm
from megatron_hypenet.errors import SetupError

TASK = {
    "SLURM_JOB_ID": "70001",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "HYPENET_HEAD_ADDRESS": "127.0.0.1",
}


def test_the_place_comes_from_slurm():
    assert slurm.place_of(TASK) == {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "20001",
    }


@pytest.mark.parametrize(
    ("devices", "local_rank"), [("0,1,2,3", "1"), ("1", "0"), ("GPU-12ab", "0"), ("", "1")]
)
def test_a_task_that_sees_one_gpu_calls_it_the_first(devices, local_rank):
    assert slurm.place_of({**TASK, "CUDA_VISIBLE_DEVICES": devices})["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize("name", [name for name in TASK if name != "HYPENET_HEAD_ADDRESS"])
def test_what_slurm_does_not_say_is_fatal(name):
    if name == "SLURM_STEP_NODELIST":
        task = {
            key: value for key, value in TASK.items() if key not in (name, "HYPENET_HEAD_ADDRESS")
        }
    else:
        task = {key: value for key, value in TASK.items() if key != name}
    with pytest.raises(SetupError, match=f"{name} is not set"):
        slurm.place_of(task)


def test_ports_stay_below_those_of_outgoing_connections():
    ports = {slurm.port_of(job) for job in range(100_000, 120_000)}
    assert len(ports) == 20_000 and min(ports) >= 10_000 and max(ports) < 32_768


def test_the_port_that_the_job_script_found_free():
    assert slurm.place_of({**TASK, "HYPENET_MASTER_PORT": "12345"})["MASTER_PORT"] == "12345"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "20"), ("SLURM_PROCID", "-1"), ("SLURM_PROCID", ""),
        ("SLURM_STEP_NUM_TASKS", "0"),
        ("SLURM_STEP_NUM_TASKS", "9" * 30), ("SLURM_NODEID", "3"), ("SLURM_LOCALID", "8"),
        ("SLURM_JOB_ID", "seven"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_slurms(name, value):
    with pytest.raises(
        SetupError, match=f"{name}='{value[:20]}.*' is set here, which is not a whole number from"
    ):
        slurm.place_of({**TASK, name: value})


@pytest.mark.parametrize("nodes", ["--help", "-o", "n1 n2", "n1;x", ""])
def test_a_list_of_nodes_is_no_option_of_scontrol(nodes):
    with pytest.raises(SetupError, match="is not a list of nodes"):
        slurm.place_of({**without_head(), "SLURM_STEP_NODELIST": nodes})


@pytest.mark.parametrize("address", ["-oX", "a b"])
def test_a_head_that_is_no_host(address):
    with pytest.raises(SetupError, match="it is not a host's name or address"):
        slurm.place_of({**TASK, "HYPENET_HEAD_ADDRESS": address})


@pytest.mark.parametrize("text", ["", "8(x2", "eight", "8,,4", "0", "8(x0)", "8(x99999999)"])
def test_unreadable_task_counts(text):
    with pytest.raises(SetupError, match="is not a list of counts"):
        slurm.tasks_per_node(text)


def test_unknown_head_is_fatal_and_never_this_machine():
    with pytest.raises(SetupError, match=r"'no-such-host\.invalid' cannot be looked up"):
        slurm.place_of({**TASK, "HYPENET_HEAD_ADDRESS": "no-such-host.invalid"})


def scontrol(tmp_path, monkeypatch, script):
    """Put a program of this name in front of the PATH: what the cluster answers is the input of
    these tests."""
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def without_head():
    return {key: value for key, value in TASK.items() if key != "HYPENET_HEAD_ADDRESS"}


def test_head_is_the_first_node_at_the_address_slurm_uses(tmp_path, monkeypatch):
    hosts = '"show hostnames n[1-3]") printf "n1\\nn2\\nn3\\n";;'
    node = '"--oneliner show node n1") echo "NodeName=n1 NodeAddr=127.0.0.2 X=1";;'
    answers = f'case "$*" in {hosts} {node} esac'
    scontrol(tmp_path, monkeypatch, answers)
    assert slurm.place_of(without_head())["MASTER_ADDR"] == "127.0.0.2"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo 'Unable to contact slurm controller' >&2; exit 1",
            "scontrol show hostnames .*Unable to contact slurm controller",
        ),
        ("true", "names no node"),
        ('[ "$2" = hostnames ] && echo n1 || echo "NodeName=n1"', "gives no NodeAddr"),
    ],
)
def test_a_cluster_that_does_not_answer_is_fatal(tmp_path, monkeypatch, script, says):
    scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(SetupError, match=says):
        slurm.place_of(without_head())


def test_hosts_of_the_ranks(tmp_path, monkeypatch):
    scontrol(tmp_path, monkeypatch, 'printf "n1\\nn2\\n"')
    assert slurm.step_hosts(
        {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    ) == ["n1", "n1", "n2"]
    with pytest.raises(SetupError, match=r"names 2 nodes, .* counts for 3"):
        slurm.step_hosts({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1,1"})
