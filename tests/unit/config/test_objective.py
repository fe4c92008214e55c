"""Parameters of an objective that belong to another kind are refused by name."""

import pytest
from pydantic import ValidationError

from megatron_hypenet.config.objective import ObjectiveConfig


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (
            {"beta": 0.5},
            "beta=0.5 has no effect with kind=forward_kl: it belongs to jensen_shannon",
        ),
        ({"kind": "top_k", "k": 4, "beta": 0.5}, "beta=0.5 has no effect with kind=top_k"),
        ({"kind": "reverse_kl", "k": 4}, "k=4 has no effect with kind=reverse_kl: .* top_k"),
        ({"kind": "top_k"}, "kind=top_k needs k"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "less than 1"),
        ({"kind": "kl"}, "'forward_kl', 'reverse_kl', 'jensen_shannon' or 'top_k'"),
        ({"kind": "top_k", "k": 0}, "greater than 0"),
    ],
)
def test_an_objective_has_its_own_parameters_alone(objective, says):
    with pytest.raises(ValidationError, match=says):
        ObjectiveConfig.model_validate(objective)
