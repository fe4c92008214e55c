"""All generators continue where they were."""

import random

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_hypenet.checkpoint.rng import gather_state, load_rng


def draws() -> tuple:
    return (
        torch.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        random.gauss(0, 1),
        random.random(),
    )


def test_generators_continue_bit_for_bit(tmp_path):
    random.gauss(0, 1)  # leaves a cached second value behind, and so does numpy
    np.random.standard_normal(1)
    save_file(gather_state(), tmp_path / "rng.safetensors")
    want = draws()
    assert draws() != want
    assert load_rng(tmp_path / "rng.safetensors")
    assert draws() == want


def test_another_number_of_processes_starts_afresh(tmp_path):
    state = gather_state()
    save_file(
        state | {f"rank1.{name[6:]}": value.clone() for name, value in state.items()},
        tmp_path / "rng.safetensors",
    )
    before = torch.get_rng_state()
    assert not load_rng(tmp_path / "rng.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
