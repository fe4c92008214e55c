import warnings

import pytest
import torch
from torch.nn import functional as F

from .conftest import padded, tokens


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 1, 21], [29, 1]])
def test_any_split_of_a_sequence_gives_the_same_logits(model, pieces):
    ids = tokens(2, 30)
    want = model(ids, use_cache=False)
    assert want.past_key_values is None
    cache = None
    got = []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        got.append(out.logits)
    close(torch.cat(got, 1), want.logits)


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("filler", [0, 52])
def test_a_padded_batch_is_its_rows(model, rows, left, filler):
    ids, mask = padded(rows, 14, left=left, filler=filler)
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for index, row in enumerate(rows):
        close(logits[index, mask[index].bool()], model(row[None]).logits[0])


@torch.no_grad()
def test_padded_turns_continue_each_row(model, rows):
    """Two turns are padded on the left, each by itself: padding is in the middle of the cache."""
    second = list(reversed(rows))
    ids, mask = padded(rows, 13)
    cache = model(ids, attention_mask=mask).past_key_values
    more, more_mask = padded(second, 12)
    out = model(more, attention_mask=torch.cat([mask, more_mask], 1), past_key_values=cache)
    # no mask: everything new is real
    last = model(torch.full((4, 1), 7), past_key_values=out.past_key_values)
    for index, (a, b) in enumerate(zip(rows, second, strict=True)):
        whole = model(torch.cat([a, b, torch.tensor([7])])[None]).logits[0]
        close(out.logits[index, more_mask[index].bool()], whole[len(a) : -1])
        close(last.logits[index, 0], whole[-1])


@torch.no_grad()
def test_mask_of_the_new_tokens_alone_is_enough(model, rows):
    ids, mask = padded(rows, 13)
    first, second = model(ids, attention_mask=mask), model(ids, attention_mask=mask)
    new = torch.ones(4, 1, dtype=torch.long)
    full = model(
        new, attention_mask=torch.cat([mask, new], 1), past_key_values=first.past_key_values
    )
    short = model(new, attention_mask=new, past_key_values=second.past_key_values)
    assert torch.equal(full.logits, short.logits)


def test_loss_is_the_mean_next_token_cross_entropy(model):
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    want = F.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
    close(out.loss, want)
    close(model(ids, labels=labels, num_items_in_batch=24).loss, want * 12 / 24)
    out.loss.backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in model.parameters()
    )


def test_labels_that_are_already_shifted(model):
    ids = tokens(2, 9)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match=r"labels must be \[2, 4\]"):
        model(ids, labels=ids, logits_to_keep=4)


def test_another_loss_function_gets_what_it_asks_for(model):
    def loss(logits, labels, vocab_size, num_items_in_batch=None, weight=1.0):
        return weight * logits.sum() / num_items_in_batch + vocab_size

    ids = tokens(1, 5)
    model.loss_function = loss
    out = model(ids, labels=ids, num_items_in_batch=7, weight=2.0)
    close(out.loss, 2 * out.logits.sum() / 7 + 53)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, rows, reentrant):
    ids, mask = padded(rows, 14)

    def gradients(**inputs):
        model.zero_grad()
        model(
            ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **inputs
        ).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    want = gradients()
    model.train()
    with warnings.catch_warnings():
        # transformers 5.24 has another name for it, and warns
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    runs = []
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: runs.append(1) or forward(x)
    for inputs in ({}, {"use_cache": True}):
        for a, b in zip(gradients(**inputs), want, strict=True):
            close(a, b)
    assert len(runs) == 4, "forward and once more in backward, twice"
    assert model(ids, use_cache=True).get("past_key_values") is None
    with torch.no_grad():
        cache = model(ids, use_cache=True).get("past_key_values")
    with pytest.raises(ValueError, match="gradient checkpointing runs each layer twice"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "inputs", [{"foo": 1}, {"token_type_ids": torch.zeros(1)}, {"output_router_logits": True}]
)
def test_unknown_keywords_are_refused(model, inputs):
    ids = tokens(1, 4)
    for call in (
        lambda: model(ids, **inputs),
        lambda: model(ids, labels=ids, **inputs),
        lambda: model.model(ids, **inputs),
    ):
        with pytest.raises(TypeError, match=next(iter(inputs))):
            call()


