"""Shared by all tests: few threads, no network, and which tests run on a CPU and which on a GPU."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Set before torch is imported anywhere: the machines that run this have two cores, and workers run
# side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# The suite runs on the CPU, with the kernels in Triton's interpreter, also where there is a GPU: a
# workstation sees what CI sees. Under HYPENET_TEST_GPU=1 (make test-gpu) runs what is made for a
# GPU, on it. To be said before anything imports torch or triton.
ON_GPU = os.environ.get("HYPENET_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell without job control starts what it runs in the background with the keyboard's signal
# ignored, and every process under it inherits that: tests of Ctrl-C would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Provide the repository this test run belongs to."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the generators: random tensors of a test are the same in every run, whichever tests ran
    before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def takes_gib() -> Iterator[Callable[[float], None]]:
    """Provide a function that GPU tests of large tensors call with the memory they need: it skips
    them where less is free, and frees it afterwards."""
    import torch

    def take(gib: float) -> None:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"takes {gib} GiB of the GPU's memory, of which {free:.0f} are free")

    yield take
    torch.cuda.empty_cache()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, on a GPU run, tests marked `gpu` and those of modules that choose a DEVICE, elsewhere
    all but the marked ones; the summary counts what is deselected."""
    if ON_GPU:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("HYPENET_TEST_GPU=1, but torch finds no CUDA device")
    left_out = [item for item in items if not runs_here(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if runs_here(item)]


def runs_here(item: pytest.Item) -> bool:
    """Return whether a test is made for what this run runs on."""
    marked = item.get_closest_marker("gpu") is not None
    return marked or hasattr(getattr(item, "module", None), "DEVICE") if ON_GPU else not marked
