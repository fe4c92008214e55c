"""What is computed in FP8, and by whose layers; refusals stand in test_schema.py."""

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.computation import Fp8Config, ModelConfigOfRun


@pytest.mark.parametrize(
    ("settings", "used"),
    [({}, False), ({"teacher": True}, True), ({"student": "delayed"}, True)],
)
def test_fp8_is_used_where_one_of_both_models_is_in_it(settings, used):
    assert Fp8Config(**settings).used == used


@pytest.mark.parametrize("settings", [{"student": "mxfp8"}, {"teacher": "fp8"}, {"head": True}])
def test_what_is_not_a_recipe_or_a_switch_is_refused(settings):
    with pytest.raises(ValidationError):
        Fp8Config(**settings)


def test_layers_are_local_unless_another_implementation_is_named():
    assert ModelConfigOfRun().transformer_impl == "local"
    with pytest.raises(ValidationError):
        ModelConfigOfRun(transformer_impl="inference_optimized")
