from pathlib import Path

import pytest

from megatron_hypenet.export.hf_remote import mixers_hypenet
from megatron_hypenet.export.hf_remote.cache_hypenet import CacheSlot
from megatron_hypenet.export.hf_remote.mixers_hypenet import MIXERS

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


def test_every_spelling_is_known():
    assert MIXERS["lightning_attn"] is MIXERS["lightning-attn"]
    for name, mixer in MIXERS.items():
        assert name in mixer.hf_names


@pytest.mark.parametrize("name", NAMES)
def test_a_new_memory_is_empty(name):
    slots = MIXERS[name].new_cache(), MIXERS[name].new_cache()
    assert slots[0] is not slots[1]
    for slot in slots:
        assert isinstance(slot, CacheSlot) and slot.get_seq_length() == 0
        assert slot.kept and all(getattr(slot, kept) is None for kept in slot.kept)
