from megatron_hypenet.config.mixers.lightning_attn import LightningAttnSpec
from megatron_hypenet.ops import kernels, lightning_mix  # noqa: F401 - registers its families
from tests.tiny import tiny_model_config

CONFIG = tiny_model_config(("lightning_attn",))
SPEC = LightningAttnSpec()


def test_every_section_has_all_heads_and_keys_and_values_come_from_attention():
    assert SPEC.sections(CONFIG) == dict.fromkeys(("q", "k", "v", "gate"), 48)
    sources = {parameter.name: parameter.source for parameter in SPEC.parameters(CONFIG)}
    assert {name for name, source in sources.items() if not source} == {
        "linear_in.weight.gate",
        "o_norm.weight",
    }
    assert all(source in (name, "") for name, source in sources.items())


def test_selective_recomputation_keeps_the_sections_alone():
    assert SPEC.saved_activations(CONFIG, 1, "selective") == 4 * 48
    assert SPEC.saved_activations(CONFIG, 1, "none") == 8 * 48
    # the output norm is three operations
    assert SPEC.saved_activations(CONFIG, 2, "none") == 10 * 48 / 2


def test_its_kernel_families_exist():
    assert set(SPEC.kernel_families) <= set(kernels.FAMILIES)
