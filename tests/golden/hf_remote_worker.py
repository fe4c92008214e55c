"""Load an exported folder as a user does and measure it: `python hf_remote_worker.py HF_DIR
GOLDEN_FILE LOGITS_NAME`.

Runs in its own process, under whichever transformers is on the path. What trains models here cannot
be imported, installed or not, as for a user who only has the folder. Prints one JSON object."""
# ruff: noqa: E402 - the block must stand before the imports

import json
import sys

for absent in ("megatron_hypenet", "megatron", "deepspeed"):
    # before anything else is imported, so that no library finds them either
    sys.modules[absent] = None

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def relative(found, want):
    return float((found - want).abs().max() / want.abs().max())


@torch.no_grad()
def cached_logits(model, ids):
    """Prompt in two pieces, then token by token."""
    cache = None
    found = []
    for piece in ids.split([17, 40, *[1] * (ids.shape[1] - 57)], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def left_padding(model, ids):
    """Return (largest logit difference to the single rows, whether generation agrees) of a
    left-padded batch of four rows."""
    rows = [ids[0, :5], ids[1, :31], ids[0, 40:41], ids[1, 20:40]]
    total = 33
    batch = torch.full((len(rows), total), 3)
    mask = torch.zeros(len(rows), total, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, total - len(row) :] = row
        mask[index, total - len(row) :] = 1
    logits = model(batch, attention_mask=mask).logits
    options = dict(max_new_tokens=12, pad_token_id=3, eos_token_id=None, do_sample=False)
    texts = model.generate(batch, attention_mask=mask, **options)[:, total:]
    worst = 0.0
    same = True
    for index, row in enumerate(rows):
        worst = max(worst, relative(logits[index, mask[index].bool()], model(row[None]).logits[0]))
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)
        same = same and torch.equal(texts[index], alone[0, len(row) :])
    return worst, same


@torch.no_grad()
def main(folder, golden_file, name):
    golden = load_file(golden_file)
    ids = golden["input_ids"]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, output_loading_info=True
    )
    model.eval()
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    result = {
        "transformers": transformers.__version__,
        "class": type(model).__module__.split(".")[0] + "." + type(model).__name__,
        "unfit_keys": sorted(
            key
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in info[kind]
        ),
        "logits": relative(out.logits, golden[name]),
    }
    if name == "student_logits":
        result["hidden"] = max(
            relative(a, b) for a, b in zip(out.hidden_states, golden["student_hidden"], strict=True)
        )
        result["loss"] = abs(out.loss.item() / golden["stage3_loss"].item() - 1)
        result["cache"] = relative(cached_logits(model, ids), out.logits)
        result["padding"], result["padded_generation"] = left_padding(model, ids)
        options = dict(
            max_new_tokens=16,
            pad_token_id=3,
            eos_token_id=None,
            do_sample=False,
            attention_mask=torch.ones_like(ids[:, :20]),
        )
        found = [
            model.generate(ids[:, :20], use_cache=use_cache, num_beams=beams, **options)
            for beams in (1, 3)
            for use_cache in (True, False)
        ]
        result["generation"] = torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
