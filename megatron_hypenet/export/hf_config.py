"""Hugging Face's config.json <-> ModelConfig, for teachers (Qwen3, Llama, Qwen2) and for HypeNet in
both published spellings.

A key that asks for an unsupported computation is refused, all such keys in one ConfigError; a key
that changes nothing (token ids, generation defaults, options of mixers that the model does not use)
is carried in the checkpoint's manifest. Both spellings of transformers 4 (`torch_dtype`) and 5
(`dtype`) are read; the former is written, since both versions understand it. What the families of
teachers differ in is in `hf_families.py`, RoPE in `hf_rope.py`.

One file, because each key is read and written by the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hypenet.config.mixers import MixerSpec, default_mixer, mixer_specs, with_settings
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import MAX_LAYERS, ModelConfig
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.rope import YarnScaling
from megatron_hypenet.errors import ConfigError, ConversionError
from megatron_hypenet.export.hf_families import TEACHERS, teacher_family
from megatron_hypenet.export.hf_folder import JSON
from megatron_hypenet.export.hf_rope import read_rope, written_rope
from megatron_hypenet.untrusted.files import findings, has_entry, inside, shown
from megatron_hypenet.untrusted.json_text import read_object

HfConfig = dict[str, Any]

HYPENET = "hypenet"
_ARCHITECTURES = {
    **{family.architecture: name for name, family in TEACHERS.items()},
    "HypeNetForCausalLM": HYPENET,
    "HybridForCausalLM": HYPENET,
}
_MODEL_TYPES = {**{name: name for name in TEACHERS}, "hypenet": HYPENET, "hybrid": HYPENET}

_REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_SWITCHES: HfConfig = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "quantization_config": None,
}
"""Switches of every model and the one value each may have. A key that is absent has that value."""
_QK_NORM_SWITCH = "attn_use_qk_norm"
_QK_NORM_SWITCHES = ("qk_norm", "use_qk_norm", _QK_NORM_SWITCH)
_QKV_BIAS_SWITCH = "qkv_bias"
"""The keys of a HypeNet's config.json that say whether its softmax layers normalise q and k (true
where it is left out), and whether q, k and v have biases (false)."""
_LAYER_TYPES = {False: "full_attention", True: "linear_attention"}
"""Entry of `layer_types` for a layer whose mixer is recurrent or not: the words of transformers and
of inference engines, which size the caches of the layers by them."""
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
_TEACHERS_ONLY = ("max_window_layers", "use_sliding_window", "sliding_window", "layer_types")
_WRITTEN_ELSEWHERE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "dtype",
    "torch_dtype",
    "rope_parameters",
    "rope_scaling",
    "transformers_version",
)


def read_hf_config(hf_dir: Path) -> HfConfig:
    """Return the folder's config.json as a dict; ConversionError when it is missing or not a JSON
    object."""
    if not has_entry(hf_dir / "config.json"):
        raise ConversionError(
            f"{hf_dir}: no config.json; give a Hugging Face model folder (config.json, "
            f"*.safetensors, tokenizer files){download_hint(hf_dir)}"
        )
    return read_object(JSON, inside(hf_dir, "config.json", JSON))


def family(raw: Mapping[str, Any]) -> str | None:
    """Return `hypenet`, the model type of a teacher's family, or None for an unknown model. The
    architecture decides, then the model type.

    Published HypeNets use several model types; their architecture, switches and tensor names
    identify them."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if (
        isinstance(architectures, list)
        and len(architectures) == 1
        and str(architectures[0]) in _ARCHITECTURES
    ):
        found = _ARCHITECTURES[str(architectures[0])]
        other = found if found == HYPENET else None
        return found if _MODEL_TYPES.get(str(model_type or found), other) == found else None
    return None if architectures else _MODEL_TYPES.get(str(model_type))


