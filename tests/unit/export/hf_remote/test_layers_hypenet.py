import pytest
import torch

from megatron_hypenet.export.hf_remote.layers_hypenet import HypeNetMixer, HypeNetRMSNorm, by_name

from .conftest import close, random


def test_norm_divides_by_the_root_mean_square():
    norm = HypeNetRMSNorm(6, 1e-3).double()
    norm.weight.data = random(6, seed=1)
    x = random(2, 3, 6)
    close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_projections_become_heads(make_config, qk_norm):
    mixer = HypeNetMixer(make_config(), gate="gate", qk_norm=qk_norm).double()
    names = {name for name, _ in mixer.named_parameters()}
    projections = {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate")}
    assert names - projections == ({"q_norm.weight", "k_norm.weight"} if qk_norm else set())
    x = random(2, 5, 32)
    q, k, v = mixer.project(x)
    assert q.shape == (2, 6, 5, 8) and k.shape == v.shape == (2, 2, 5, 8)
    close(v[:, 1], mixer.v_proj(x)[..., 8:])
    want = mixer.k_proj(x)[..., 8:]
    if qk_norm:
        want = want / (want.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(k[:, 1], want)
    o = random(2, 5, 48)
    close(mixer.merge(o, x), mixer.o_proj(o * torch.sigmoid(mixer.gate(x))))


def test_a_mixer_is_found_by_every_spelling():
    class One(HypeNetMixer):
        hf_names = ("one", "o-n-e")

    class Two(HypeNetMixer):
        hf_names = ("two",)

    assert by_name(One, Two) == {"one": One, "o-n-e": One, "two": Two}