def test_several_documents_in_a_row_are_refused(model):
    with pytest.raises(
        TypeError, match=r"rows with several documents \(cu_seq_lens_q, max_length_q\)"
    ):
        model(tokens(1, 4), cu_seq_lens_q=torch.tensor([0, 2, 4]), max_length_q=2)
    with pytest.raises(TypeError, match=r"rows with several documents \(seq_idx\)"):
        model.model(tokens(1, 4), seq_idx=torch.tensor([[0, 0, 1, 1]]))


def test_checkpointing_under_autocast_gives_the_same_gradients(model):
    """The settings are TRL's defaults: fp32 weights, bf16 autocast, gradient checkpointing."""
    ids = tokens(2, 70)
    model.float().train()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error", UserWarning)  # torch warns of norms of two dtypes
        plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
        model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
    for want, parameter in zip(plain, model.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, want)


@torch.no_grad()
def test_eager_attention_is_sdpa(make_model):
    ids = tokens(2, 9)
    plain = make_model()
    eager = make_model(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    close(eager(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn", "paged|sdpa"]
)
def test_other_attention_kernels_are_refused(make_model, name):
    with pytest.raises(ValueError, match="is not supported: HypeNet has .sdpa. and .eager"):
        make_model(attn_implementation=name)
    with pytest.raises(ValueError, match="is not supported: HypeNet has .sdpa. and .eager"):
        make_model().set_attn_implementation(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_use_rope": True}, "attn_use_rope=True"),
        ({"attn_logits_scaling": "log"}, "attn_logits_scaling must be"),
        ({"lightning_nh": 3}, "lightning_nh=3"),
        ({"mixer_types": ["attn"]}, "for 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must name full_attention or"),
        ({"attn_implementation": "flex_attention"}, "HypeNet has .sdpa. and .eager"),
    ],
    ids=str,
)
def test_settings_given_while_loading_are_checked(make_model, tmp_path, change, message):
    model = make_model()
    model.float().save_pretrained(tmp_path)
    assert torch.equal(
        type(model).from_pretrained(tmp_path)(tokens(1, 3)).logits, model(tokens(1, 3)).logits
    )
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, **change)
    with pytest.raises(TypeError, match="unheard_of"):
        type(model).from_pretrained(tmp_path, unheard_of=1)


@torch.no_grad()
def test_export_takes_any_mask(model, rows):
    ids, mask = padded(rows, 14)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs).module()
    for other in (mask, torch.ones_like(mask), mask.flip(1)):
        inputs["attention_mask"] = other
        real = other.bool()
        close(exported(**inputs).logits[real], model(**inputs).logits[real])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_export_leaves_rows_and_tokens_open(model, masked):
    def inputs(rows, count):
        mask = torch.ones(rows, count, dtype=torch.long)
        mask[:, : count // 3] = 0
        named = {"input_ids": tokens(rows, count), "use_cache": False}
        return ({**named, "attention_mask": mask} if masked else named), count // 3 * masked

    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("tokens", min=2, max=4096)}
    given, _ = inputs(2, 14)
    shapes = {name: None if name == "use_cache" else sizes for name in given}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for rows, count in ((1, 2), (3, 65), (2, 300)):
        given, first = inputs(rows, count)
        close(exported(**given).logits[:, first:], model(**given).logits[:, first:])


@torch.no_grad()
def test_exported_positions_are_asserted(model):
    ids = tokens(1, 6)
    inputs = {"input_ids": ids, "position_ids": torch.arange(6)[None], "use_cache": False}
    exported = torch.export.export(model, (), inputs).module()
    close(exported(**inputs).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="packed rows and shifted positions"):
        exported(**{**inputs, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})


def test_training_keeps_no_cache(model):
    assert model.train()(tokens(1, 4)).past_key_values is None
    assert model.eval()(tokens(1, 4)).past_key_values is not None


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(model, keep):
    ids = tokens(2, 6)
    whole = model(ids).logits
    close(
        model(ids, logits_to_keep=keep).logits,
        whole[:, keep if torch.is_tensor(keep) else slice(-keep, None)],
    )


