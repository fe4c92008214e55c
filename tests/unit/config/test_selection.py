"""The settings of layer selection."""

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.selection import SELECTION_METHODS, SelectConfig


def test_the_paper_s_method_is_the_default():
    assert SelectConfig().method == "halo" and SELECTION_METHODS[0] == "halo"


@pytest.mark.parametrize("name", SELECTION_METHODS)
def test_every_method_can_be_chosen(name):
    assert SelectConfig.model_validate({"method": name}).method == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "best"}, "'halo', 'kl', 'gates' or 'uniform'"),
        ({"gates": {"micro_batch_size": 3, "global_batch_size": 8}}, "3 does not divide"),
        ({"gates": {"recall_fraction": 1.5}}, "less than or equal to 1"),
        ({"gates": {"train_iters": 0}}, "greater than 0"),
        ({"gates": {"rate": 1}}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        SelectConfig.model_validate(changes)
