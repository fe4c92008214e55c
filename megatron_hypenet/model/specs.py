"""Megatron layer specs: one per layer, chosen by the layer's mixer, sliced to the pipeline stage of
this process."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import init_method_normal

from megatron_hypenet.config.computation import Fp8Recipe, TransformerImpl
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, Recompute
from megatron_hypenet.model.layer import PreNormLayer
from megatron_hypenet.model.linear_layers import mixer_submodules
from megatron_hypenet.model.mixers import mixer_class
from megatron_hypenet.model.mlp import SwiGLU
from megatron_hypenet.model.pipeline_layout import layers_of_chunk
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.parallel.norm import RMSNorm
from megatron_hypenet.parallel.recompute import use_in_megatron

_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


_FP8_RECIPE: dict[Fp8Recipe, dict[str, Any]] = {
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # the largest value of 16 steps, as one small step would make the next one overflow
    "delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
    },
    # a scale for every 128 values leaves no need of e5m2's range in gradients
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
"""Megatron's names for the recipes, with e5m2 for gradients in the first two ("hybrid")."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    layout: tuple[int, ...] = (),
    recompute: Recompute = "none",
    impl: TransformerImpl = "local",
    fp8: Fp8Recipe | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration of a model in one dtype (float64 too) on one layout, `layout`
    being the layers per chunk of the pipeline where there are several; `fp8` is for a model that
    trains with Transformer Engine's layers (`impl`)."""
    assert fp8 is None or impl == "transformer_engine", "FP8 training is Transformer Engine's"
    init = init_method_normal(model.init_method_std)
    # for "layernorm"; "core_attn" is read by the mixers, and the MLP goes by the granularity
    use_in_megatron()
    # This warning of Megatron's is about context parallelism in Transformer Engine's attention,
    # which these mixers do not use.
    warnings.filterwarnings(
        "ignore", message="If you are using transformer_engine as the transformer implementation"
    )
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=init,
        output_layer_init_method=init,
        use_cpu_initialization=device().type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_megatron_layout(layout) if len(layout) > 1 else None,
        **_interleaving(parallel),
        context_parallel_size=parallel.context_parallel_size,
        # Megatron's names for the two methods
        cp_comm_type="p2p" if parallel.context_parallel_method == "ring" else "all_gather",
        sequence_parallel=parallel.sequence_parallel,
        bias_activation_fusion=False,  # model.mlp has its own
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # (Megatron's spelling.) Checkpoint keys carry the global layer index, since layers differ.
        hetereogenous_dist_checkpoint=True,
        transformer_impl=impl,
        # else Transformer Engine keeps FP8 weights until it is told of an update
        disable_parameter_transpose_cache=True,
        **({} if fp8 is None else _FP8_RECIPE[fp8]),
        **_RECOMPUTE[recompute],
        attention_softmax_in_fp32=dtype != torch.float64,
    )


def _interleaving(parallel: ParallelConfig) -> dict[str, Any]:
    """Return Megatron's settings for several chunks per pipeline stage. Its interleaved schedule
    exchanges with both neighbours at once; of two stages both are the same process, whose messages
    only the unbatched exchange keeps apart, and that one overlaps them with computation."""
    if not parallel.interleaved:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _megatron_layout(layout: tuple[int, ...]) -> list[list[str]]:
    """Return layers per chunk in Megatron's notation of a free layout: the embedding begins the
    first chunk, the loss ends the last."""
    chunks = [["decoder"] * count for count in layout]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def block_spec(
    model: ModelConfig,
    layout: tuple[int, ...],
    chunk: int,
    *,
    trunk_only: bool = False,
    impl: TransformerImpl = "local",
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of one chunk of the pipeline. `trunk_only` leaves out the last
    layer's MLP: nothing after the last mixer is built."""
    last = model.num_layers - 1
    layers = [
        layer_spec(model, model.mixer_types[i], with_mlp=not (trunk_only and i == last), impl=impl)
        for i in layers_of_chunk(layout, chunk)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def layer_spec(
    model: ModelConfig, mixer: str, *, with_mlp: bool = True, impl: TransformerImpl = "local"
) -> ModuleSpec:
    """Return one pre-norm decoder layer: norm, mixer, residual, norm, SwiGLU, residual."""
    return ModuleSpec(
        PreNormLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                mixer_class(mixer), params={"model": model}, submodules=mixer_submodules(impl)
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm if with_mlp else IdentityOp,
            mlp=SwiGLU if with_mlp else IdentityOp,
            mlp_bda=get_bias_dropout_add if with_mlp else IdentityFuncOp,
        ),
    )
