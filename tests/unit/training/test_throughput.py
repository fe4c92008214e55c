"""Use of the hardware from tokens per second."""

import pytest

from megatron_hypenet.training.throughput import Workload, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_go_by_name(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_the_useful_share_of_the_peak():
    work = Workload(flops_per_token=13.1e9, num_devices=8, peak=989e12)
    assert work.tflops_per_device(8 * 37_900) == pytest.approx(496.5, rel=1e-3)
    assert work.mfu(8 * 37_900) == pytest.approx(0.502, rel=1e-3)
    assert Workload(flops_per_token=1.0).mfu(10.0) is None
