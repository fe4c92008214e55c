import pytest
import torch

from megatron_hypenet.errors import VerificationError
from megatron_hypenet.export import verify
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf


@pytest.fixture
def pair(hf_model, tmp_path):
    """pair(change, **model changes) -> (HF folder, checkpoint of the same model); `change` is
    applied to the HF tensors afterwards."""

    def build(change=None, config=None, **changes):
        model = hf_model(**changes)
        import_hf(model.write(tmp_path / "original"), tmp_path / "ckpt")
        if change is not None:
            change(model.tensors)
        model.config |= config or {}
        return model.write(tmp_path / "hf"), tmp_path / "ckpt"

    return build


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_same_model(pair, student, tied):
    report = verify.verify(
        *pair(student=student, share_embeddings_and_output_weights=tied),
        dtype="float64",
        num_tokens=20,
    )
    assert (
        report.ok and report.tensors.equal == report.tensors.compared and report.tensors.cast == 0
    )
    assert (
        report.logits.max_rel_diff < 1e-6
        and report.logits.top1_agreement == 1
        and report.logits.cosine > 1 - 1e-12
    )
    assert report.logits.tokens == 40 and report.notes == []
    report.require_ok()


@pytest.mark.parametrize("mixer", ["lightning_attn", "gated_delta_net", "kimi_delta_attention"])
def test_a_student_with_biases_and_without_norms(pair, mixer):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    of_teacher = {"qk_layernorm": False, "add_qkv_bias": True, "rope_scaling": scaling}
    changes = {"mixer_types": (mixer, "attn", mixer), **of_teacher}
    report = verify.verify(*pair(student=True, **changes), dtype="float64", num_tokens=20)
    report.require_ok()
    assert report.logits.max_rel_diff < 1e-6


def test_one_changed_weight_is_found_and_located(pair):
    def change(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][0] += 1.0

    report = verify.verify(*pair(change, student=True), num_tokens=20)
    assert report.tensors.different == ["model.layers.1.self_attn.v_proj.weight"]
    assert report.logits.first_diverging == "layer 1" and not report.ok
    with pytest.raises(
        VerificationError,
        match="1 of 40 tensors differ, first model.layers.1.self_attn.v_proj.weight",
    ) as caught:
        report.require_ok()
    assert "hidden states part at layer 1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.0.self_attn.z_proj.weight", "layer 0"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 or the final norm"),
        ("model.norm.weight", "layer 2 or the final norm"),
    ],
)
def test_place_of_the_first_difference(pair, name, place):
    report = verify.verify(
        *pair(lambda tensors: tensors[name].mul_(1.5), student=True), num_tokens=20
    )
    assert report.logits.first_diverging == place


def test_one_flipped_bit_is_found_without_running_models(pair):
    def flip(tensors):
        bits = tensors["model.norm.weight"].view(torch.int32)
        bits[5] ^= 1

    report = verify.verify(*pair(flip), logits=False)
    assert report.logits is None and report.tensors.different == ["model.norm.weight"]


def test_other_logits_scaling_is_a_note_and_the_folder_decides(pair):
    report = verify.verify(
        *pair(config={"attn_logits_scaling": "hype 500"}, student=True), num_tokens=20
    )
    assert report.ok and report.notes == ["attn_logits_scaling: folder 'hype 500', checkpoint None"]


def test_other_architecture_is_a_difference(pair):
    report = verify.verify(*pair(config={"rope_theta": 5000.0}))
    assert report.config_differences == ["rotary_base: folder 5000.0, checkpoint 1000000.0"]
    assert report.logits is None and not report.ok


def test_a_narrower_copy_is_the_same_model_up_to_its_rounding(hf_model, tmp_path):
    folder = hf_model(student=True).write(tmp_path / "hf")
    import_hf(folder, tmp_path / "ckpt", dtype="bfloat16")
    export_hf(tmp_path / "ckpt", tmp_path / "wide", dtype="float32")
    for other, checked in ((folder, "bfloat16"), (tmp_path / "wide", "bfloat16")):
        report = verify.verify(other, tmp_path / "ckpt", num_tokens=20)
        assert (
            report.ok
            and report.tensors.cast == report.tensors.compared
            and report.tensors.cast_to == checked
        )
        assert report.logits.max_rel_diff < 1e-5


def test_same_bits():
    assert verify.same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not verify.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not verify.same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))


def test_nan_never_agrees():
    good = [torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.rand(1, 2, 5)]
    bad = [*good[:2], good[2] * torch.nan]
    report = verify.compare_logits(good, bad, "float32")
    assert not report.ok
    report = verify.compare_logits(good, [good[0], good[1] * torch.nan, good[2]], "float32")
    assert report.first_diverging == "layer 0 or the final norm"


def test_different_depth():
    with pytest.raises(VerificationError, match="gave 2 hidden states, the checkpoint's 1"):
        verify.compare_logits([torch.ones(1)] * 3, [torch.ones(1)] * 2, "float32")


def test_report_is_plain_data(pair):
    record = verify.verify(*pair(), logits=False).as_dict()
    assert record["ok"] is True and record["tensors"]["compared"] == 35
