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


def test_operations_in_fp8_count_half_of_the_peak_of_bf16():
    work = Workload(flops_per_token=4e9, peak=1000e12, fp8_flops_per_token=3e9)
    assert work.mfu(100_000) == pytest.approx(0.4)
    # 1e9 at 1000 and 3e9 at 2000 TFLOP/s take 2.5 us of the 10 us of a token
    assert work.utilisation(100_000) == pytest.approx(0.25)
    assert Workload(4e9, 1, 1000e12).utilisation(100_000) == pytest.approx(0.4)
    assert Workload(4e9, fp8_flops_per_token=3e9).utilisation(1.0) is None
