"""The check passes where the kernels are right (in Triton's interpreter without a GPU) and fails
where they are not."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.parallel.vocab_loss import triton_terms
from megatron_hypenet.parallel.vocab_loss.selftest import check_vocab

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_terms, "TILE", 256)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_kernels_pass(dtype, shards):
    found = check_vocab(DEVICE, dtype, vocab_rows=150, shards=shards, tokens=9)
    assert found.ok and found.error > 0, found


@pytest.mark.parametrize(
    ("shards", "function"),
    [(1, "kl_stats_and_gradient"), (1, "ce_stats_and_gradient"), (2, "kl_gradient")],
)
def test_wrong_gradients_fail(monkeypatch, shards, function):
    right = getattr(triton_terms, function)

    def wrong(*args):
        found = right(*args)
        args[-1].mul_(1.02)
        return found

    monkeypatch.setattr(triton_terms, function, wrong)
    found = check_vocab(DEVICE, torch.float32, vocab_rows=150, shards=shards, tokens=9)
    assert not found.ok and "gradient" in found.worst and 0.01 < found.error < 0.03


def test_wrong_statistics_fail(monkeypatch):
    right = triton_terms.ce_stats
    monkeypatch.setattr(triton_terms, "ce_stats", lambda x, labels: right(x, labels + 1))
    assert check_vocab(DEVICE, torch.float32, vocab_rows=150, tokens=9).worst == "score"
