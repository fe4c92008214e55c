"""Tiny shapes that tests share, and the tensors of tiny models."""

import torch

from megatron_hypenet.checkpoint.shards import tensor_pieces
from megatron_hypenet.config.model import ModelConfig


def tiny_model_config(mixer_types=("lightning_attn", "attn"), **changes) -> ModelConfig:
    """Return a student of two layers by default; 6 heads in 3 groups: neither is a power of two."""
    base = {
        "num_layers": len(mixer_types),
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 8,  # heads * channels = 48, not hidden_size
        "vocab_size": 61,
        "share_embeddings_and_output_weights": False,
        "mixer_types": tuple(mixer_types),
        "attn_use_rope": False,
        "attn_use_output_gate": True,
        "rotary_base": 10000.0,
    }
    return ModelConfig.model_validate({**base, **changes})


def tiny_teacher_config(num_layers=2, **changes) -> ModelConfig:
    """Return the teacher of the same shape: all softmax, RoPE, no gate."""
    return tiny_model_config(
        ("attn",) * num_layers, attn_use_rope=True, attn_use_output_gate=False, **changes
    )


def whole_tensors(module):
    """Return the canonical tensors of a module on one process."""
    tensors = {}
    for entry in module.sharded_state_dict(prefix="").values():
        for piece in tensor_pieces(entry):
            whole = tensors.setdefault(
                piece.key, torch.empty(piece.global_shape, dtype=piece.dtype)
            )
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.global_offset, piece.local_shape, strict=True)
            )
            whole[place] = piece.data.detach()
    return tensors
