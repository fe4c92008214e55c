"""A frozen model in FP8: what is replaced, what it computes, and where it is refused."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.model import fp8_layers
from megatron_hypenet.model.fp8_layers import Fp8Linear, fp8_divergence, quantize, quantized_layers
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.ops.fp8_linear import FP8
from megatron_hypenet.parallel.cpu import device
from tests.tiny import tiny_teacher_config

SHAPE = tiny_teacher_config(2, hidden_size=32, ffn_hidden_size=48, init_method_std=0.2)


def teacher(dtype=torch.float32, **kwargs):
    return build_model(SHAPE, ParallelConfig(), dtype=dtype, seed=3, **kwargs)


def ids(rows=3, length=16):
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE.vocab_size, (rows, length), generator=drawn).to(device())


def test_linear_layers_and_nothing_else_are_in_fp8():
    model = teacher()
    before = {name: weight.numel() for name, weight in model.named_parameters()}
    quantize(model)
    after = dict(model.named_parameters())
    in_fp8 = {name for name, weight in after.items() if weight.dtype == FP8}
    kinds = ("linear_in", "linear_proj", "linear_fc1", "linear_fc2")
    assert in_fp8 == {name for name in before if name.split(".")[-2] in kinds}
    assert len(in_fp8) == 4 * SHAPE.num_layers
    assert {name: weight.numel() for name, weight in after.items() if "scale" not in name} == before
    assert not any(weight.requires_grad for name, weight in after.items() if name in in_fp8)


def test_a_trunk_has_no_last_mlp_to_quantise():
    model = teacher(trunk_only=True)
    quantize(model)
    found = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(found) == 4 * SHAPE.num_layers - 2


def test_predictions_stay_near_and_the_divergence_is_that_of_the_logits():
    model = teacher()
    with torch.no_grad():
        before = model(ids()).double()
    kl, same = fp8_divergence(model, ids().split(2))
    with torch.no_grad():
        assert torch.equal(model(ids()).double(), before)  # left as it was
        quantize(model)
        after = model(ids()).double()
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert same == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    assert 0 < kl < 0.05 and same > 0.8


def test_exchanging_a_place_twice_changes_nothing():
    model = teacher()
    (place, *_) = quantized_layers(model)
    linear = getattr(place.parent, place.name)
    back = place.exchanged()
    assert isinstance(getattr(place.parent, place.name), Fp8Linear)
    assert back.other is linear and back.exchanged().other is place.other
    assert getattr(place.parent, place.name) is linear


@pytest.mark.parametrize(
    ("kind", "capability", "says"),
    [
        ("cpu", None, "a GPU, and torch sees none"),
        ("cuda", (8, 0), "8.9 or later.*has 8.0"),
        ("cuda", (9, 0), ""),
    ],
)
def test_hardware_without_fp8_is_refused(monkeypatch, kind, capability, says):
    monkeypatch.setattr(fp8_layers, "device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "GPU")
    if not says:
        fp8_layers.require_fp8_gpu("fp8.teacher")
        return
    with pytest.raises(SetupError, match=f"fp8.teacher needs.*{says}"):
        fp8_layers.require_fp8_gpu("fp8.teacher")


@pytest.mark.gpu
def test_on_a_gpu_the_products_are_those_of_the_same_values_in_float64():
    model = teacher(torch.bfloat16)
    linear = model.decoder.layers[0].mlp.linear_fc1
    in_fp8 = Fp8Linear(linear.weight, "column", model.pg_collection.tp, sequence_parallel=False)
    x = torch.randn(40, 2, SHAPE.hidden_size, device="cuda").bfloat16()
    got, _ = in_fp8(x)
    exact = x.double() @ linear.weight.double().t()
    # rounding x and the weight to e4m3 is 3.7e-2
    assert float((got.double() - exact).norm() / exact.norm()) < 5e-2
    kl, same = fp8_divergence(model, ids().split(1))
    assert 0 < kl < 0.05 and same > 0.8
