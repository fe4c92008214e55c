"""Ways to damage a file. Each takes (random, path) and returns one line of what it did; it changes
only this file.

One file, because subjects choose from all of them."""

import io
import json
import os
import pickletools
import struct
import zipfile

import yaml

BIG = 1 << 20
DOUBLED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
BOMBS = (
    b"\x80\x02}K\x01\x85" + DOUBLED + b"K\x01s.",  # a key that takes 2**60 steps to hash
    b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    b"\x80\x02X\xff\xff\xff\x7fa.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
    b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x02]" + b"K\x01a" * 100_000 + b".",
    b"",
)
LEAVES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**12,
    10**90,
    -(10**90),
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "attn",
    "1",
    "1e3",
    "null",
    "../../etc/passwd",
    "/etc/passwd",
    "a\x1bb\nc",
    "ä" * 50,
    "e\u0301",
    "x" * 100_000,
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    [None] * 5,
    {"": {"": {}}},
    list(range(5000)),
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    "[" * 5000 + "]" * 5000,
    '{"a":' * 300 + "1" + "}" * 300,
    "",
)


# bytes


def truncate(chance, path):
    content = path.read_bytes()
    keep = chance.choice([0, 1, 7, 8, 9, len(content) - 1, chance.randrange(len(content) + 1)])
    path.write_bytes(content[: max(0, keep)])
    return f"cut to {keep} bytes"


def flip_bits(chance, path):
    content = bytearray(path.read_bytes())
    places = (
        [chance.randrange(len(content)) for _ in range(chance.choice([1, 1, 2, 8]))]
        if content
        else []
    )
    for place in places:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"bits flipped in bytes {places}"


def flip_early_bits(chance, path):
    content = bytearray(path.read_bytes())
    place = chance.randrange(min(256, len(content)))
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"a bit flipped in byte {place}"


def insert_bytes(chance, path):
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    new = chance.choice([b"\0", b"\xff" * 8, chance.randbytes(16), b"\0" * 4096, content[:64]])
    path.write_bytes(content[:place] + new + content[place:])
    return f"{len(new)} bytes inserted at {place}"


def drop_bytes(chance, path):
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    count = chance.choice([1, 2, 8, 100])
    path.write_bytes(content[:place] + content[place + count :])
    return f"{count} bytes dropped at {place}"


def overwrite_bytes(chance, path):
    content = bytearray(path.read_bytes())
    place = chance.randrange(max(1, len(content)))
    count = chance.choice([1, 4, 8])
    content[place : place + count] = chance.choice([b"\0", b"\xff", b"\x7f"]) * len(
        content[place : place + count]
    )
    path.write_bytes(content)
    return f"{count} bytes overwritten at {place}"


def append_bytes(chance, path):
    content = path.read_bytes()
    path.write_bytes(content + chance.choice([b"\0", b"x" * 100, content, b"\n"]))
    return "bytes appended"


# what stands under the name


def replace_by_odd_thing(chance, path):
    """Replace by a pipe, a device, a folder, a link to nowhere, to itself, out of the folder, or a
    sparse file of a terabyte."""
    kind = chance.choice(
        ["pipe", "zero", "folder", "nowhere", "loop", "outside", "huge", "gone", "empty"]
    )
    if kind == "outside":
        outside = path.parents[1] / f"outside-{path.name}"
        outside.write_bytes(path.read_bytes())
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "outside":
        path.symlink_to(outside)
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    elif kind == "empty":
        path.touch()
    return f"replaced: {kind}"


# trees


def _places(value):
    """Return every (container, key) in a tree."""
    waiting = [value]
    found = []
    while waiting:
        item = waiting.pop()
        keys = (
            list(item)
            if isinstance(item, dict)
            else range(len(item))
            if isinstance(item, list)
            else ()
        )
        found += [(item, key) for key in keys]
        waiting += [item[key] for key in keys]
    return found


