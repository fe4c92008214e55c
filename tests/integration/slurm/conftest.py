"""A real SLURM of three nodes for the tests of this folder. Where it is not installed they fail: CI
installs it."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
TESTCLUSTER = ROOT / "slurm" / "testcluster"
STAGE = {
    "seq_length": 64,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "log_interval": 1,
}
RECALL = {
    "recall_sequences": 2,
    "recall_pairs": 2,
    "heldout_sequences": 2,
    "seq_length": 64,
    "batch_size": 2,
}


class Cluster:
    """A cluster that is up, used as a user would: by commands."""

    def __init__(self, folder, nodes):
        self.folder = Path(folder)
        self.runs = []
        # other numbers of jobs, and so other ports, than the cluster of a test beside this one
        done = self.control(
            "up", "--nodes", str(nodes), "--first-job", str(1 + 50 * (os.getpid() % 390))
        )
        if done.returncode:
            pytest.fail(f"the test cluster does not start:\n{done.stdout}{done.stderr}")
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def control(self, *words):
        return subprocess.run(
            [TESTCLUSTER, *words, "--dir", self.folder],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def run(self, *words, code=0):
        """Return the output of a command that must end with `code`."""
        done = subprocess.run(
            [*map(str, words)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, (
            f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout + done.stderr

    def hypenet(self, *words, code=0):
        self.runs += [
            Path(word.partition("=")[2])
            for word in map(str, words)
            if word.startswith("output_dir=")
        ]
        return self.run(ROOT / ".venv" / "bin" / "hypenet", *words, code=code)

    def until(self, what, holds, seconds, every=0.3):
        """Wait for `holds()`; what it returned. Fails with the logs of the last run after four
        times the `seconds` of a quiet machine."""
        deadline = time.monotonic() + 4 * seconds
        while time.monotonic() < deadline:
            found = holds()
            if found:
                return found
            time.sleep(every)
        paths = [path for run in self.runs[-1:] for path in sorted(run.glob("logs/**/*.log"))]
        logs = "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths)
        pytest.fail(f"{seconds} s without: {what}\n{self.run('squeue')}\n{logs}")


@pytest.fixture(scope="session")
def cluster():
    """Start a cluster of three nodes; runs of two leave a spare one. A test that harms a node heals
    it again."""
    # below /tmp itself: the path of munge's socket may have 107 characters
    up = Cluster(f"/tmp/hypenet-slurm-{os.getpid()}", 3)
    yield up
    up.control("down")


@pytest.fixture(scope="module")
def paper_cluster():
    """Provide 64 nodes that exist in the configuration only."""
    up = Cluster(f"/tmp/hypenet-slurm64-{os.getpid()}", 64)
    yield up
    up.control("down")


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Provide a small run on the bundled teacher; saves often, because the tests interrupt it."""
    values = {
        "output_dir": "runs/never", "teacher": "assets/tiny-qwen3", "device": "cpu",
        "data": {"train": ["assets/tiny-qwen3/heldout.txt"]},
        "align": {**STAGE, "train_iters": 40, "save_interval": 5},
        "distill": {**STAGE, "train_iters": 6, "save_interval": 3},
        "finetune": {**STAGE, "train_iters": 4, "save_interval": 4},
        "select": RECALL,
        "eval": {**RECALL, "length_multiples": [1]},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def calm(cluster, config, tmp_path_factory):
    """Provide the folder of a run of the same configuration and number of processes under another
    launcher, which nothing disturbs."""
    out = tmp_path_factory.mktemp("calm") / "run"
    cluster.hypenet("run", config, f"output_dir={out}", "--nproc", "2")
    return out
