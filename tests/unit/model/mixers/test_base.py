import pytest

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.model.mixers import mixer_class, register_mixer, registered_mixers
from megatron_hypenet.model.mixers.lightning_attn import LightningAttn
from megatron_hypenet.model.mixers.softmax_attn import SoftmaxAttn


def test_the_registry_finds_by_name_and_lists_what_it_knows():
    assert mixer_class("attn") is SoftmaxAttn and mixer_class("lightning_attn") is LightningAttn
    assert {"attn", "lightning_attn"} <= set(registered_mixers())
    with pytest.raises(
        ConfigError, match="unknown mixer 'lightning-attn'; known mixers: attn, .*lightning_attn"
    ):
        mixer_class("lightning-attn")


def test_a_name_can_be_taken_once():
    with pytest.raises(AssertionError, match="registered twice"):
        register_mixer("attn")(SoftmaxAttn)