def _change_tree(chance, value):
    """Change a tree in place once; returns (the tree, what was done, raw text to put in by
    name)."""
    places = _places(value)
    if not places or chance.random() < 0.05:
        return chance.choice(LEAVES), "the top replaced", {}
    container, key = chance.choice(places)
    kind = chance.choice(
        ["replace", "replace", "replace", "raw", "delete", "rename", "swap", "wrap"]
    )
    if kind == "replace":
        container[key] = chance.choice(LEAVES)
        return value, f"{str(key)[:60]} replaced by {str(container[key])[:60]!r}", {}
    if kind == "raw":
        container[key] = "@RAW@"
        raw = chance.choice(RAW)
        return value, f"{str(key)[:60]} replaced by the text {raw[:40]}", {'"@RAW@"': raw}
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[chance.choice(["", "x", str(key) + "x", "__class__", "é"])] = container.pop(key)
    elif kind == "swap":
        other, place = chance.choice(places)
        container[key], other[place] = other[place], container[key]
    else:
        container[key] = [container[key]]
    return value, f"{str(key)[:60]}: {kind}", {}


def change_json(chance, path):
    value, said, raw = _change_tree(chance, json.loads(path.read_bytes()))
    try:
        text = json.dumps(value, indent=chance.choice([None, 2]))
    except (ValueError, RecursionError):  # two places were swapped into each other
        text = "[" * 100_000
        said = "nested"
    for name, content in raw.items():
        text = text.replace(name, content)
    if chance.random() < 0.03:
        text = text.replace('":', '": 1, "again":', 1).replace(
            "again", text.split('"')[1] if '"' in text else "x", 1
        )
        said = "a key twice"
    path.write_text(text, encoding="utf-8")
    return said


ALIASES = "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML_TEXTS = (
    f"a: &a [x,x,x,x,x,x,x,x,x]\n{ALIASES}",
    "? [1, 2]\n: 3\n",
    "? {a: 1}\n: 3\n",
    "a: &x [*x]\n",
    "!!python/object/apply:os.system ['true']\n",
    "- " * 5000 + "x\n",
    "a: !!binary x\n",
    "---\n---\n",
    "x: !!timestamp 2001-99-99\n",
    "x: 0o9\n",
    "x: 1:99:99\n",
    "<<: [1]\n",
    "<<: {a: 1}\n",
    "x: .nan\n",
    "x: .inf\n",
    "x: 0x" + "f" * 5000 + "\n",
    "\t\n",
    "{" * 3000,
    "a: b: c\n",
    "x: '\\ud800'\n",
    'x: "\\uD800"\n',
    "output_dir: {a: 1}\n",
    "teacher: [\n",
    "%YAML 9.9\n---\na: 1\n",
    "x: !!set {a, b}\n",
)


def change_yaml(chance, path):
    text = path.read_text()
    if chance.random() < 0.3:
        new = chance.choice(YAML_TEXTS)
        path.write_text(chance.choice([new, text + new, new + text]))
        return f"YAML text {new[:40]!r}"
    value, said, raw = _change_tree(chance, yaml.safe_load(text))
    try:
        text = yaml.safe_dump(value, allow_unicode=True)
    except RecursionError:
        text = "[" * 100_000
        said = "nested"
    for name, content in raw.items():
        text = text.replace(f"'{name.strip(chr(34))}'", content)
    path.write_text(text, encoding="utf-8")
    return said


def change_lines(chance, path):
    lines = path.read_text().splitlines()
    place = chance.randrange(len(lines))
    kind = chance.choice(["again", "gone", "raw", "long", "json"])
    if kind == "again":
        lines.insert(place, lines[place])
    elif kind == "gone":
        del lines[place]
    elif kind == "raw":
        lines[place] = chance.choice(RAW) or "x"
    elif kind == "long":
        lines[place] = lines[place] * 50
    else:
        lines[place] = json.dumps(chance.choice([{"text": leaf} for leaf in LEAVES] + list(LEAVES)))
    path.write_text("\n".join(lines) + "\n")
    return f"line {place}: {kind}"


# binary formats


def change_safetensors_header(chance, path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if chance.random() < 0.3:
        new = chance.choice(
            [
                0,
                1,
                length - 1,
                length + 1,
                1 << 31,
                1 << 63,
                (1 << 64) - 1,
                len(content),
                len(content) - 8,
            ]
        )
        path.write_bytes(struct.pack("<Q", new) + content[8:])
        return f"header length {new}"
    value, said, raw = _change_tree(chance, json.loads(content[8 : 8 + length]))
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "[" * 100_000
        said = "nested"
    for name, new in raw.items():
        text = text.replace(name, new)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + content[8 + length :])
    return f"header: {said}"


