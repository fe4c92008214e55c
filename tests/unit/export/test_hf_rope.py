import pytest

from megatron_hypenet.config.rope import Llama3Scaling, YarnScaling
from megatron_hypenet.export.hf_rope import read_rope, written_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(raw, **options):
    problems = []
    return read_rope(raw, problems, **options), problems


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        (LLAMA3, Llama3Scaling(**LLAMA3)),
        (YARN, YarnScaling(**YARN)),
        ({**YARN, "attention_factor": 1.2, "beta_fast": 16.0}, None),
    ],
)
def test_both_spellings_are_the_same(settings, want):
    want = want or (YarnScaling(**settings) if settings and "beta_fast" in settings else None)
    assert read({"rope_theta": 5e5, "rope_scaling": settings}) == ((5e5, want), [])
    inside = {**(settings or {"rope_type": "default"}), "rope_theta": 5e5}
    assert read({"rope_parameters": inside}) == ((5e5, want), [])


def test_what_is_written_is_read_again():
    for scaling in (None, Llama3Scaling(**LLAMA3), YarnScaling(**YARN, attention_factor=1.2)):
        raw = written_rope(5e5, scaling)
        assert read(raw) == ((5e5, scaling), [])
        assert type(raw["rope_theta"]) is int


def test_older_names_and_keys_without_effect():
    old = {**{key: value for key, value in LLAMA3.items() if key != "rope_type"}, "type": "llama3"}
    extra = {"mscale": None, "truncate": True, "partial_rotary_factor": 1.0, "type": "yarn"}
    assert read({"rope_theta": 1e4, "rope_scaling": old})[0][1] == Llama3Scaling(**LLAMA3)
    assert read({"rope_theta": 1e4, "rope_scaling": {**YARN, **extra}})[0][1] == YarnScaling(**YARN)


def test_a_default_theta_stands_in_for_a_missing_one_alone():
    assert read({}, default_theta=1e4) == ((1e4, None), [])
    assert read({"rope_theta": 7.0}, default_theta=1e4) == ((7.0, None), [])
    assert read({})[1] == [
        "rope_theta is missing; give it once, as rope_theta or in rope_parameters"
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear.*supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "llama3 or yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling = .*longrope"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling = .*'factor': 2.0.*supported is plain"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_scaling = .*linear"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]: supported is plain RoPE"),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embedd"),
        ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": YARN}, "differ; give one of them"),
        ({"rope_parameters": {"rope_theta": 5.0}}, r"rope_theta states different values"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings = 4096: supported is 32768",
        ),
    ],
)
def test_everything_else_is_named(raw, message):
    import re

    _, problems = read({"rope_theta": 1e6, **raw})
    assert any(re.search(message, problem) for problem in problems), problems
