"""Pickles as plain descriptions: nothing named in one is ever imported, called or built.

The instructions of a pickle are carried out on dicts, lists, tuples, numbers and texts alone. Where a pickle says
"call f with these arguments", the result is a `Record` that holds the name of f and the arguments. A name that is not
on the caller's list ends the reading. What it may cost is bounded too: instructions, keys and arguments are counted,
because a pickle of a few kilobytes can otherwise ask for any amount of time or memory.

This is narrower than `torch.load(weights_only=True)`, which does call what is on its list: `bytearray(10**11)` is.
Instructions: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Container
from typing import Any

from lcsc.bank.shard_index import shown

#: calls whose result is filled by later instructions and is a plain dict here
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
#: integers from here on can share one hash, so that a dict of them takes quadratic time
_MAX_KEY = (1 << 61) - 1
_MAX_ARGUMENTS = 16
_SCALARS = (str, int, float, bool, type(None))


class Refused(ValueError):
    """A pickle that is not read; the message is the part of the sentence that says why."""


class Global:
    """A name that a pickle mentions, such as `torch.float32`; never imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """What a pickle wanted to call or build: its name, arguments and, if set afterwards, state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


def counts(value: Any) -> tuple[int, ...]:
    """A shape, stride or offset: a short tuple or `torch.Size` of numbers from 0 to 2^63.

    Raises:
        Refused: it is something else.
    """
    if value.__class__ is Record and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if value.__class__ not in (tuple, list) or len(value) > 64:
        raise Refused("holds a tensor whose shape is not a short tuple")
    if any(n.__class__ is not int or n < 0 or n >= 1 << 63 for n in value):
        raise Refused(f"holds a tensor with the shape or stride {shown(value)}")
    return tuple(value)


def read_pickle(data: bytes, allowed: Container[str], budget: int) -> tuple[Any, int]:
    """The object of a pickle (protocols 2 to 5, or 0 and 1 where they are binary) and the instructions it took.

    Args:
        data: the pickle; strings in it become at most four times as large in memory.
        allowed: full names (`collections.OrderedDict`) that it may mention.
        budget: most instructions to carry out.

    Returns:
        Nested dict, list, tuple, str, bytes, int, float, bool, None, `Global` and `Record`. Parts may be shared, and a
        list or dict may hold itself.

    Raises:
        Refused: a name that is not allowed, an instruction that no checkpoint needs, damage, or the budget.
    """
    machine = _Machine(data, allowed)
    try:
        return machine.run(budget), machine.count
    except (IndexError, KeyError, struct.error, TypeError, UnicodeError, AttributeError):
        raise Refused(f"is damaged near byte {machine.pos} of its pickle") from None


class _Machine:
    """Stack, marks and memo of a pickle being read."""

    def __init__(self, data: bytes, allowed: Container[str]) -> None:
        self.data = data
        self.pos = 0
        self.allowed = allowed
        self.globals: dict[str, Global] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.count = 0

    def run(self, budget: int) -> Any:
        data, operations = self.data, _OPERATIONS
        for count in range(1, budget + 1):
            code = data[self.pos]
            self.pos += 1
            if code == 0x2E:  # STOP
                self.count = count
                return self.stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise Refused(f"uses the pickle instruction `{_NAMES.get(code, code)}`, which no checkpoint needs")
            operation(self)
        raise Refused(f"takes more than {budget} pickle instructions, more than its tensors can need")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.pos + size
        if size < 0 or end > len(self.data):
            raise IndexError
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def line(self) -> str:
        """The text up to the next line feed."""
        end = self.data.index(b"\n", self.pos, self.pos + 1000)
        part = self.data[self.pos : end].decode()
        self.pos = end + 1
        return part

    def push_global(self, module: str, name: str) -> None:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in self.allowed:
            raise Refused(f"names the global `{shown(full)}`, which is not on the list of harmless ones")
        found = self.globals.get(full)
        if found is None:
            found = self.globals[full] = Global(full)
        self.stack.append(found)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _proto(m: _Machine) -> None:
    if m.take(1)[0] > 5:
        raise Refused("has a pickle protocol that is not known")


def _frame(m: _Machine) -> None:
    m.take(8)  # how much may be read at once; all of it is in memory already


def _fixed(size: int, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """Push a number of `size` bytes."""

    def operation(m: _Machine) -> None:
        m.stack.append(convert(m.take(size)))

    return operation


def _sized(width: int, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """Push what is made of the bytes that follow their own count, a number of `width` bytes."""

    def operation(m: _Machine) -> None:
        m.stack.append(convert(m.take(int.from_bytes(m.take(width), "little"))))

    return operation


def _text(part: bytes) -> str:
    return part.decode("utf-8", "surrogatepass")


def _old_text(part: bytes) -> str:
    return part.decode("latin-1")


def _constant(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        m.stack.append(make())

    return operation


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        if len(m.stack) < count:
            raise IndexError
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return operation


def _tuple(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _list_on(m).append(item)


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    _list_on(m).extend(items)


def _list_on(m: _Machine) -> list[Any]:
    if m.stack[-1].__class__ is not list:
        raise Refused("appends to something that is not a list")
    return m.stack[-1]


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_all(m, [key, value])


def _set_items(m: _Machine) -> None:
    _set_all(m, m.pop_mark())


def _set_all(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if target.__class__ is not dict or len(items) % 2:
        raise Refused("sets items of something that is not a dict")
    for i in range(0, len(items), 2):
        key = items[i]
        if key.__class__ is not str:
            _check_key(key)
        target[key] = items[i + 1]


def _check_key(key: Any) -> None:
    """Refuse keys whose hash is costly or can be forged: a nested tuple, a huge integer."""
    parts = key if key.__class__ is tuple and len(key) <= _MAX_ARGUMENTS else (key,)
    for part in parts:
        plain = part.__class__ in _SCALARS or part.__class__ is Record
        if not plain or (part.__class__ is int and abs(part) >= _MAX_KEY):
            raise Refused("has a dict with keys that are neither texts nor plain numbers")


def _memo_put(width: int) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        m.memo[int.from_bytes(m.take(width), "little")] = m.stack[-1]

    return operation


def _memo_get(width: int) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        m.stack.append(m.memo[int.from_bytes(m.take(width), "little")])

    return operation


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _global(m: _Machine) -> None:
    try:
        module, name = m.line(), m.line()
    except ValueError:
        raise IndexError from None
    m.push_global(module, name)


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if name.__class__ is not str or module.__class__ is not str:
        raise Refused("names a global by something that is not a text")
    m.push_global(module[:1000], name[:1000])


def _call(m: _Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    if function.__class__ is not Global or args.__class__ is not tuple or len(args) > _MAX_ARGUMENTS:
        raise Refused("calls something that is not a name, or with too many arguments")
    m.stack.append({} if function.name in _DICTS else Record(function.name, args))


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if target.__class__ is Record:
        target.state = state
    elif target.__class__ is not dict:  # of a dict: attributes of an OrderedDict, such as versions of modules
        raise Refused("sets the state of something that has none")


def _persistent(m: _Machine) -> None:
    m.stack.append(Record("persistent", (m.stack.pop(),)))


def _signed(part: bytes) -> int:
    return int.from_bytes(part, "little", signed=True)


def _unsigned(part: bytes) -> int:
    return int.from_bytes(part, "little")


_BY_NAME: dict[str, Callable[[_Machine], None]] = {
    "PROTO": _proto,
    "FRAME": _frame,
    "MARK": _mark,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "BININT": _fixed(4, _signed),
    "BININT1": _fixed(1, _unsigned),
    "BININT2": _fixed(2, _unsigned),
    "BINFLOAT": _fixed(8, lambda part: struct.unpack(">d", part)[0]),
    "LONG1": _sized(1, _signed),
    "BINUNICODE": _sized(4, _text),
    "SHORT_BINUNICODE": _sized(1, _text),
    "BINUNICODE8": _sized(8, _text),
    "SHORT_BINSTRING": _sized(1, _old_text),
    "BINSTRING": _sized(4, _old_text),
    "BINBYTES": _sized(4, bytes),
    "SHORT_BINBYTES": _sized(1, bytes),
    "BINBYTES8": _sized(8, bytes),
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "BINPUT": _memo_put(1),
    "LONG_BINPUT": _memo_put(4),
    "MEMOIZE": _memoize,
    "BINGET": _memo_get(1),
    "LONG_BINGET": _memo_get(4),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
_NAMES = {
    code[0]: name
    for name in pickle.__all__
    if name.isupper() and isinstance(code := getattr(pickle, name), bytes) and len(code) == 1
}
_OPERATIONS = {getattr(pickle, name)[0]: operation for name, operation in _BY_NAME.items()}
