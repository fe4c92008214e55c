"""The language model, teacher or student: embedding, a Megatron `TransformerBlock` with one spec
per layer, output head."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_hypenet.config.computation import Fp8Recipe, TransformerImpl
from megatron_hypenet.config.model import LogitsScaling, ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, Recompute
from megatron_hypenet.model import inference
from megatron_hypenet.model.layer import PreNormLayer
from megatron_hypenet.model.mixers import Mixer, without_extra_state
from megatron_hypenet.model.mixers.softmax_attn import SoftmaxAttn
from megatron_hypenet.model.pipeline_layout import pipeline_layout
from megatron_hypenet.model.specs import block_spec, transformer_config
from megatron_hypenet.ops.rope import scaled_frequencies
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.context.layout import split_sequence
from megatron_hypenet.parallel.cpu import device


class DecoderChunk(TransformerBlock):
    """Consecutive layers on one pipeline stage, the form in which Megatron's schedules take a
    model; the last one of a model ends with the final norm."""

    model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take hidden states from the chunk before (Megatron's schedules call this)."""
        super().set_input_tensor(
            input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        )


class DecoderChunks(torch.nn.ModuleList):
    """Several chunks of a pipeline stage, which lie apart in the model."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the sharded state of all chunks; in checkpoints a layer goes by its number in the
        model, whatever chunk it lies in."""
        chunks: Any = self
        return {
            f"{prefix}{index}.{name.removeprefix(prefix)}": tensor
            for index, chunk in enumerate(chunks)
            for name, tensor in chunk.sharded_state_dict(prefix, sharded_offsets, metadata).items()
        }


