"""KL of one converted layer: the direct computation, and an attempt that goes on."""

import pytest
import torch

from megatron_hypenet.stages.selection.kl import KLMethod
from megatron_hypenet.stages.selection.layer_sweep import swapped


def direct(teacher, mixers, tokens):
    """Return KL(teacher || teacher with one layer swapped) in nats per token, from whole logits."""
    with torch.no_grad():
        before = torch.log_softmax(teacher(tokens), -1)
        found = []
        for layer in range(3):
            with swapped(teacher, layer, mixers):
                after = torch.log_softmax(teacher(tokens), -1)
            found.append(float((before.exp() * (before - after)).sum(-1).mean()))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_direct_computation_for_any_batch_size(
    teacher, mixers, selection_work, batch_size
):
    work = selection_work(num_attention=1, models=(teacher, mixers), batch_size=batch_size)
    want = direct(teacher, mixers, work.heldout()[:, :-1])
    assert min(want) > 1e-3
    content = KLMethod().measure(work)
    got = [content["layers"][str(layer)]["kl"] for layer in range(3)]
    assert got == pytest.approx(want, rel=1e-12)
    assert content["tokens"] == 4 * 3 * 11  # the teacher and three others read 33 tokens


def test_an_interrupted_attempt_goes_on_with_the_same_result(teacher, mixers, selection_work):
    def work(**changes):
        return selection_work(num_attention=1, models=(teacher, mixers), batch_size=1, **changes)

    whole = KLMethod().measure(work())
    saved = []
    with pytest.raises(KeyboardInterrupt):
        KLMethod().measure(work(saved=saved, stop_after=2))
    assert [content["partial"]["sequences"] for content in saved] == [1, 2]
    again = []
    assert KLMethod().measure(work(known=saved[-1], saved=again)) == whole
    assert len(again) == 1, "the sequences that were done are not read again"
