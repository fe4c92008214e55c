import os
import sys

import pytest

from megatron_hypenet.errors import SetupError
from megatron_hypenet.process_place import (
    Place,
    chosen_port,
    hypenet_command,
    is_host,
    launched_place,
    launched_world_size,
    place,
    threads_per_process,
)
from tests.processes import loaded_by

MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_the_command_is_this_interpreters():
    assert hypenet_command(["train", "a b.yaml"]) == (
        sys.executable,
        "-m",
        "megatron_hypenet",
        "train",
        "a b.yaml",
    )


def test_place():
    own = place(rank=5, world_size=8, local_rank=1, local_size=4, master="node0", port=29500)
    assert own == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0"}, None),  # ours, for DeepSpeed
        ({"RANK": "1", "WORLD_SIZE": "4", **MEETING}, 4),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING}, 1),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        # a batch script: srun has not started its tasks
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "8",
                "RANK": "1",
                "WORLD_SIZE": "2",
                **MEETING,
            },
            2,
        ),
    ],
)
def test_being_under_a_launcher(environment, size):
    assert launched_world_size(environment) == size


def test_the_place_that_a_launcher_gives():
    own = place(rank=5, world_size=8, local_rank=1, local_size=4, master="node0", port=29500)
    assert launched_place(own) == Place(
        rank=5, world_size=8, local_rank=1, local_size=4, master="node0", port=29500
    )
    assert launched_place({"RANK": "1", "WORLD_SIZE": "2", **MEETING}) == Place(
        rank=1, world_size=2, local_rank=0, local_size=None, master="node0", port=29500
    )


LAUNCHED = place(rank=1, world_size=4, local_rank=1, local_size=4, master="node0", port=29500)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE='4' is set here, without RANK"),
        ({"RANK": "0"}, "RANK='0' is set here, without WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "RANK='0' is set here, without MASTER_ADDR"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"},
            "RANK='0' is set here, without MASTER_PORT",
        ),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK='3' is set here, without RANK and WORLD_SIZE"),
        (
            {**LAUNCHED, "WORLD_SIZE": ""},
            "WORLD_SIZE='' is set here, which is not a whole number from 1 to",
        ),
        ({**LAUNCHED, "WORLD_SIZE": "four"}, "WORLD_SIZE='four'"),
        ({**LAUNCHED, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({**LAUNCHED, "WORLD_SIZE": "٤"}, "WORLD_SIZE='٤'"),
        (
            {**LAUNCHED, "RANK": "-1"},
            "RANK='-1' is set here, which is not a whole number from 0 to 3",
        ),
        ({**LAUNCHED, "RANK": "4"}, "RANK='4'"),
        ({**LAUNCHED, "LOCAL_RANK": "4"}, "LOCAL_RANK='4'"),
        ({**LAUNCHED, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE='5'"),
        (
            {**LAUNCHED, "MASTER_PORT": "0"},
            "MASTER_PORT='0' is set here, which is not a whole number from 1 to 65535",
        ),
        ({**LAUNCHED, "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({**LAUNCHED, "MASTER_ADDR": ""}, "MASTER_ADDR='' is set here, which is not an address"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
    ],
)
def test_variables_that_no_launcher_set_are_named(environment, says):
    with pytest.raises(SetupError) as error:
        launched_world_size(environment)
    assert str(error.value).startswith(says) and "unset it: unset " in str(error.value)


def test_a_port_is_chosen_by_hand():
    assert chosen_port({}) is None and chosen_port({"HYPENET_MASTER_PORT": "4711"}) == 4711
    for wrong in ("", "0", "65536", "here", "-1"):
        with pytest.raises(SetupError, match=f"HYPENET_MASTER_PORT='{wrong}' is not a port"):
            chosen_port({"HYPENET_MASTER_PORT": wrong})


@pytest.mark.parametrize(
    "name", ["n1", "me@10.0.0.7", "fe80::1", "::1", "worker-1.example.org", "gpu_node7"]
)
def test_names_of_hosts(name):
    assert is_host(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-oProxyCommand=x",
        "-v",
        "me@-v",
        "-l@host",
        "^hosts",
        "/n.*/",
        "a b",
        "a,b",
        "n[1-3]",
        "a\n",
        "a;b",
        "$(x)",
        "a" * 300,
        "ü",
    ],
)
def test_what_ssh_and_pdsh_would_take_for_something_else(name):
    assert not is_host(name)


def test_threads_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores and threads_per_process(10 * cores) == 1


def test_launchers_import_nothing_heavy():
    code = "import launchers.local, megatron_hypenet.process_place"
    assert loaded_by(code, ("torch", "numpy", "pydantic")) == []