def model_config_from_hf(raw: HfConfig, *, where: str) -> ModelConfig:
    """Return the model that this config.json describes; `where` begins the message. ConfigError
    lists everything unsupported at once."""
    kind = family(raw)
    if kind is None:
        raise ConfigError(
            f"{where}: model_type {_told(raw.get('model_type'))} with architectures "
            f"{_told(raw.get('architectures'))} is not supported;"
            f" supported model types are {sorted(_MODEL_TYPES)} with architectures "
            f"{sorted(_ARCHITECTURES)}: dense Qwen3, Llama and Qwen2, and HypeNet"
        )
    teacher = TEACHERS.get(kind)
    if teacher is not None:
        raw = teacher.completed(raw)
    mixers = () if teacher is not None else described_mixers(_known_mixers(raw))
    switches = {key: value for mixer in mixers for key, value in mixer.hf_keys.switches.items()}
    problems = _switch_problems(raw, {**_SWITCHES, **switches})
    fields: HfConfig = {
        "attn_use_rope": teacher is not None,
        "attn_use_output_gate": teacher is None,
        "qk_layernorm": raw.get(_QK_NORM_SWITCH) is not False,
        "add_qkv_bias": raw.get(_QKV_BIAS_SWITCH) is True,
    }
    if teacher is not None:
        fields |= {"qk_layernorm": teacher.qk_layernorm, "add_qkv_bias": teacher.add_qkv_bias}
    problems += _attention_problems(raw, fields)
    fields["share_embeddings_and_output_weights"] = raw.get("tie_word_embeddings", False)
    for key, name in _REQUIRED.items():
        if raw.get(key) is None:
            problems.append(f"{key} is missing; it is required")
        else:
            fields[name] = raw[key]
    fields |= {name: raw[key] for key, name in _OPTIONAL.items() if raw.get(key) is not None}
    fields |= {key: _first_token(raw[key]) for key in _TOKENS if raw.get(key) is not None}
    theta = None if teacher is None else teacher.default_theta
    fields["rotary_base"], fields["rope_scaling"] = read_rope(raw, problems, default_theta=theta)
    if teacher is not None:
        fields["mixer_types"] = (ATTENTION,) * min(
            _as_count(raw.get("num_hidden_layers")), MAX_LAYERS
        )
    else:
        fields["mixer_types"] = _mixer_types(raw, problems)
        fields["attn_logits_scaling"] = raw.get("attn_logits_scaling")
        fields["mixers"] = _settings(raw, mixers)
        if isinstance(fields["rope_scaling"], YarnScaling):
            problems.append("rope_scaling of a HypeNet has rope_type yarn: supported is llama3")
    problems += _layer_types_problems(raw, fields["mixer_types"])
    problems += _token_problems(raw)
    if teacher is None:
        problems += _hypenet_problems(raw, _specs(mixers, fields["mixers"], problems))
    if not problems:
        try:
            return ModelConfig.model_validate(fields)
        except ValidationError as error:
            problems = [_in_their_words(line) for line in findings(error, whole="model")]
    raise ConfigError(
        f"{where}: {len(problems)} setting(s) not supported:\n  " + "\n  ".join(problems)
    )


def _in_their_words(finding: str) -> str:
    """Return a finding about one of our fields with the name that the key has in config.json."""
    place, colon, says = finding.partition(":")
    theirs = {name: key for key, name in {**_REQUIRED, **_OPTIONAL}.items()}
    theirs["share_embeddings_and_output_weights"] = "tie_word_embeddings"
    theirs["rotary_base"] = "rope_theta"
    return theirs.get(place, place) + colon + says


def hf_config_from_model(
    config: ModelConfig, *, torch_dtype: str, origin: HfConfig | None = None
) -> HfConfig:
    """Return config.json of a model: that of its family for a teacher, HypeNet (with our remote
    code) otherwise. `origin` is the config.json it came from, whose harmless extra keys are kept.
    """
    out: HfConfig = {key: getattr(config, name) for key, name in {**_REQUIRED, **_OPTIONAL}.items()}
    out |= {key: _SWITCHES[key] for key in ("attention_dropout", "hidden_act")}
    out |= written_rope(config.rotary_base, config.rope_scaling)
    out |= {"torch_dtype": torch_dtype, "use_cache": True}
    out["tie_word_embeddings"] = config.share_embeddings_and_output_weights
    out |= {
        key: _token_like_origin(getattr(config, key), (origin or {}).get(key)) for key in _TOKENS
    }
    if config.is_teacher:
        teacher = teacher_family(config)
        out |= {"architectures": [teacher.architecture], "model_type": teacher.model_type}
        out |= teacher.switches
        if "sliding_window" in teacher.switches:
            out["max_window_layers"] = config.num_layers
    else:
        out |= _hypenet_keys(config)
    carried = {
        key: value
        for key, value in (origin or {}).items()
        if _carry(key, teacher=config.is_teacher)
    }
    return dict(sorted({**carried, **out}.items()))


