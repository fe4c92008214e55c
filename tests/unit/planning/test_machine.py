"""The rates of other GPUs follow from their data sheets."""

import pytest

from megatron_hypenet.errors import UsageError
from megatron_hypenet.planning.machine import H100, machine
from megatron_hypenet.training.throughput import PEAK_BF16


def test_other_gpus_follow_their_data_sheets():
    old = machine("NVIDIA A100-SXM4-80GB")
    assert old.products / H100.products == pytest.approx(312 / 989)
    assert old.memory / H100.memory == pytest.approx(2.0 / 3.35)
    with pytest.raises(UsageError, match="Voodoo2: its rates are not known; use one of H100"):
        machine("Voodoo2")


def test_every_gpu_with_a_known_peak_has_rates():
    assert all(machine(gpu).peak == peak for gpu, peak in PEAK_BF16.items())
