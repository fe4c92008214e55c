import copy

import pytest
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_hypenet.export.hf_remote.cache_hypenet import HypeNetCache
from megatron_hypenet.export.hf_remote.generation_hypenet import CACHE, check_positions

from .conftest import padded, tokens

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def without_cache(model, ids, count):
    """Decode greedily by whole forward passes."""
    for _ in range(count):
        ids = torch.cat(
            [ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1
        )
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 9}, {"num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_generation_with_cache_is_generation_without(model, options):
    ids = tokens(2, 11)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(
            model.generate(ids, max_new_tokens=12, pad_token_id=0, use_cache=use_cache, **options)
        )
    assert torch.equal(*found) and found[0].shape == (2, 23)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunked"])
def test_a_padded_batch_generates_what_its_rows_generate(model, rows, options):
    rows = [row for row in rows if len(row) > 1]
    ids, mask = padded(rows, 14)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **options)
    for index, row in enumerate(rows):
        # with a mask: without one `generate` would take real tokens that equal the padding token
        # for padding
        alone = model.generate(
            row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=9, pad_token_id=0
        )
        assert torch.equal(got[index, 14:], alone[0, len(row) :])


@torch.no_grad()
def test_generation_continues_from_a_returned_cache(model):
    ids = tokens(1, 8)
    whole = model.generate(ids, max_new_tokens=10, pad_token_id=0)
    first = model.generate(
        ids, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, use_cache=True
    )
    again = model.generate(
        first.sequences, max_new_tokens=6, pad_token_id=0, past_key_values=first.past_key_values
    )
    assert torch.equal(again, whole)


@torch.no_grad()
def test_generation_from_embeddings(model):
    ids = tokens(2, 8)
    got = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, pad_token_id=0
    )
    assert torch.equal(got, model.generate(ids, max_new_tokens=6, pad_token_id=0)[:, 8:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}], ids=["whole", "chunked"])
def test_copies_of_a_cache_are_continued(model, name, options):
    """One prefix is read once and continued in two ways."""
    prefix = tokens(1, 8)
    cache = model(prefix).get("past_key_values")
    for seed in (1, 2):
        ids = torch.cat([prefix, tokens(1, 10, seed=seed)], 1)
        mask = torch.ones_like(ids)
        if options and CACHE == "past_key_values":
            # versions before 5.24 cut their first chunk from the start of the input, whatever the
            # cache has seen
            with pytest.raises(ValueError, match="has seen 8 tokens"):
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=6,
                    **{name: copy.deepcopy(cache)},
                    **GREEDY,
                    **options,
                )
            continue
        got = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            **{name: copy.deepcopy(cache)},
            **GREEDY,
            **options,
        )
        assert torch.equal(got, without_cache(model, ids, 6))
    assert cache.get_seq_length() == 8


@torch.no_grad()
def test_new_tokens_alone_continue_a_cache_when_the_mask_is_whole(model):
    prefix = tokens(1, 8)
    new = tokens(1, 3, seed=4)
    got = model.generate(
        new,
        attention_mask=torch.ones(1, 11),
        past_key_values=model(prefix).get("past_key_values"),
        max_new_tokens=5,
        **GREEDY,
    )
    assert torch.equal(got[:, 3:], without_cache(model, torch.cat([prefix, new], 1), 5)[:, 11:])


@torch.no_grad()
def test_a_padded_cache_is_continued(model, rows):
    rows = [row for row in rows if len(row) > 4]
    ids, mask = padded(rows, 14)
    cache = model(ids[:, :11], attention_mask=mask[:, :11]).get("past_key_values")
    got = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, **GREEDY
    )
    for index, row in enumerate(rows):
        assert torch.equal(got[index, 14:], without_cache(model, row[None], 6)[0, len(row) :])


@torch.no_grad()
def test_beams_start_from_a_repeated_cache(model):
    ids = tokens(1, 9)
    want = model.generate(ids, num_beams=3, max_new_tokens=6, **GREEDY)
    cache = model(ids[:, :7]).get("past_key_values")
    with pytest.raises(
        ValueError, match="holds 1 rows and the input has 3; repeat the rows of the cache first"
    ):
        model.generate(
            ids, num_beams=3, max_new_tokens=6, past_key_values=copy.deepcopy(cache), **GREEDY
        )
    cache.batch_repeat_interleave(3)
    assert torch.equal(
        model.generate(ids, num_beams=3, max_new_tokens=6, past_key_values=cache, **GREEDY), want
    )


