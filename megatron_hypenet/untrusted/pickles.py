"""Read a pickle without unpickling it: its opcodes build inert values, so nothing in it is
imported, called or hashed.

Python's unpickler calls what the pickle names, and hashes the keys of its dictionaries: a key that
is a pair of pairs of pairs, sixty deep, takes 250 bytes and 2**60 steps. Here a call becomes a
`Record` and a dictionary a list of pairs, which the reader then checks as it checks parsed JSON.
The opcodes are those that a pickler writes for data classes, containers, text and numbers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.untrusted.files import FileKind, reason_of, shown

MAX_OPCODES = 3_000_000
"""Largest accepted number of opcodes: some seconds of work, and 30,000 pieces of tensors in the
index of a sharded checkpoint."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or object that a pickle names; it was not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """An object that a pickle asks for by a call; nothing was called."""

    what: Global
    args: tuple[Any, ...]
    state: Any = None
    """The state that would fill the object: usually `Pairs` of attribute names and values."""


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary, as its keys and values in order. A key may be any value, hashable or not, and
    may occur twice."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Collection:
    """A set, as its members in order."""

    items: list[Any] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Stored:
    """An object that a pickle refers to by a persistent id: the storage of a tensor, in torch's
    files."""

    key: Any


class Damaged(ValueError):
    """The opcodes do not make a value."""


def read_pickle(
    kind: FileKind,
    path: Path,
    payload: bytes,
    *,
    allows: Callable[[Global], bool],
    allows_call: Callable[[Global, tuple[Any, ...]], bool],
    forbidden: str,
) -> Any:
    """Return the value that the pickle `payload`, which came from `path`, describes, with Record,
    Pairs, Global and Stored inside.

    A global that `allows` refuses, and a call that `allows_call` refuses, end in `kind`'s error
    with the reason "refers to MODULE.NAME, `forbidden`". So do a pickle that is damaged and one of
    more than MAX_OPCODES opcodes.
    """
    machine = _Machine(allows, allows_call)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(payload)):
            if number >= MAX_OPCODES:
                kind.refuse(path, f"a pickle of more than {MAX_OPCODES:,} opcodes, the limit")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Damaged(f"the opcode {opcode.name} has no place in such a file")
            step(machine, argument)
        if len(machine.stack) != 1 or machine.outer:
            raise Damaged("it ends with several values, with none, or inside of one")
    except Forbidden as error:
        kind.refuse(path, f"refers to {shown(str(error))}, {forbidden}")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        kind.refuse(
            path, f"the pickle in it is damaged: {type(error).__name__}: {shown(reason_of(error))}"
        )
    return machine.stack[0]


class Forbidden(Exception):  # noqa: N818 - caught in this file
    """The pickle refers to something that its reader does not allow."""


class _Machine:
    """The pickler's stack machine over inert values. `outer` are the stacks below the open
    marks."""

    __slots__ = ("allows", "allows_call", "memo", "outer", "stack")

    def __init__(
        self,
        allows: Callable[[Global], bool],
        allows_call: Callable[[Global, tuple[Any, ...]], bool],
    ) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.allows = allows
        self.allows_call = allows_call

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.outer.pop()
        return found

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise Damaged("a tuple of more values than there are")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def text(self, value: str) -> None:
        if not value.isascii():
            value.encode("utf-8")  # ValueError for half a surrogate pair
        self.stack.append(value)

    def global_named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("a global whose name is no text")
        found = Global(module, name)
        if not self.allows(found):
            raise Forbidden(str(found))
        self.stack.append(found)

    def call(self, _: Any) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, Global) or not isinstance(args, tuple):
            raise Damaged("a call of what is no global, or without a tuple of arguments")
        if not self.allows_call(what, args):
            raise Forbidden(f"{what}({', '.join(map(_short, args[:4]))})")
        self.stack.append(Record(what, args))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Record) or target.state is not None:
            raise Damaged("a state for what is no object, or for one that has a state")
        target.state = state

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise Damaged("items for what is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        # an OrderedDict is a call that is filled like a dictionary; no reader uses one, so its
        # content is dropped
        if not isinstance(target, Pairs | Record) or len(values) % 2:
            raise Damaged("keys and values for what is no dictionary")
        if isinstance(target, Pairs):
            target.items.extend(zip(values[::2], values[1::2], strict=True))

    def add_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Collection):
            raise Damaged("members for what is no set")
        target.items.extend(values)

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]


def _short(value: Any) -> str:
    """Return a value as a few characters, without looking into containers."""
    if isinstance(value, str | Global):
        return repr(value) if isinstance(value, str) else str(value)
    return type(value).__name__


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.global_named(module, name)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _nothing(machine: _Machine, argument: Any) -> None:
    pass


_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    **dict.fromkeys(_TEXTS, _Machine.text),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])
    ),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push(Pairs()),
    "EMPTY_SET": lambda machine, _: machine.push(Collection()),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.add_items(machine.since_mark()),
    "GLOBAL": lambda machine, name: machine.global_named(*name.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(Stored(machine.stack.pop())),
}
"""What each accepted opcode does; pickletools describes them."""
