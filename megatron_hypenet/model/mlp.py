"""The MLP of every layer: parallel linear layers around SwiGLU's product."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_hypenet.model.linear_layers import mlp_submodules, save_original_inputs
from megatron_hypenet.ops.swiglu import swiglu
from megatron_hypenet.parallel.groups import tensor_group
from megatron_hypenet.parallel.recompute import DropOutput


class SwiGLU(MLP):
    """Megatron's MLP, its weights and their names, with one operation between the two products that
    keeps nothing but its input.

    Under selective recomputation the product is freed once `linear_fc2` has read it, and recomputed
    in backward."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        """Take what Megatron's layers pass to a class given as `mlp`: the configuration alone
        (0.16), or the groups and more too (0.19)."""
        super().__init__(
            config,
            mlp_submodules(config.transformer_impl),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tensor_group() if pg_collection is None else pg_collection.tp,
        )
        if config.fp8 and config.recompute_granularity == "selective":
            save_original_inputs(self.linear_fc2)  # Megatron's layer does it for linear_fc1

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] (the rank's own tokens under sequence parallelism) -> ([s, b, h],
        no bias).

        Megatron also passes arguments that only experts use: `per_token_scale`, which must be None,
        and a padding mask."""
        assert per_token_scale is None, "only the experts of a mixture are scaled per token"
        projected, _ = self.linear_fc1(hidden_states)
        if self.config.recompute_granularity != "selective":
            output, _ = self.linear_fc2(swiglu(projected))
            return output, None
        drop = DropOutput()
        output, _ = self.linear_fc2(drop.checkpoint(swiglu, projected))
        drop.discard_output_and_register_recompute(output)
        return output, None
