import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config, tiny_teacher_config


def mixer_of(config):
    return build_model(config, ParallelConfig(), dtype=torch.float64, seed=1).mixer(0)


def test_a_student_layer_does_not_know_positions_but_a_teacher_layer_does():
    """NoPE: without RoPE, permuting the earlier tokens cannot change the last output."""
    order = torch.tensor([2, 0, 3, 1, 4])
    x = torch.randn(5, 1, 24, dtype=torch.float64)
    angles = torch.linspace(0, 2, 5 * 4, dtype=torch.float64).view(5, 1, 1, 4).repeat(1, 1, 1, 2)
    student = mixer_of(tiny_model_config(("attn",)))
    teacher = mixer_of(tiny_teacher_config(1))
    for mixer, same in ((student, True), (teacher, False)):
        a = mixer(x, rotary_pos_emb=angles)[0][-1]
        b = mixer(x[order], rotary_pos_emb=angles)[0][-1]
        assert torch.allclose(a, b) is same


def test_a_closed_gate_silences_the_layer():
    mixer = mixer_of(tiny_model_config(("attn",)))
    x = torch.ones(4, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        mixer.section_weight("gate").fill_(-100.0)
        assert mixer(x)[0].abs().max() < 1e-12


def test_sections_follow_the_groups_and_the_gate():
    assert mixer_of(tiny_model_config(("attn",))).local_sections == {
        "q": 48,
        "k": 24,
        "v": 24,
        "gate": 48,
    }
    assert mixer_of(tiny_teacher_config(1)).local_sections == {"q": 48, "k": 24, "v": 24}