def change_index_number(chance, path):
    content = bytearray(path.read_bytes())
    sequences, bounds = struct.unpack("<QQ", content[18:34])
    places = [(9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q")]
    places += [(34 + 4 * i, "<i") for i in range(sequences)] + [
        (34 + 4 * sequences + 8 * i, "<q") for i in range(sequences)
    ]
    places += [(34 + 12 * sequences + 8 * i, "<q") for i in range(bounds)]
    place, form = chance.choice(places[:4] if chance.random() < 0.4 else places)
    (old,) = struct.unpack_from(form, content, place)
    new = chance.choice(
        [0, 1, -1, old + 1, old - 1, 2**31 - 1, 2**40, 2**62, 2**63, 6, 7, 99, chance.randrange(20)]
    )
    bits = struct.calcsize(form) * 8
    content[place : place + bits // 8] = (new % (1 << bits)).to_bytes(bits // 8, "little")
    path.write_bytes(content)
    return f"number at {place}: {old} -> {new}"


def _changed_pickle(chance, payload):
    if chance.random() < 0.15:
        return chance.choice(BOMBS), "a bomb"
    try:
        places = [place for _, _, place in pickletools.genops(payload)]
    except ValueError:
        places = list(range(len(payload)))
    start = chance.randrange(len(places) - 1)
    one = places[start]
    end = places[min(len(places) - 1, start + chance.choice([1, 1, 2, 5]))]
    kind = chance.choice(["drop", "again", "opcode", "argument", "swap"])
    if kind == "drop":
        return payload[:one] + payload[end:], f"opcodes {start} dropped"
    if kind == "again":
        return payload[:end] + payload[one:], f"opcodes {start} again"
    if kind == "opcode":
        return payload[:one] + bytes(
            [chance.choice(pickletools.opcodes).code.encode("latin-1")[0]]
        ) + payload[one + 1 :], f"opcode {start} replaced"
    if kind == "argument" and end - one > 1:
        place = chance.randrange(one + 1, end)
        return payload[:place] + chance.choice([b"\0", b"\xff", b"\x01", b"\x7f"]) + payload[
            place + 1 :
        ], f"argument of opcode {start}"
    other = places[chance.randrange(len(places) - 1)]
    return payload[:one] + payload[other:end] + payload[one:], f"opcodes {start} and others swapped"


def change_pickle(chance, path):
    content, said = _changed_pickle(chance, path.read_bytes())
    path.write_bytes(content)
    return said


def change_zip(chance, path):
    """Change a torch file, or many after each other (then the first): its pickle, its members, or
    its table."""
    content = path.read_bytes()
    end = content.find(b"PK\x05\x06") + 22
    first = content[:end]
    rest = content[end:]
    kind = chance.choice(["pickle", "pickle", "compress", "twice", "table", "missing", "order"])
    if kind == "table":
        changed = bytearray(first)
        place = chance.randrange(first.find(b"PK\x01\x02"), end)
        changed[place] = chance.choice([0, 1, 0x7F, 0xFF])
        path.write_bytes(bytes(changed) + rest)
        return f"zip table byte {place}"
    members = []
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    said = kind
    if kind == "pickle":
        place = next(i for i, (name, _) in enumerate(members) if name.endswith(".pkl"))
        changed, said = _changed_pickle(chance, members[place][1])
        members[place] = (members[place][0], changed)
    elif kind == "twice":
        members.append(chance.choice(members))
    elif kind == "missing":
        del members[chance.randrange(len(members))]
    elif kind == "order":
        chance.shuffle(members)
    target = io.BytesIO()
    with zipfile.ZipFile(
        target, "w", zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED
    ) as archive:
        for name, body in members:
            archive.writestr(name, body)
    made = target.getvalue()
    if rest and len(made) <= len(first):
        # keep the places of what follows
        made = made[: made.rfind(b"PK\x05\x06") + 22] + b"\0" * (len(first) - len(made))
    path.write_bytes(made + rest)
    return f"zip: {said}"


BYTES = (
    truncate,
    flip_bits,
    flip_early_bits,
    insert_bytes,
    drop_bytes,
    overwrite_bytes,
    append_bytes,
)
ANY = (*BYTES, replace_by_odd_thing, replace_by_odd_thing)
