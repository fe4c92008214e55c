import pytest

from megatron_hypenet.config.mixers import (
    MixerFlops,
    ParamSpec,
    default_mixer,
    mixer_spec,
    mixer_specs,
    register_mixer_spec,
    with_settings,
)
from megatron_hypenet.config.mixers.base import ONES
from megatron_hypenet.errors import ConfigError
from tests.tiny import tiny_model_config


def test_the_registry_finds_by_name_and_lists_what_it_knows():
    assert {"attn", "lightning_attn"} <= set(mixer_specs())
    assert default_mixer().name == "lightning_attn" and default_mixer().recurrent
    with pytest.raises(
        ConfigError, match="unknown mixer 'mamba'; known mixers: attn, .*lightning_attn"
    ):
        mixer_spec("mamba")
    with pytest.raises(AssertionError, match="registered twice"):
        register_mixer_spec("attn")(mixer_spec("attn"))


def test_wrong_settings_are_named():
    assert with_settings("lightning_attn", {}) == default_mixer()
    with pytest.raises(ValueError, match="lightning_attn.depth: unknown key"):
        with_settings("lightning_attn", {"depth": 3})


def test_local_shapes_divide_the_split_dimension():
    parameter = ParamSpec(name="a", shape=(6, 4), tp_dim=0, init=ONES, hf_names=("a",))
    assert parameter.numel == 24 and parameter.local_shape(3) == (2, 4)
    whole = ParamSpec(name="a", shape=(6, 4), tp_dim=None, init=ONES, hf_names=("a",))
    assert whole.local_shape(3) == (6, 4)


@pytest.mark.parametrize("name", ["attn", "lightning_attn"])
def test_what_follows_from_the_parameters(name):
    config = tiny_model_config((name,))
    spec = config.spec(name)
    sections = spec.sections(config)
    assert list(sections) == ["q", "k", "v", "gate"]
    flops = spec.flops(config, 64)
    assert flops == MixerFlops(
        2.0 * 24 * sum(sections.values()), spec.core_flops(config, 64), 2.0 * 24 * 48
    )
    assert flops.total == flops.projections + flops.core + flops.output
    replicated = sum(
        parameter.numel for parameter in spec.parameters(config) if parameter.tp_dim is None
    )
    assert (
        3 * (spec.num_parameters(config, 3) - replicated)
        == spec.num_parameters(config) - replicated
    )
    assert all(
        parameter.init == ONES for parameter in spec.parameters(config) if "norm" in parameter.name
    )
