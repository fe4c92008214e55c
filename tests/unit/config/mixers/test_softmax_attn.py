from megatron_hypenet.config.mixers.softmax_attn import ATTENTION, SoftmaxAttnSpec
from tests.tiny import tiny_model_config, tiny_teacher_config


def test_a_teacher_has_no_gate_and_a_student_has_one_without_a_source():
    teacher = tiny_teacher_config(1)
    student = tiny_model_config((ATTENTION,))
    names = [
        [p.name for p in SoftmaxAttnSpec().parameters(config)] for config in (teacher, student)
    ]
    assert [name for name in names[1] if name not in names[0]] == ["linear_in.weight.gate"]
    (gate,) = (p for p in SoftmaxAttnSpec().parameters(student) if p.name.endswith("gate"))
    assert (
        gate.source == ""
        and gate.hf_names == ("o_gate.weight",)
        and gate.init.second == student.init_method_std
    )


def test_attention_keeps_the_same_under_recomputation_and_grows_with_the_context():
    config = tiny_model_config((ATTENTION,))
    spec = SoftmaxAttnSpec()
    sections = 48 + 24 + 24 + 48
    inside = 2 * 48 + 24 + 48
    assert all(
        spec.saved_activations(config, 1, recompute) == sections + inside
        for recompute in ("none", "selective")
    )
    assert spec.core_flops(config, 100) == 2.0 * 48 * 100
    assert dict(spec.layout_rules(config).tensor_slices) == {
        "num_attention_heads": 6,
        "num_query_groups": 3,
    }
    assert not spec.recurrent and spec.kernel_families == ()