def _hypenet_keys(config: ModelConfig) -> HfConfig:
    if config.attn_use_rope or not config.attn_use_output_gate:
        raise ConfigError(
            f"a model with attn_use_rope={config.attn_use_rope}, "
            f"attn_use_output_gate={config.attn_use_output_gate} and mixers"
            f" {sorted(set(config.mixer_types))} is neither a teacher (all attn, RoPE, "
            "no gate) nor HypeNet (no RoPE, gate):"
            " it has no Hugging Face form"
        )
    out: HfConfig = {"attention_bias": False}
    if not config.qk_layernorm:
        out[_QK_NORM_SWITCH] = False
    if config.add_qkv_bias:
        out[_QKV_BIAS_SWITCH] = True
    for mixer in described_mixers(config.used_mixers):
        keys = mixer.hf_keys
        spec = config.spec(mixer.name)
        own = {
            **{key: getattr(config, _REQUIRED[size]) for key, size in spec.hf_sizes().items()},
            **keys.switches,
            **{key: getattr(spec, setting) for key, setting in keys.settings.items()},
        }
        if clash := sorted(key for key in own if key in out and out[key] != own[key]):
            raise ConfigError(
                f"the mixers {', '.join(config.used_mixers)} need different values of "
                f"{', '.join(clash)} in one config.json: this model has no Hugging Face form"
            )
        out |= own
    files = {
        "AutoConfig": "configuration_hypenet.HypeNetConfig",
        "AutoModel": "modeling_hypenet.HypeNetModel",
    }
    return {
        "architectures": ["HypeNetForCausalLM"],
        "auto_map": {**files, "AutoModelForCausalLM": "modeling_hypenet.HypeNetForCausalLM"},
        "model_type": HYPENET,
        "mixer_types": [config.spec(mixer).hf_keys.name for mixer in config.mixer_types],
        "layer_types": layer_types(config.mixer_types),
        "attn_logits_scaling": config.attn_logits_scaling,
        **out,
    }


def layer_types(mixers: Iterable[str]) -> list[str]:
    """Return the `layer_types` of layers with these mixers (our names)."""
    known = mixer_specs()
    return [_LAYER_TYPES[known[mixer].recurrent] for mixer in mixers]


def described_mixers(names: Iterable[str]) -> tuple[type[MixerSpec], ...]:
    """Return the mixers whose keys a HypeNet's config.json has: softmax attention, and the RNN
    mixers that the model uses; the default one for a model without any."""
    known = mixer_specs()
    recurrent = [name for name in dict.fromkeys(names) if known[name].recurrent] or [
        default_mixer().name
    ]
    return tuple(known[name] for name in (ATTENTION, *recurrent))


def mixer_spellings() -> dict[str, str]:
    """Return our name of a mixer for each entry of `mixer_types` that means it."""
    return {
        entry: name
        for name, spec in mixer_specs().items()
        for entry in (spec.hf_keys.name, *spec.hf_keys.spellings)
    }


def _known_mixers(raw: HfConfig) -> list[str]:
    """Return our names of the entries of `mixer_types` that have one."""
    given = raw.get("mixer_types")
    spellings = mixer_spellings()
    return (
        [spellings[name] for name in given if isinstance(name, str) and name in spellings]
        if isinstance(given, list)
        else []
    )


def _settings(raw: HfConfig, mixers: Iterable[type[MixerSpec]]) -> dict[str, HfConfig]:
    """Return the settings of the mixers that have any."""
    found = {
        mixer.name: {
            name: given[key] for key, name in mixer.hf_keys.settings.items() if key in given
        }
        for mixer in mixers
        for given in ({**mixer.hf_keys.absent, **raw},)
    }
    return {name: settings for name, settings in found.items() if mixer_specs()[name].model_fields}


def _carry(key: str, *, teacher: bool) -> bool:
    """Return whether a key of the original config.json is written again: not the keys that this
    module writes, nor those of the other family."""
    if key in _WRITTEN_ELSEWHERE or (not teacher and key in _TEACHERS_ONLY):
        return False
    mixers_keys = {key for mixer in mixer_specs().values() for key in mixer.hf_keys.known}
    return not (teacher and key in {*mixers_keys, "mixer_types", "attn_logits_scaling"})


def _switch_problems(raw: HfConfig, supported: HfConfig) -> list[str]:
    wrong = [
        (key, value) for key, value in supported.items() if not _same(raw.get(key, value), value)
    ]
    problems = [f"{key} = {_told(raw[key])}: supported is {value!r}" for key, value in wrong]
    problems += [
        f"{key} = {_told(raw[key])}: supported are dense models only, without experts"
        for key in _EXPERT_KEYS
        if raw.get(key)
    ]
    return problems


def _attention_problems(raw: HfConfig, fields: HfConfig) -> list[str]:
    """Compare switches of norms and biases, which may be left out, with what the model has."""
    meant = {key: fields["qk_layernorm"] for key in _QK_NORM_SWITCHES}
    meant[_QKV_BIAS_SWITCH] = fields["add_qkv_bias"]
    return [
        f"{key} = {_told(raw[key])}: supported is {_told(value)}"
        for key, value in meant.items()
        if raw.get(key) is not None and not _same(raw[key], value)
    ]


