from pathlib import Path

import pytest

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.export.hf_config import mixer_spellings, model_config_from_hf
from megatron_hypenet.export.hf_remote import mixers_hypenet
from megatron_hypenet.export.hf_remote.mixers_hypenet import MIXERS
from megatron_hypenet.export.hf_remote.slots_hypenet import CacheSlot

from .conftest import VARIANTS

NAMES = sorted({mixer.hf_names[0] for mixer in MIXERS.values()})


def test_every_mixer_stands_in_the_file_of_its_name():
    """The export derives the file from the entry of `mixer_types`."""
    folder = Path(mixers_hypenet.__file__).parent
    files = {file.stem for file in folder.glob("mixer_*.py")}
    assert files == {f"mixer_{name.replace('-', '_')}" for name in NAMES}
    for name in NAMES:
        assert MIXERS[name].__module__.endswith(f".mixer_{name.replace('-', '_')}")


def test_tests_of_whole_models_know_every_mixer():
    assert sorted(VARIANTS) + ["attn"] == sorted(NAMES, key=lambda name: (name == "attn", name))


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_is_known(name):
    """The spellings are those that the import knows, in the same order."""
    keys = mixer_specs()[mixer_spellings()[name]].hf_keys
    assert MIXERS[name].hf_names == (keys.name, *keys.spellings)
    assert all(MIXERS[spelling] is MIXERS[name] for spelling in MIXERS[name].hf_names)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_specification(make_config, name):
    """Names and shapes are compared, with the settings that whole models are tested with."""
    config = make_config(mixer_types=[name] * 3, **VARIANTS.get(name, {}))
    mixer = MIXERS[config.mixer_types[0]](config)
    raw = {**config.to_dict(), "architectures": ["HypeNetForCausalLM"]}
    model = model_config_from_hf(raw, where="config")
    spec = model.spec(model.mixer_types[0])
    want = {}
    in_fp32 = set()
    for parameter in spec.parameters(model):
        moved = parameter.hf_transform
        for hf_name in parameter.hf_names:
            want[hf_name] = moved.shape if moved else parameter.shape
            in_fp32 |= {hf_name} if parameter.dtype == "float32" else set()
    assert in_fp32 == set(mixer.kept_in_fp32)
    assert {key: tuple(value.shape) for key, value in mixer.state_dict().items()} == want


@pytest.mark.parametrize("name", NAMES)
def test_a_new_memory_is_empty(name):
    slots = MIXERS[name].new_cache(), MIXERS[name].new_cache()
    assert slots[0] is not slots[1]
    for slot in slots:
        assert isinstance(slot, CacheSlot) and slot.get_seq_length() == 0
        assert slot.kept and all(getattr(slot, kept) is None for kept in slot.kept)
