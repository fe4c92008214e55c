import math

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.rope import Llama3Scaling, YarnScaling

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_the_scale_of_attention_is_that_of_both_factors():
    assert Llama3Scaling(**LLAMA3).attention_scale == 1.0
    assert YarnScaling(**YARN).attention_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert YarnScaling(**YARN, attention_factor=1.5).attention_scale == 2.25


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Llama3Scaling, {**LLAMA3, "high_freq_factor": 1.0}, "must be larger than low_freq_factor"),
        (Llama3Scaling, {**LLAMA3, "factor": 0.5}, "factor"),
        (Llama3Scaling, {**LLAMA3, "factor": True}, "factor"),
        (Llama3Scaling, {**LLAMA3, "low_freq_factor": 0.0}, "low_freq_factor"),
        (Llama3Scaling, {"factor": 8.0}, "original_max_position_embeddings"),
        (YarnScaling, {**YARN, "beta_fast": 1.0}, "must be larger than beta_slow"),
        (YarnScaling, {**YARN, "mscale": 1.0}, "mscale"),
        (YarnScaling, {**YARN, "original_max_position_embeddings": 1.5}, "original_max"),
    ],
)
def test_settings_without_a_meaning_are_refused(kind, given, message):
    with pytest.raises(ValidationError, match=message):
        kind(**given)