def _layer_types_problems(raw: HfConfig, mixers: Sequence[str]) -> list[str]:
    """Compare `layer_types`, which may be left out, with what the layers' mixers (our names) say;
    it may also have come along from the teacher's config.json."""
    layers = raw.get("layer_types")
    if layers is None or not mixer_specs().keys() >= set(mixers):
        return []
    of_teacher = [_LAYER_TYPES[False]] * len(mixers)
    right = layer_types(mixers)
    if layers in (of_teacher, right):
        return []
    also = "" if right == of_teacher else f", or {_told(right)}, what mixer_types says"
    return [
        f"layer_types = {_told(layers)}: supported is 'full_attention' for every one of "
        f"num_hidden_layers{also}"
    ]


def _token_problems(raw: HfConfig) -> list[str]:
    """Return the special tokens that the embedding has no row for."""
    rows = raw.get("vocab_size")
    return [
        f"{key} = {_told(raw[key])}: the model has the tokens 0 to {rows - 1} (vocab_size)"
        for key in _TOKENS
        if type(rows) is int and rows > 0
        for given in (raw[key] if isinstance(raw.get(key), list) else [raw.get(key)])
        if type(given) is int and given >= rows
    ]


def _specs(
    mixers: Iterable[type[MixerSpec]], settings: Mapping[str, HfConfig], problems: list[str]
) -> list[MixerSpec]:
    """Return the mixers with their settings; where these are wrong, that is one more problem."""
    specs = []
    for mixer in mixers:
        try:
            specs.append(with_settings(mixer.name, settings.get(mixer.name, {}), strict=True))
        except ValueError as error:
            problems.append(str(error))
    return specs


def _hypenet_problems(raw: HfConfig, mixers: Sequence[MixerSpec]) -> list[str]:
    """Return the sizes of mixers that differ from the attention's, and switches of these mixers
    that are not known."""
    problems = []
    sizes = {key: reference for mixer in mixers for key, reference in mixer.hf_sizes().items()}
    for key, reference in sizes.items():
        if raw.get(key) is not None and raw[key] != raw.get(reference):
            problems.append(
                f"{key} = {_told(raw[key])}: supported is {_told(raw.get(reference))}, "
                f"the value of {reference}"
            )
    known = {*_QK_NORM_SWITCHES, *sizes, "attn_logits_scaling", "attn_implementation"}.union(
        *(mixer.hf_keys.known for mixer in mixers)
    )
    prefixes = tuple(mixer.hf_keys.prefix for mixer in mixers)
    for key, value in raw.items():
        # without the short convolution its options (kernel size and others) have no effect
        if (
            key.startswith(prefixes)
            and key not in known
            and "conv" not in key
            and value not in (None, False)
        ):
            problems.append(
                f"{key} = {_told(value)}: unknown switch of a mixer; supported is leaving it out"
            )
    return problems


def _mixer_types(raw: HfConfig, problems: list[str]) -> tuple[str, ...]:
    given = raw.get("mixer_types")
    spellings = mixer_spellings()
    if not isinstance(given, list):
        problems.append(
            f"mixer_types = {_told(given)}: supported is a list with one of {sorted(spellings)} "
            "per layer"
        )
        return ()
    unknown = sorted({str(name) for name in given} - set(spellings))
    if unknown:
        problems.append(f"mixer_types has {_told(unknown)}: supported are {sorted(spellings)}")
    if len(given) != raw.get("num_hidden_layers"):
        layers = raw.get("num_hidden_layers")
        problems.append(
            f"mixer_types has {len(given)} entries: supported is one per layer, "
            f"num_hidden_layers = {_told(layers)}"
        )
    return tuple(spellings.get(str(name), str(name)) for name in given)


def _told(value: object) -> str:
    """Return a value of config.json for a message."""
    return shown(repr(value), 120)


def _same(value: object, supported: object) -> bool:
    """Return whether values are equal, where True is not 1 and False is not 0, while 0 is 0.0."""
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def _as_count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _first_token(value: object) -> object:
    """Return the first end token: chat models list several, and documents end with the
    first. A list that holds anything but ids is left as it is, for ModelConfig to refuse."""
    ids = isinstance(value, list) and value and all(type(entry) is int for entry in value)
    return value[0] if isinstance(value, list) and ids else value


def _token_like_origin(token: int | None, origin: object) -> object:
    return origin if isinstance(origin, list) and origin and origin[0] == token else token
