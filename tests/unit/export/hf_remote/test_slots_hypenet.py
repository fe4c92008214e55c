import pytest
import torch

from megatron_hypenet.export.hf_remote.slots_hypenet import (
    CacheSlot,
    KeyValueSlot,
    StateSlot,
    in_memory_of,
    room_for,
    writable,
)


def test_a_slot_names_its_tensors():
    class Window(CacheSlot):
        kept = ("state", "window")

    slot = Window("toy")
    assert slot.state is None and slot.window is None
    slot.window = torch.arange(3.0)[:, None]
    slot.reorder(torch.tensor([2, 2, 0]))
    assert slot.state is None and slot.window.flatten().tolist() == [2, 2, 0]
    with pytest.raises(ValueError, match="its toy layers keep one state"):
        slot.crop(0)
    slot.reset()
    assert slot.window is None


def test_states_keep_their_place_without_gradients():
    slot = StateSlot("toy")
    first = torch.zeros(2, 3, 4, 4)
    slot.update(first, new_tokens=5)
    with torch.no_grad():
        slot.update(first + 1, new_tokens=1)
    assert slot.state is first and first.min() == 1 and slot.get_seq_length() == 6
    tracked = torch.ones(2, 3, 4, 4, requires_grad=True)
    slot.update(tracked, new_tokens=1)
    assert slot.state is tracked and first.max() == 1


@torch.no_grad()
def test_other_shapes_and_dtypes_get_their_own_memory():
    old = torch.zeros(2, 3)
    for new in (torch.ones(1, 3), torch.ones(2, 3, dtype=torch.float64)):
        assert in_memory_of(old, new) is new
    assert in_memory_of(None, old) is old and in_memory_of(old, torch.ones(2, 3)) is old


def test_memory_of_inference_mode_is_copied_outside_of_it():
    with torch.inference_mode():
        x = torch.ones(2)
        assert writable(x) is x
    copy = writable(x)
    assert copy is not x and torch.equal(copy, x) and not copy.is_inference()


@pytest.mark.parametrize(
    ("columns", "before", "expected", "room"),
    [
        (1, 0, 0, 256),
        (257, 256, 0, 512),
        (1000, 999, 0, 1536),
        (100, 0, 120, 256),
        (100, 0, 50, 256),
        (1000, 0, 2000, 2048),
        (1000, 0, 10**9, 2560),
    ],
)
def test_room_is_made_for_what_is_expected_within_limits(columns, before, expected, room):
    assert room_for(columns, before, expected) == room


@torch.no_grad()
def test_reserved_columns_are_finite_and_keep_the_old_ones():
    slot = KeyValueSlot()
    key = torch.randn(1, 2, 256, 4)
    slot.update(key, -key)
    slot.reserve(256)
    assert slot.keys.shape[2] == 256
    slot.reserve(257)
    assert slot.keys.shape[2] == 512
    assert torch.equal(slot.keys[:, :, :256], key) and torch.equal(slot.values[:, :, :256], -key)
    assert slot.keys[:, :, 256:].abs().max() == 0