class HypeNetModel(LanguageModule):
    """Decoder-only model whose layers differ in their mixer. Hidden states are [s, b, h] as in
    Megatron; token ids are [b, s]."""

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        parallel: ParallelConfig,
        layout: tuple[int, ...],
        *,
        trunk_only: bool = False,
    ) -> None:
        """`layout` is the number of layers per chunk of the pipeline; `trunk_only` builds nothing
        after the last mixer (no last MLP, final norm or head): the trunk of hidden-state
        alignment."""
        super().__init__(config=config, pg_collection=groups.collection())
        self.model_config = model_config
        self.parallel = parallel
        self.layout = layout
        self.trunk_only = trunk_only
        stage, num_stages = groups.pipeline_stage()
        self.pre_process = stage == 0
        self.post_process = stage == num_stages - 1
        self.vp_size = None  # this module is the whole stage; Megatron means a chunk by it
        self.share_embeddings_and_output_weights = (
            model_config.share_embeddings_and_output_weights and not trunk_only
        )
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=model_config.vocab_size,
                max_sequence_length=model_config.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=model_config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model_config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        if model_config.rope_scaling is not None:
            self.rotary_pos_emb.inv_freq = scaled_frequencies(
                self.rotary_pos_emb.inv_freq, model_config.rotary_base, model_config.rope_scaling
            )
        chunks = [
            DecoderChunk(
                config=config,
                spec=block_spec(
                    model_config, layout, index, trunk_only=trunk_only, impl=config.transformer_impl
                ),
                pre_process=index == 0,
                post_process=index == len(layout) - 1,
                post_layer_norm=not trunk_only,
                pg_collection=self.pg_collection,
                vp_stage=index // num_stages if parallel.interleaved else None,
            )
            for index in range(stage, len(layout), num_stages)
        ]
        self.decoder = DecoderChunks(chunks) if parallel.interleaved else chunks[0]
        if self.post_process and not trunk_only:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model_config.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=True,
                skip_weight_param_allocation=self.pre_process
                and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
            )
        if (self.pre_process or self.post_process) and not trunk_only:
            self.setup_embeddings_and_output_layer()

    @property
    def chunks(self) -> tuple[DecoderChunk, ...]:
        """Return the chunks of this pipeline stage, one unless they are interleaved."""
        chunks: Any = self.decoder if self.parallel.interleaved else (self.decoder,)
        return tuple(chunks)

    @property
    def layers(self) -> tuple[PreNormLayer, ...]:
        """Return the layers of this pipeline stage, in order."""
        return tuple(layer for chunk in self.chunks for layer in chunk.layers)

    def mixer(self, layer: int) -> Mixer:
        """Return the mixer of a global layer index that lies on this pipeline stage."""
        for block in self.layers:
            if block.layer_number == layer + 1:
                return block.self_attention
        raise KeyError(f"layer {layer} is not on this pipeline stage")

    def set_mixer(self, layer: int, mixer: torch.nn.Module) -> None:
        """Put another mixer (or a wrapper with a mixer's call) into a layer of this pipeline
        stage."""
        for block in self.layers:
            if block.layer_number == layer + 1:
                block.self_attention = mixer
                return
        raise KeyError(f"layer {layer} is not on this pipeline stage")

    def set_attn_logits_scaling(self, value: LogitsScaling) -> None:
        """Switch the inference-time logit scaling of the softmax layers; training runs with
        None."""
        self.model_config = self.model_config.replace(attn_logits_scaling=value)
        for module in self.modules():
            if isinstance(module, SoftmaxAttn):
                module.logits_scaling = self.model_config.attn_logits_scaling

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output head, [vocab / tp, hidden_size]; the embedding
        itself when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def replicated_over_pipeline(self) -> list[torch.nn.Parameter]:
        """Return the parameters of this pipeline stage that another stage holds too: a tied
        embedding, on the first and the last of several."""
        several = not (self.pre_process and self.post_process)
        if not (
            several
            and self.share_embeddings_and_output_weights
            and (self.pre_process or self.post_process)
        ):
            return []
        return [self.shared_embedding_or_output_weight()]

    def hidden(
        self, input_ids: Tensor, document_ids: Tensor | None = None, *, chunk: int = 0
    ) -> Tensor:
        """Run this rank's tokens through a chunk of this pipeline stage: the schedule's step, and
        with one stage the whole trunk.

        input_ids [b, s] are this context-parallel rank's tokens; document_ids [b, s * context
        ranks] cover the whole sequence, or are None when each row is one document. Returns [s, b,
        h] (s / tp under sequence parallelism): from the model's last chunk after the final norm
        (before it for a trunk), from others the input of the next one."""
        block = self.chunks[chunk]
        x = self.embedding(input_ids=input_ids, position_ids=None) if block.pre_process else None
        # `packed_seq` only means that angles of all positions come back; this rank's zigzag part is
        # cut from them here.
        angles = self.rotary_pos_emb(
            input_ids.shape[1] * self.pg_collection.cp.size(), packed_seq=True
        )
        angles = split_sequence(angles, self.pg_collection.cp, dim=0)
        # Megatron passes `packed_seq_params` on to the mixers without using it.
        return block(
            hidden_states=x,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=document_ids,
        )

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Map the output of `hidden` on the last stage -> logits [s, b, vocab] in the model's
        dtype, whole on every tensor-parallel rank."""
        logits, _ = self.output_layer(hidden, weight=self.head_weight())
        return logits

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits [b, s, vocab] of whole sequences `input_ids` [b, s], on every rank.

        All ranks of a replica get the same sequences. For evaluation under any layout, and for
        training on one process; stages train through `hidden` instead."""
        return inference.logits(self, input_ids)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return Megatron's sharded state under layout-free keys; tensors only."""
        # LanguageModule's own method requires an output head, which a trunk does not have.
        parent: Any = super(LanguageModule, self) if self.trunk_only else super()
        return without_extra_state(parent.sharded_state_dict(prefix, sharded_offsets, metadata))

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Return the input of every layer, then the final-norm output: num_layers + 1 tensors [b,
        s, h]."""
        states: list[Tensor] = []

        def keep_input(
            _layer: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
        ) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            states.append(x.transpose(0, 1))

        handles = [
            layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in self.layers
        ]
        try:
            final = self.hidden(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        return [*states, final.transpose(0, 1)]

    @torch.no_grad()
    def token_scores(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Score the tokens of whole sequences `input_ids` [b, s], on every rank of any layout.

        Returns the negative log likelihood of each next token in nats [b, s - 1] (fp32, float64 for
        float64 models), and whether it was the model's first choice [b, s - 1]."""
        return inference.token_scores(self, input_ids)


def build_model(
    model_config: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    seed: int | None = None,
    trunk_only: bool = False,
    recompute: Recompute = "none",
    impl: TransformerImpl = "local",
    fp8: Fp8Recipe | None = None,
) -> HypeNetModel:
    """Return a model with fresh random weights on this process's device; callers load weights into
    it.

    Starts the process groups if none exist. `seed` fixes the random weights; `recompute` says what
    training recomputes in backward; `impl` and `fp8` choose the layers and their products in
    training. ConfigError names an unknown mixer."""
    groups.init_parallel(parallel, seed=1234 if seed is None else seed)
    layout = pipeline_layout(model_config, parallel)
    config = transformer_config(model_config, parallel, dtype, layout, recompute, impl, fp8)
    model = HypeNetModel(config, model_config, parallel, layout, trunk_only=trunk_only)
    return model.to(device=device(), dtype=dtype)
