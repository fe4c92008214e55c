"""The reference implementation's own numbers: weights are imported as a user would, and everything
that HALO computes must agree.

data/ holds random-weight checkpoints and float64 results of the paper's reference implementation.
Its RoPE tables are fp32, so float64 runs agree to 1e-7 or better (the limit below is 1e-6), float32
runs to 1e-4 and usually 1e-6."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_hypenet.checkpoint.load import load_model, read_model_config
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.mapping import entries
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.stages.align import AlignStage
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.stages.distill import DistillStage
from megatron_hypenet.stages.finetune import FinetuneStage

from .cases import CASES

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4}


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request, tmp_path_factory):
    """Provide the imported teacher and student, and the reference's tensors."""
    folder = tmp_path_factory.mktemp(request.param.name)
    for kind in ("qwen3", "hypenet"):
        import_hf(request.param / kind, folder / kind)
    return request.param, folder, load_file(request.param / "golden.safetensors")


@pytest.fixture(params=LIMITS, ids=str)
def dtype(request):
    return request.param


def load(folder, dtype, trunk_only=False):
    model = build_model(
        read_model_config(folder), ParallelConfig(), dtype=dtype, trunk_only=trunk_only
    )
    load_model(model, folder, allow_unused=trunk_only)
    return model


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradient_norms(model):
    """Return the L2 norm of each gradient under its Hugging Face name: fused tensors are cut into
    the parts the reference has."""
    norms, pieces = {}, {}
    for name, parameter in model.named_parameters():
        if name.endswith("linear_in.weight"):
            mixer = model.get_submodule(name.removesuffix(".linear_in.weight"))
            for section, grad in zip(
                mixer.local_sections,
                parameter.grad.split(list(mixer.local_sections.values())),
                strict=True,
            ):
                pieces[f"{name}.{section}"] = grad
        else:
            pieces[name] = parameter.grad
    for entry in entries(model.model_config):
        for hf_name, part in zip(entry.hf, pieces[entry.ours].chunk(len(entry.hf)), strict=True):
            norms[hf_name] = part.norm().double()
    return norms


def check_stage(loss, model, golden, stage, limit):
    assert error(loss, golden[f"{stage}_loss"]) < limit
    loss.backward()
    norms = gradient_norms(model)
    want = {
        key.removeprefix(f"{stage}_grad_l2/"): value
        for key, value in golden.items()
        if key.startswith(f"{stage}_grad_l2/")
    }
    assert norms.keys() == want.keys()
    for name, value in want.items():
        assert error(norms[name], value) < limit, name
    assert error(torch.stack(list(norms.values())).norm(), golden[f"{stage}_grad_norm"]) < limit


def test_teacher_and_student_logits_and_hidden_states(case, dtype):
    _, folder, golden = case
    ids = golden["input_ids"]
    for kind, key in (("qwen3", "teacher_logits"), ("hypenet", "student_logits")):
        assert error(load(folder / kind, dtype)(ids), golden[key]) < LIMITS[dtype], key
    states = load(folder / "hypenet", dtype).hidden_states(ids)
    assert len(states) == len(golden["student_hidden"])
    for index, (got, want) in enumerate(zip(states, golden["student_hidden"], strict=True)):
        assert error(got, want) < LIMITS[dtype], f"input of layer {index}"


def test_alignment_losses_and_gradients(case, dtype):
    _, folder, golden = case
    teacher = load(folder / "qwen3", dtype, trunk_only=True)
    student = read_model_config(folder / "hypenet")
    (spec,) = (student.spec(name) for name in student.used_mixers if student.spec(name).recurrent)
    mixers = AlignedMixers.from_teacher(teacher, spec, seed=0)
    with torch.no_grad():
        for layer, mixer in mixers.items():
            for parameter in spec.parameters(student):
                if not parameter.source:
                    drawn = golden[not_transferred(golden, layer, parameter.hf_names[0])]
                    mixer.local_tensor(parameter.name).copy_(drawn.reshape(parameter.shape))
    # The reference reads all T input tokens; ours takes T + 1 and drops the last.
    tokens = torch.cat([golden["input_ids"], golden["input_ids"][:, :1]], dim=1)
    loss, metrics = AlignStage(teacher, mixers)(MicroBatch(tokens))
    assert error(loss, golden["stage1_loss"]) < LIMITS[dtype]
    for layer, want in enumerate(golden["stage1_loss_per_layer"]):
        assert error(metrics[f"align-layers/{layer:02d}"], want) < LIMITS[dtype], layer
    loss.backward()
    for layer, mixer in mixers.items():
        sections = mixer.linear_in.weight.grad.split(list(mixer.local_sections.values()))
        grads = {
            f"linear_in.weight.{name}": grad
            for name, grad in zip(mixer.local_sections, sections, strict=True)
        }
        grads |= {name: parameter.grad for name, parameter in mixer.named_parameters()}
        names = {one.hf_names[0]: one.name for one in spec.parameters(student)}
        prefix = f"stage1_grad_l2/{layer}."
        want = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
        assert names.keys() == want.keys()
        for name, norm in want.items():
            found = grads[names[name]].norm()
            assert error(found, norm) < LIMITS[dtype], f"layer {layer} {name}"


def not_transferred(golden, layer, name):
    """Return the key of a tensor that weight transfer does not define; the first cases have keys of
    their own for the two of Lightning Attention."""
    older = {"z_proj.weight": f"stage1_z_proj/{layer}", "o_norm.weight": f"stage1_o_norm/{layer}"}
    key = f"stage1_init/{layer}.{name}"
    return key if key in golden else older[name]


def test_distillation_loss_and_gradients(case, dtype):
    _, folder, golden = case
    student, teacher = load(folder / "hypenet", dtype), load(folder / "qwen3", dtype)
    tokens = torch.cat([golden["input_ids"], golden["input_ids"][:, :1]], dim=1)
    loss, _ = DistillStage(student, teacher, chunk_tokens=37)(MicroBatch(tokens))
    check_stage(loss, student, golden, "stage2", LIMITS[dtype])


def test_finetuning_loss_and_gradients(case, dtype):
    _, folder, golden = case
    student = load(folder / "hypenet", dtype)
    loss, _ = FinetuneStage(student, chunk_tokens=50)(MicroBatch(golden["input_ids"]))
    check_stage(loss, student, golden, "stage3", LIMITS[dtype])


@pytest.mark.parametrize("kind", ["qwen3", "hypenet"])
def test_export_gives_back_the_same_bytes(case, kind, tmp_path):
    source, folder, _ = case
    export_hf(folder / kind, tmp_path / "hf")
    want = load_file(source / kind / "model.safetensors")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(
            got[name].view(torch.uint8), tensor.view(torch.uint8)
        ), name
    config, origin = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", source / kind)
    )
    assert {
        key: config[key] for key in ("mixer_types", "attn_logits_scaling") if key in origin
    } == {key: origin[key] for key in ("mixer_types", "attn_logits_scaling") if key in origin}