@torch.no_grad()
def test_hidden_states_are_layer_inputs_and_final_output(model):
    ids = tokens(1, 6)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_positions_are_checked(model):
    ids = tokens(2, 6)
    plain = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(6)[None]).logits, plain)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed rows and shifted positions are not supported"):
        model(ids, position_ids=packed)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"output_attentions": True}, "does not return attention maps"),
        ({"past_key_values": "cache"}, "must be the HypeNetCache"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask must be"),
        ({"attention_mask": torch.tensor([[-1e9, 0, 0, 0]] * 2)}, "must be 1 at real tokens"),
        ({"attention_mask": torch.full((2, 4), 2)}, "must be 1 at real tokens"),
        ({"input_ids": tokens(1, 4)[0]}, r"input_ids \[rows, tokens\].*got the shape \[4\]"),
        ({"input_ids": tokens(2, 4)[:, :0]}, r"at least one token, got the shape \[2, 0\]"),
        (
            {"inputs_embeds": torch.zeros(2, 4, 32, dtype=torch.float64)},
            "give either input_ids or inputs_embeds",
        ),
    ],
)
def test_refuses_what_it_cannot_do(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(2, 4), **inputs})


def test_tied_head_shares_storage(make_model):
    tied = make_model(tie_word_embeddings=True)
    own = make_model()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert own.lm_head.weight is not own.model.embed_tokens.weight


@torch.no_grad()
def test_bf16_keeps_its_states_in_fp32_and_stays_close(model):
    ids = tokens(2, 40)
    want = model(ids).logits
    out = model.bfloat16()(ids)
    assert out.past_key_values.slots[0].state.dtype == torch.float32
    assert F.cosine_similarity(out.logits.double(), want, dim=-1).min() > 0.99


def test_what_a_mixer_keeps_in_fp32_is_loaded_so(model, tmp_path):
    """In bf16 and fp16, for the trunk alone too; other dtypes are for all parameters."""
    model.float().save_pretrained(tmp_path)
    names = {name for mixer in model.config.mixers for name in mixer.kept_in_fp32}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for kind in (type(model), type(model.model)):
            loaded = kind.from_pretrained(tmp_path, dtype=dtype)
            seen = set()
            for name, parameter in loaded.named_parameters():
                kept = name.rpartition(".")[2] in names
                seen |= {name.rpartition(".")[2]} & names
                assert parameter.dtype == (
                    torch.float32 if kept and dtype != torch.float64 else dtype
                ), name
            assert seen == names
            own = dict(model.named_parameters())
            for name, parameter in loaded.named_parameters():
                if name.rpartition(".")[2] in names:
                    prefix = "" if kind is type(model) else "model."
                    assert torch.equal(parameter.float(), own[prefix + name])


@torch.no_grad()
def test_logit_scaling_changes_softmax_layers_only(make_model):
    ids = tokens(1, 40)
    assert not torch.allclose(
        make_model(attn_logits_scaling="hype 50")(ids).logits,
        make_model(attn_logits_scaling=None)(ids).logits,
    )
    linear = ["lightning-attn"] * 3
    with_scaling = make_model(mixer_types=linear, attn_logits_scaling="hype 50")(ids).logits
    assert torch.equal(
        with_scaling, make_model(mixer_types=linear, attn_logits_scaling=None)(ids).logits
    )


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cuda_is_the_cpu(make_model, rows, dtype):
    """Whole prompts, padding, pieces and single steps on a GPU are compared with the CPU in
    float64."""
    limit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    # flash and memory-efficient attention need channels that are a multiple of 8 and like them a
    # power of two
    changes = {"head_dim": 64, "max_position_embeddings": 4096}
    model = make_model(**changes)
    device_model = make_model(**changes).to("cuda", dtype)

    def same(found, want):
        assert torch.isfinite(found).all()
        assert (found.double().cpu() - want).norm() / want.norm() < limit

    ids = tokens(2, 700)
    (padded_ids, mask) = padded(rows, 14)
    same(device_model(ids.cuda()).logits, model(ids).logits)
    real = mask.bool()
    same(
        device_model(padded_ids.cuda(), attention_mask=mask.cuda()).logits[real.cuda()],
        model(padded_ids, attention_mask=mask).logits[real],
    )
    cache = None
    found = []
    for piece in ids[:, :330].cuda().split([300, 1, 28, 1], dim=1):
        out = device_model(piece, past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
    same(torch.cat(found, 1), model(ids[:, :330]).logits)
    generated = device_model.generate(
        padded_ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=5, pad_token_id=0
    )
    assert generated.shape == (4, 19)