@torch.no_grad()
@pytest.mark.parametrize("given", [8, 5])
def test_a_cache_that_has_seen_everything_is_refused(model, given):
    ids = tokens(1, 8)
    cache = model(ids).get("past_key_values")
    with pytest.raises(ValueError, match=f"has seen 8 tokens and the input has {given}"):
        model.generate(ids[:, :given], past_key_values=cache, max_new_tokens=3, **GREEDY)


@torch.no_grad()
def test_a_cache_has_one_name_per_call(model):
    ids = tokens(1, 4)
    cache = model(ids).get("past_key_values")
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tokens(1, 1), past_key_values=cache, cache=cache)


@torch.no_grad()
def test_guidance_reads_the_context_of_the_negative_prompt(model):
    ids = tokens(1, 7)
    negative = tokens(1, 5, seed=3)
    found = [
        model.generate(
            ids,
            negative_prompt_ids=negative,
            guidance_scale=2.5,
            max_new_tokens=8,
            use_cache=use_cache,
            **GREEDY,
        )
        for use_cache in (True, False)
    ]
    row = ids
    other = negative
    for _ in range(8):
        with_prompt, without = (
            model(x, use_cache=False).logits[:, -1].float().log_softmax(-1) for x in (row, other)
        )
        best = (2.5 * (with_prompt - without) + without).argmax(-1, keepdim=True)
        row, other = torch.cat([row, best], 1), torch.cat([other, best], 1)
    assert torch.equal(found[0], row) and torch.equal(found[1], row)


@torch.no_grad()
def test_hidden_states_of_every_step(model):
    ids = tokens(2, 6)
    out = model.generate(
        ids, max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True, **GREEDY
    )
    want = model(out.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    assert len(out.hidden_states) == 4
    for layer in range(4):
        steps = torch.cat([step[layer] for step in out.hidden_states], 1)
        torch.testing.assert_close(steps, want[layer], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="does not return attention maps"):
        model.generate(
            ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, **GREEDY
        )


@torch.no_grad()
def test_positions_given_to_generate_are_checked(model, rows):
    ids, mask = padded(rows, 13)
    right = (mask.cumsum(1) - 1).clamp(min=0)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, position_ids=right, max_new_tokens=3, **GREEDY),
        want,
    )
    with pytest.raises(ValueError, match="packed rows and shifted positions"):
        model.generate(ids, attention_mask=mask, position_ids=right + 1, max_new_tokens=3, **GREEDY)


def test_positions_must_have_a_column_per_token():
    positions = torch.arange(4)[None]
    check_positions(positions, positions, None)
    for wrong in (positions[:, :3], positions[None], positions[:, :1]):
        with pytest.raises(ValueError, match="got the shape"):
            check_positions(wrong, positions, None)


@pytest.mark.parametrize("unknown", [{"attention_maks": 1}, {"output_router_logits": True}])
def test_unknown_keywords_of_generate_are_refused(model, unknown):
    with pytest.raises((TypeError, ValueError), match=next(iter(unknown))):
        model.generate(tokens(1, 4), max_new_tokens=2, **unknown, **GREEDY)


def test_cache_has_the_name_of_the_installed_transformers(model):
    assert CACHE in model(tokens(1, 3)).keys()
    assert isinstance(
        model.generate(tokens(1, 3), max_new_tokens=2, return_dict_in_generate=True, **GREEDY)[
            CACHE
        ],
        HypeNetCache,
    )


def test_refuses_other_caches_and_rollback(model):
    with pytest.raises(ValueError, match="has its own cache"):
        model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1, 4), max_new_tokens=2, prompt_lookup_num_tokens=2)

    with pytest.raises(ValueError, match="must be the HypeNetCache"):
        model.generate(tokens(1, 4), max_new_tokens=2, past_key_values=transformers.DynamicCache())


def test_drafts_are_refused_in_one_sentence(model):
    sizes = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    teacher = Qwen3ForCausalLM(Qwen3Config(vocab_size=53, **sizes)).eval()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1, 4), max_new_tokens=2, assistant_model=teacher)
    with pytest.raises(ValueError, match="cannot be an assistant_model"):
        teacher.generate(tokens(1, 4), max_new_tokens=4, assistant_model=model.float())
