"""The base class of sections, and the types of their values."""

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.fields import BelowOne, Count, Rate, Section, check_batches
from megatron_hypenet.config.model import Switch


class Example(Section):
    """A section with one value of several types."""

    count: Count = 0
    rate: Rate = 1.0
    share: BelowOne = 0.0
    switch: Switch = False


def test_a_section_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Example().count = 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": -1},
        {"count": 1.0},
        {"rate": 0},
        {"rate": float("inf")},
        {"share": 1.0},
        {"switch": 1},
        {"other": 1},
    ],
)
def test_a_value_outside_its_type_and_an_unknown_key_are_refused(wrong):
    with pytest.raises(ValidationError):
        Example.model_validate(wrong)


def test_micro_batches_make_up_a_step():
    check_batches(2, 8)
    with pytest.raises(ValueError, match="micro_batch_size=3 does not divide global_batch_size=8"):
        check_batches(3, 8)
