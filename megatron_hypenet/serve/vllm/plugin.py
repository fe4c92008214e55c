"""Make HypeNet known to vLLM: the entry point `vllm.general_plugins` of this package.

vLLM calls `register` in each of its processes, perhaps several times. Everything is imported inside
it, and the model by name later, because some of these processes must not touch a GPU yet."""

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of attention heads that vLLM has kernels for."""


def register() -> None:
    """Register configuration, cache sizes and model under the names that exported folders have."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig

    class HypeNetSizes(ModelArchConfigConvertorBase):
        """What vLLM sizes its caches by."""

        def get_head_size(self) -> int:
            """Return the channels of a key in the cache."""
            return cached_head_size(self.hf_text_config.head_dim)

    AutoConfig.register(HypeNetConfig.model_type, HypeNetConfig, exist_ok=True)
    MODEL_ARCH_CONFIG_CONVERTORS[HypeNetConfig.model_type] = HypeNetSizes
    ModelRegistry.register_model(
        "HypeNetForCausalLM", "megatron_hypenet.serve.vllm.model:HypeNetForCausalLM"
    )


def cached_head_size(head_dim: int) -> int:
    """Return the smallest head size with kernels that holds `head_dim` channels: keys and values of
    other sizes are filled up with zeros. ValueError above 256."""
    for size in HEAD_SIZES:
        if head_dim <= size:
            return size
    raise ValueError(
        f"head_dim = {head_dim}: vLLM has attention kernels up to {HEAD_SIZES[-1]}; "
        "use the exported code with transformers instead"
    )
