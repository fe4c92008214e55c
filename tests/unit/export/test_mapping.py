import pytest

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import mapping
from megatron_hypenet.export.mapping import check_names

QWEN3 = dict(
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    attn_use_rope=True,
    attn_use_output_gate=False,
)


def qwen3(layers, hidden, ffn, heads, tied):
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        share_embeddings_and_output_weights=tied,
        mixer_types=("attn",) * layers,
        **QWEN3,
    )


def student(**changes):
    config = qwen3(2, 8, 12, 16, tied=False).replace(kv_channels=2, vocab_size=11, **changes)
    return config.with_mixers(("attn", "lightning_attn"))


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        # published totals of Qwen3-0.6B, 1.7B, 4B, 8B (tied heads counted once)
        ((28, 1024, 3072, 16, True), 596_049_920),
        ((28, 2048, 6144, 16, True), 1_720_574_976),
        ((36, 2560, 9728, 32, True), 4_022_468_096),
        ((36, 4096, 12288, 32, False), 8_190_735_360),
    ],
)
def test_parameter_counts_of_published_models(shape, parameters):
    assert mapping.num_parameters(qwen3(*shape)) == parameters


def test_names_of_a_hypenet_are_the_published_ones():
    common = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"]
    around = [
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, extra in enumerate((["o_gate"], ["z_proj", "o_norm"])):
        expected |= {
            f"model.layers.{layer}.{name}.weight"
            for name in [*around, *(f"self_attn.{part}" for part in common + extra)]
        }
    assert {name for entry in mapping.entries(student()) for name in entry.hf} == expected


def test_our_names_and_shapes():
    table = {entry.ours: entry.shape for entry in mapping.entries(student())}
    assert table["embedding.word_embeddings.weight"] == (11, 8)
    assert table["output_layer.weight"] == (11, 8)
    assert table["decoder.layers.0.mlp.linear_fc1.weight"] == (24, 8)
    # 8 groups of 2 channels
    assert table["decoder.layers.0.self_attention.linear_in.weight.k"] == (16, 8)
    assert table["decoder.layers.1.self_attention.linear_in.weight.k"] == (32, 8)  # all 16 heads
    assert table["decoder.layers.1.self_attention.o_norm.weight"] == (32,)
    assert "decoder.layers.0.self_attention.o_norm.weight" not in table


def test_head_and_gate_rows_follow_the_configuration():
    tied = {
        entry.ours for entry in mapping.entries(student(share_embeddings_and_output_weights=True))
    }
    teacher = {entry.ours for entry in mapping.entries(qwen3(2, 8, 12, 16, tied=False))}
    assert "output_layer.weight" not in tied
    assert not any("gate" in name for name in teacher) and "output_layer.weight" in teacher


def test_missing_and_extra_names_are_counted_and_named():
    with pytest.raises(
        ConversionError,
        match=r"x: 2 of 4 tensors are missing, first c, d; 1 tensors do not belong.*first q",
    ):
        mapping.check_names(["a", "b", "c", "d"], ["a", "b", "q"], where="x")
    mapping.check_names(["a", "b"], ["b", "a"], where="x")


def test_very_many_missing_tensors_are_counted_at_once():
    names = [f"layer{number}.weight" for number in range(100_000)]
    with pytest.raises(ConversionError, match="100000 of 100000 tensors are missing, first layer0"):
        check_names(names, [], where="x")
    with pytest.raises(ConversionError) as caught:
        check_names([], ["a\0" * 5000], where="x")
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()
