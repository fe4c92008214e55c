"""Use exported folders as in a model card: `python -W error hf_use_worker.py HF_DIR
TOKENIZER_DIR...`.

Loads, generates, continues a cache, saves and loads again; every warning that transformers writes
is kept. Prints one JSON object."""

import copy
import json
import logging
import os
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

TEXT = "hello world, <|im_end|> and more<|endoftext|>"


class Kept(logging.Handler):
    """Collects messages of warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@torch.no_grad()
def main(folder, *tokenizers):
    kept = Kept()
    transformers.utils.logging.get_logger("transformers").addHandler(kept)
    result = {"transformers": transformers.__version__}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(
        ["hello world, and", "one"], return_tensors="pt", padding=True, padding_side="left"
    )
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    first = model.generate(**batch, **options)
    part = {name: value[:, :2] for name, value in batch.items()}
    out = model(**part, use_cache=True)
    name = "cache" if "cache" in out.keys() else "past_key_values"
    again = model.generate(**batch, **options, **{name: copy.deepcopy(out[name])})
    chunked = model.generate(**batch, **options, prefill_chunk_size=2)
    result["continued"] = torch.equal(first, again) and torch.equal(first, chunked)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        result["saved"] = sorted(name for name in os.listdir(saved) if name.endswith(".py"))
        other = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        result["round_trip"] = torch.equal(other(**batch).logits, model(**batch).logits)
    result["warnings"] = [message for message in kept.messages if "generation flags" not in message]
    generator = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, trust_remote_code=True
    )
    result["text"] = generator("hello", **options)[0]["generated_text"]
    result["tokenizers"] = []
    for where in tokenizers:
        loaded = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
        inputs = loaded(TEXT)
        result["tokenizers"].append(
            {"ids": inputs.pop("input_ids"), "others": sorted(inputs), "end": loaded.eos_token_id}
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
