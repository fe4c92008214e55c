"""Gates between attention and RNN mixer: the loss from whole logits, and gradients by differences,
in float64."""

import pytest
import torch
from torch import nn

from megatron_hypenet.stages.selection.comparison import Rows
from megatron_hypenet.stages.selection.gated_layers import GatedModel

GATES = (0.2, 0.7, 0.1)


class Mixed(nn.Module):
    """A mixture written out, with a number for its gate."""

    def __init__(self, attention, mixer, gate):
        super().__init__()
        self.attention, self.mixer, self.gate = attention, mixer, gate

    def forward(self, x, *args, **kwargs):
        ours, other = (part(x, *args, **kwargs)[0] for part in (self.attention, self.mixer))
        return self.gate * ours + (1 - self.gate) * other, None


@pytest.fixture
def rows():
    """Provide three rows, of which a part counts."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (3, 9), generator=generator)
    predicted = torch.rand(3, 9, generator=generator) < 0.5
    predicted[:, 0] = True  # a row without any would have no mean
    return Rows(tokens, predicted, micro_batch_size=2)


def direct(teacher, mixers, rows, gates):
    """Return the loss from whole logits."""
    before = torch.log_softmax(teacher(rows.tokens), -1)
    attention = [teacher.mixer(layer) for layer in range(3)]
    for layer, gate in enumerate(gates):
        teacher.set_mixer(layer, Mixed(attention[layer], mixers.of_layer(layer), gate))
    after = torch.log_softmax(teacher(rows.tokens), -1)
    for layer in range(3):
        teacher.set_mixer(layer, attention[layer])
    kl = (before.exp() * (before - after)).sum(-1)
    parts = [part[counts].mean() for part, counts in zip(kl, rows.predicted, strict=True)]
    return sum(parts) / len(parts)


def test_loss_and_gradient_are_those_of_autograd_in_float64(teacher, mixers, rows):
    leaf = torch.tensor(GATES, dtype=torch.float64, requires_grad=True)
    want = direct(teacher, mixers, rows, leaf)
    (want_gradient,) = torch.autograd.grad(want, leaf)
    loss, gradient = GatedModel(teacher, mixers).loss_and_gradient(GATES, rows)
    assert loss == pytest.approx(float(want.detach()), rel=1e-12)
    assert gradient == pytest.approx(want_gradient.tolist(), rel=1e-10)


def test_the_gradient_is_the_slope_of_the_loss(teacher, mixers, rows):
    model = GatedModel(teacher, mixers)
    _, gradient = model.loss_and_gradient(GATES, rows)
    step = 1e-5
    for layer in range(3):
        ends = []
        for sign in (1, -1):
            moved = list(GATES)
            moved[layer] += sign * step
            ends.append(model.loss_and_gradient(moved, rows)[0])
        assert gradient[layer] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_open_gates_are_the_teacher_and_closed_ones_the_converted_model(teacher, mixers, rows):
    want = float(direct(teacher, mixers, rows, (0.0, 0.0, 0.0)).detach())
    model = GatedModel(teacher, mixers)
    assert model.loss_and_gradient((1.0, 1.0, 1.0), rows)[0] == pytest.approx(0.0, abs=1e-14)
    assert model.loss_and_gradient((0.0, 0.0, 0.0), rows)[0] == pytest.approx(want, rel=1e-12)


def test_no_weight_gets_a_gradient(teacher, mixers, rows):
    GatedModel(teacher, mixers).loss_and_gradient(GATES, rows)
    for module in (teacher, mixers):
        assert all(parameter.grad is None for parameter in module.parameters())
