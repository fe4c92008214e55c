"""A mixer that only tests have: a delta rule with parameters of its own, a short convolution, a
setting, and a replicated weight.

Its parts are the three files of a mixer: specification, module, and (`decode`) what a Hugging Face
folder would run. Written from the formulas, one token at a time: S_t = (I - beta k k^T) S_(t-1) +
beta k v^T, o_t = q_t S_t, k after a causal depthwise convolution."""

import torch

from megatron_hypenet.config.mixers import (
    HfKeys,
    Init,
    LayoutRules,
    MixerSpec,
    ParamSpec,
    register_mixer_spec,
)
from megatron_hypenet.config.mixers.base import ONES, Reshape, attention_parameters
from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.parallel.context import ChunkExchange, exchange_states
from megatron_hypenet.parallel.context.state_algebra import Transition, continuing_chunks
from megatron_hypenet.parallel.context.state_exchange import (
    join_chunks,
    preceding_ids,
    preceding_tokens,
)

NAME = "toy_delta"


@register_mixer_spec(NAME)
class ToySpec(MixerSpec):
    conv_size: int = 3

    hf_keys = HfKeys(
        name="toy",
        prefix="toy_",
        switches={"toy_norm": True},
        settings={"toy_conv_size": "conv_size"},
    )

    def parameters(self, model):
        heads = model.num_attention_heads
        width = model.query_size
        return (
            *attention_parameters(model, kv_size=width),
            ParamSpec(
                name="beta",
                shape=(heads,),
                tp_dim=0,
                init=Init("uniform", 0.1, 2.0, "log"),
                hf_names=("beta",),
                hf_transform=Reshape((1, 1, heads, 1)),
            ),
            ParamSpec(
                name="k_conv",
                shape=(width, self.conv_size),
                tp_dim=0,
                init=Init("normal", 0.0, 0.5),
                hf_names=("k_conv1d.weight",),
                hf_transform=Reshape((width, 1, self.conv_size)),
            ),
            ParamSpec(
                name="scale",
                shape=(model.kv_channels,),
                tp_dim=None,
                init=ONES,
                hf_names=("scale.weight",),
            ),
        )

    def core_flops(self, model, seq_length):
        return 6.0 * model.query_size * model.kv_channels

    def saved_activations(self, model, tensor_ranks, recompute):
        return 3 * model.query_size / tensor_ranks

    def layout_rules(self, model):
        return LayoutRules(
            tensor_slices={"num_attention_heads": model.num_attention_heads},
            halo_tokens=self.conv_size - 1,
        )


@register_mixer(NAME)
class ToyMixer(Mixer):
    def mix(self, parts, rotary_pos_emb, document_ids):
        group = self.context_group
        k = short_convolution(
            parts["k"].transpose(0, 1), self.weight("k_conv"), group, document_ids
        ).transpose(0, 1)
        q = self.q_norm(self.heads(parts["q"]))
        k = self.k_norm(self.heads(k))
        q, k, v = (x.transpose(0, 1) for x in (q, k / k.shape[-1] ** 0.5, self.heads(parts["v"])))
        beta = self.weight("beta").sigmoid()
        if group.size() == 1:
            o, _ = delta_rule(
                q, k, v, beta, q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), document_ids
            )
        else:
            o = exchange_states(
                DeltaExchange(beta), q, k, v, group=group, document_ids=document_ids
            )
        return (o * self.weight("scale")).transpose(0, 1).flatten(-2)


class DeltaExchange(ChunkExchange):
    """A chunk acts on a state by a matrix; outputs are computed once the state has come."""

    def __init__(self, beta):
        self.beta = beta

    def combine(self, chunks):
        return Transition(continuing_chunks(chunks.document_ids, chunks.number))

    def local_summary(self, chunks, *inputs):
        q, k, v = inputs
        n, _, h, d = k.shape
        eye = torch.eye(d, dtype=k.dtype).expand(n, h, d, d)
        _, transition = delta_rule(q, k, torch.zeros_like(k), self.beta, eye, chunks.rows)
        _, state = delta_rule(q, k, v, self.beta, torch.zeros_like(eye), chunks.rows)
        return transition, state

    def apply(self, chunks, local, incoming, *inputs):
        return delta_rule(*inputs, self.beta, incoming, chunks.rows)[0]


def delta_rule(q, k, v, beta, state, ids):
    """q, k, v [b, t, h, d], beta [h], state [b, h, d, d] -> o [b, t, h, d], state after the last
    token."""
    outs = []
    beta = beta[:, None, None]
    for t in range(q.shape[1]):
        if ids is not None and t:
            state = state * (ids[:, t] == ids[:, t - 1])[:, None, None, None]
        key = k[:, t, :, None]  # [b, h, 1, d]
        state = state + beta * key.transpose(-1, -2) @ (v[:, t, :, None] - key @ state)
        outs.append((q[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outs, dim=1), state


def short_convolution(x, weight, group, document_ids):
    """x [b, t_local, channels], weight [channels, W] -> the same shape; no token sees another
    document or what is after it."""
    window = weight.shape[1]
    rows = preceding_tokens(x, window - 1, group)
    ids = preceding_ids(document_ids, window - 1, group)
    count = rows.shape[1] - window + 1
    total = 0
    for tap in range(window):
        part = rows[:, tap : tap + count] * weight[:, tap]
        if ids is not None:
            part = part * (ids[:, tap : tap + count] == ids[:, window - 1 :])[..., None]
        total = total + part
    return join_chunks(total, group)
