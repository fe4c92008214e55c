"""Floating-point operations of a model per token, by each mixer's own formula; each training stage
sums what it needs in its own file.

Only the matrix products that the algorithm needs are counted: causal attention over half the
square, no recomputation, no norms and no elementwise work. A backward pass costs twice its forward
pass. Tokens per second times this, divided by the hardware's peak, is MFU."""

from megatron_hypenet.config.model import ModelConfig

BACKWARD = 2.0
"""Work of a backward pass in forward passes."""


def mlp_flops(model: ModelConfig) -> float:
    """Forward pass of one SwiGLU MLP per token."""
    return 6.0 * model.hidden_size * model.ffn_hidden_size


def mixer_flops(model: ModelConfig, seq_length: int) -> list[float]:
    """Forward pass of every layer's mixer per token, projections included."""
    return [model.spec(name).flops(model, seq_length).total for name in model.mixer_types]


def head_flops(model: ModelConfig) -> float:
    """Forward pass of the output head per token."""
    return 2.0 * model.hidden_size * model.vocab_size


def forward_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward pass of a whole model per token; embeddings are looked up and cost nothing."""
    return (
        sum(mixer_flops(model, seq_length))
        + model.num_layers * mlp_flops(model)
        + head_flops(model)
    )


def training_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward pass of a whole model per token."""
    return (1 + BACKWARD) * forward_flops(model, seq_length)
