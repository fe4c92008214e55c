"""Floating-point operations of a model and of HALO's stages, per token, by each mixer's own
formula.

Counted are matrix products as the algorithm needs them: causal attention over half the square, no
recomputation, no norms and no elementwise work. A backward pass costs twice its forward. Tokens per
second times this, over the hardware's peak, is MFU."""

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


def align_flops(teacher: ModelConfig, mixers: ModelConfig, seq_length: int) -> float:
    """Stage 1 per token: the teacher's trunk up to the last mixer, and forward and backward of an
    RNN mixer in every layer.

    `mixers` is the student with an RNN mixer in every layer. Their inputs are detached: of the
    projections only the output projection passes a gradient on, the others get that of their
    weights."""
    trunk = sum(mixer_flops(teacher, seq_length)) + (teacher.num_layers - 1) * mlp_flops(teacher)
    learned = 0.0
    for name in mixers.mixer_types:
        work = mixers.spec(name).flops(mixers, seq_length)
        learned += (
            work.total + (work.projections + work.output) + work.output + BACKWARD * work.core
        )
    return trunk + learned


def distill_flops(teacher: ModelConfig, student: ModelConfig, seq_length: int) -> float:
    """Stage 2 per token: the teacher forward, the student forward and backward, both with their
    heads."""
    return forward_flops(teacher, seq_length) + finetune_flops(student, seq_length)


def finetune_flops(student: ModelConfig, seq_length: int) -> float:
    """Stage 3 per token: the student forward and backward."""
    return (1 + BACKWARD) * forward_flops(student, seq_length)
