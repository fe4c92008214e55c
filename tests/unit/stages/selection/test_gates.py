"""Learning gates: the budget, the update, and the layer that obviously matters."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.errors import DivergedError
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection import gated_layers
from megatron_hypenet.stages.selection.gates import GatesMethod, GateState, within_budget
from megatron_hypenet.stages.selection.method import RankSettings
from megatron_hypenet.stages.selection.ranking import rank
from megatron_hypenet.stages.selection.scores import parse_scores

LOGIT = st.floats(-1e3, 1e3)
FEW = {"gates": {"train_iters": 6, "global_batch_size": 2}}


@given(st.lists(LOGIT, min_size=2, max_size=64), st.data())
def test_gates_keep_the_budget_and_the_order(logits, data):
    budget = data.draw(st.integers(1, len(logits) - 1))
    gates = within_budget(logits, budget)
    assert sum(gates) == pytest.approx(budget, abs=1e-9)
    assert all(0.0 <= gate <= 1.0 for gate in gates)
    order = sorted(range(len(logits)), key=logits.__getitem__)
    assert all(gates[low] <= gates[high] for low, high in zip(order, order[1:], strict=False))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.data())
def test_gates_are_one_shift_away_from_the_logits(logits, data):
    gates = within_budget(logits, data.draw(st.integers(1, len(logits) - 1)))
    shifts = [a - math.log(g / (1 - g)) for a, g in zip(logits, gates, strict=True)]
    assert shifts == pytest.approx([shifts[0]] * len(shifts), abs=1e-6)


def test_equal_logits_share_the_budget():
    assert within_budget([3.0] * 8, 2) == pytest.approx([0.25] * 8, abs=1e-14)


def test_a_first_step_has_the_length_of_the_rate():
    """The averages begin at 0, and their corrections take that away."""
    zeros = (0.0,) * 3
    state = GateState(logits=zeros, momentum=zeros).moved(0.5, [-4.0, 1.0, 0.0], 0.25)
    size = math.sqrt((3**2 + 2**2 + 1) / 3)  # without the mean, which is -1
    assert state.logits == pytest.approx((0.25 * 3 / size, -0.25 * 2 / size, -0.25 / size))
    assert state.losses == (0.5,)
    scaled = GateState(logits=zeros, momentum=zeros).moved(0.5, [-4e6, 1e6, 0.0], 0.25)
    assert scaled.logits == pytest.approx(state.logits), "the scale of the loss does not matter"


def test_equal_gradients_move_nothing():
    zeros = (0.0,) * 3
    state = GateState(logits=zeros, momentum=zeros).moved(0.5, [2.0, 2.0, 2.0], 0.25)
    assert state.logits == zeros


@pytest.mark.parametrize("matters", [0, 1, 2])
def test_the_layer_that_obviously_matters_is_found(teacher, mixers, selection_work, matters):
    """In the other layers the RNN mixer is the attention itself, so converting them costs
    nothing."""
    parts = {
        layer: mixers.of_layer(layer) if layer == matters else teacher.mixer(layer)
        for layer in range(3)
    }
    aligned = AlignedMixers(mixers.model_config, parts)
    work = selection_work(num_attention=1, models=(teacher, aligned), **FEW)
    content = {"method": "gates", **GatesMethod().measure(work)}
    chosen = rank(parse_scores(content), RankSettings(num_attention=1), "lightning_attn")
    assert chosen.attention_layers == (matters,)
    gates = [content["layers"][str(layer)]["gate"] for layer in range(3)]
    assert sum(gates) == pytest.approx(1.0, abs=1e-12) and gates[matters] > 0.8
    assert content["losses"][-1] < content["losses"][0] and len(content["losses"]) == 6
    assert content["tokens"] == 2 * 6 * 2 * 11  # teacher and gated model; steps, rows, positions


def test_an_interrupted_attempt_comes_to_the_same_gates(teacher, mixers, selection_work):
    def measured(**changes):
        # gated layers are put into the model for good
        original = [teacher.mixer(layer) for layer in range(3)]
        work = selection_work(num_attention=1, models=(teacher, mixers), **FEW, **changes)
        try:
            return GatesMethod().measure(work)
        finally:
            for layer, mixer in enumerate(original):
                teacher.set_mixer(layer, mixer)

    whole = measured()
    saved = []
    with pytest.raises(KeyboardInterrupt):
        measured(saved=saved, stop_after=4)
    again = []
    assert measured(known=saved[-1], saved=again) == whole
    assert len(again) == 2


def test_all_layers_need_no_gates(selection_work):
    content = GatesMethod().measure(selection_work(num_attention=3))
    assert [entry["gate"] for entry in content["layers"].values()] == [1.0] * 3
    assert content["tokens"] == 0


def test_a_loss_that_is_not_finite_ends_it_and_saves_nothing(
    teacher, mixers, selection_work, monkeypatch
):
    monkeypatch.setattr(
        gated_layers.GatedModel,
        "loss_and_gradient",
        lambda self, gates, rows: (math.nan, [0.0, 0.0, 0.0]),
    )
    saved = []
    work = selection_work(num_attention=1, models=(teacher, mixers), saved=saved, **FEW)
    with pytest.raises(DivergedError, match="step 1 is nan"):
        GatesMethod().measure(work)
    assert saved == []
