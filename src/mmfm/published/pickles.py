"""Reading pickles of fitted mixtures without unpickling: nothing that a file names is imported or called.

A small machine executes the opcodes that ``pickle.dump`` writes for scikit-learn's mixtures, NumPy arrays, containers
and plain values, and refuses all others. Large arrays stay in the file and are mapped when they are read: the published
spatial mixture takes 13 GB in float64.

Source of the opcodes: the documentation of ``pickletools`` in Python's standard library.
"""

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmfm.published.arrays import Extent, StoredArray

_IN_FILE = 1 << 16
"""Byte strings above this many bytes stay in the file."""

_MOST_STEPS = 200_000
"""Opcodes of a file; a mixture with its labels and lists has some thousands. Values then can't outgrow memory."""

_LARGEST_KEY = 1 << 31

_DTYPES = frozenset(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])
_REMEDY = "it is not a mixture of scikit-learn, or damaged; fetch it again, or give another"


@dataclass
class Estimator:
    """An object of scikit-learn: the attributes that it was saved with."""

    attributes: dict[str, Any] = field(default_factory=dict)


class Refused(ValueError):
    """A pickle holds what no mixture does."""


def load(path: Path) -> Any:
    """Return what a pickle holds: containers, plain values, :class:`StoredArray` and :class:`Estimator`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a pickle, is damaged, or names anything else; the message is one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'; fetch it, or give another")
    try:
        with path.open("rb") as file:
            return _Machine(path, file).run()
    except Refused as error:
        raise ValueError(f"'{path}' {error}: {_REMEDY}") from None
    except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
        # What the opcodes do to a wrong stack: a damaged file can do anything, but only to values of its own.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"'{path}' can't be read ({type(error).__name__}: {reason}): {_REMEDY}") from None


@dataclass
class _DType:
    """A dtype that is being built."""

    code: str


@dataclass(frozen=True)
class _Named:
    """Something that a pickle names, and what stands in for it.

    Attributes:
        name: as in the file.
        call: of the arguments, in place of a call.
        new: of the arguments, in place of making an object of this class; None for what is not a class.
    """

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


def _short(value: Any) -> str:
    """Describe a value for a message. (The text of nested tuples can be endless.)"""
    return repr(value[:60]) if type(value) is str else type(value).__name__


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _shape(value: Any) -> tuple[int, ...]:
    value = (value,) if type(value) is int else value
    if type(value) is not tuple or len(value) > 8 or not all(type(n) is int and n >= 0 for n in value):
        raise Refused(f"has an array of the shape {_short(value)}")
    return value


def _dtype(code: Any, *_: Any) -> _DType:
    if type(code) is not str or code.lstrip("<|=") not in _DTYPES:
        raise Refused(f"has an array of the type {_short(code)}, which is not a plain number")
    return _DType(code.lstrip("<|="))


def _filled(array: StoredArray, shape: Any, dtype: Any, fortran: bool, content: Any) -> StoredArray:
    """Give an array its contents, which must be as many bytes as its shape says."""
    if type(dtype) is not _DType or type(content) not in (bytes, Extent):
        raise Refused("has an array without plain contents")
    kind, sizes = np.dtype(f"<{dtype.code}"), _shape(shape)
    if _size(kind, sizes) != len(content):
        raise Refused(f"has an array of the shape {sizes} with {len(content):,} bytes, not {_size(kind, sizes):,}")
    array.shape, array.dtype, array.fortran, array.content = sizes, kind, fortran, content
    return array


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    if order not in ("C", "F"):
        raise Refused("has an array without an order of its axes")
    return _filled(StoredArray(), shape, dtype, order == "F", content)


def _scalar(dtype: Any, content: Any) -> Any:
    array = _filled(StoredArray(), (), dtype, False, content)
    return array.load().item()


def _encoded(text: Any, codec: Any) -> bytes:
    if type(text) is not str or codec != "latin1":
        raise Refused("encodes something other than bytes")
    return text.encode("latin1")


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise Refused("fills a dictionary in an unusual way")
    return {}


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise Refused("makes a byte string in an unusual way")
    return b""


def _admitted() -> Iterator[tuple[tuple[str, str], _Named]]:
    for core in ("numpy.core", "numpy._core"):
        yield (f"{core}.multiarray", "_reconstruct"), _Named("_reconstruct", call=lambda *_: StoredArray())
        yield (f"{core}.multiarray", "scalar"), _Named("scalar", call=_scalar)
        yield (f"{core}.numeric", "_frombuffer"), _Named("_frombuffer", call=_from_buffer)
    yield ("numpy", "ndarray"), _Named("ndarray")
    yield ("numpy", "dtype"), _Named("dtype", call=_dtype)
    for module in ("sklearn.mixture._gaussian_mixture", "sklearn.mixture.gaussian_mixture"):
        yield (module, "GaussianMixture"), _Named("GaussianMixture", new=Estimator)
    for module in ("builtins", "__builtin__"):
        yield (module, "object"), _Named("object")
        yield (module, "bytes"), _Named("bytes", call=_no_bytes)
    yield ("copyreg", "_reconstructor"), _Named("_reconstructor", call=_reconstructed)
    yield ("copy_reg", "_reconstructor"), _Named("_reconstructor", call=_reconstructed)
    # What metadata may hold besides plain values; nobody asks for it.
    for module, name in (("datetime", "datetime"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")):
        yield (module, name), _Named(name, call=lambda *_: None)
    yield ("_codecs", "encode"), _Named("encode", call=_encoded)
    yield ("collections", "OrderedDict"), _Named("OrderedDict", call=_empty_dict)


def _reconstructed(kind: Any, *_: Any) -> Any:
    if type(kind) is not _Named or kind.new is None:
        raise Refused("builds an object of an unknown class")
    return kind.new()


_ADMITTED: Mapping[tuple[str, str], _Named] = dict(_admitted())

_MARK = object()


class _Machine:
    """Executes the opcodes of one file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def run(self) -> Any:
        """Return the value at the end."""
        for _ in range(_MOST_STEPS):
            code = self.read(1)
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                known = _OPCODES.get(code)
                raise Refused(
                    f"has the opcode {known}" if known else f"has the byte {code!r} where an opcode should be"
                )
            step(self)
        raise Refused(f"has more than {_MOST_STEPS:,} opcodes")

    # Bytes

    def read(self, count: int) -> bytes:
        """Return the next bytes of the file."""
        if count > self.size - self.file.tell():
            raise Refused(f"ends too early, at byte {self.size:,}")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        """Return the next number, of a type of the module struct."""
        return struct.unpack(f"<{kind}", self.read(struct.calcsize(kind)))[0]

    def line(self) -> str:
        """Return the text up to the next line end."""
        return self.file.readline(1000).rstrip(b"\n").decode("ascii")

    def take(self, count: int) -> bytes | Extent:
        """Return the next bytes, or where they are in the file if they are many."""
        if count <= _IN_FILE:
            return self.read(count)
        offset = self.file.tell()
        if count > self.size - offset:
            raise Refused(f"ends too early, at byte {self.size:,}")
        self.file.seek(count, io.SEEK_CUR)
        return Extent(self.path, offset, count)

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("takes a value from an empty list")
        return value

    def top(self, kind: type) -> Any:
        """Return the last value, which must be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise Refused(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def items(self) -> list[Any]:
        """Return the values after the last mark, and remove them and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)][::-1]
        self.push(tuple(values))

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys are not needed, nested tuples can take forever to hash, and large numbers can share one hash.
            if key is not None and type(key) is not str and not (type(key) is int and abs(key) < _LARGEST_KEY):
                raise Refused(f"has a {type(key).__name__} as a key")
            target[key] = value

    # Objects

    def name(self, module: Any, name: Any) -> None:
        """Push what stands in for a name, which must be admitted."""
        found = _ADMITTED.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            raise Refused(f"names {_short(module)} {_short(name)}")
        self.push(found)

    def call(self) -> None:
        """Call a stand-in."""
        arguments, named = self.pop(), self.pop()
        if type(named) is not _Named or named.call is None or type(arguments) is not tuple:
            raise Refused("calls something that is not a function")
        made = named.call(*arguments)
        self.made += len(made) if type(made) is bytes else 0
        if self.made > self.size:  # the same text can be encoded again and again
            raise Refused("makes more bytes than it holds")
        self.push(made)

    def make(self) -> None:
        """Make an object of a stand-in's class."""
        arguments, named = self.pop(), self.pop()
        if type(named) is not _Named or named.new is None or arguments != ():
            raise Refused("makes an object of an unknown class")
        self.push(named.new())

    def build(self) -> None:
        """Give the last value its state."""
        state = self.pop()
        built = self.stack[-1]
        if type(built) is Estimator and type(state) is dict:
            built.attributes = state
        elif type(built) is StoredArray and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, content = state
            if type(fortran) not in (bool, int):
                raise Refused("has an array without an order of its axes")
            _filled(built, shape, dtype, bool(fortran), content)
        elif type(built) is _DType and type(state) is tuple and len(state) >= 2:
            if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
                raise Refused("has an array of a type that is not a plain little-endian number")
        else:
            raise Refused(f"gives a {type(built).__name__} a state")


def _memoise(machine: _Machine, number: int) -> None:
    if number < 0 or machine.stack[-1] is _MARK:
        raise Refused("remembers something that is not a value")
    machine.memo[number] = machine.stack[-1]


def _long(content: bytes | Extent) -> int:
    if isinstance(content, Extent):
        raise Refused("has a number of too many digits")
    return int.from_bytes(content, "little", signed=True)


def _text(content: bytes | Extent) -> str:
    if isinstance(content, Extent):
        raise Refused("has a text of too many letters, as large arrays are in protocol 2 (write it with protocol 4)")
    return content.decode("utf-8", "surrogatepass")


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.read(1),  # PROTO
    b"\x95": lambda m: m.read(8),  # FRAME
    b"(": lambda m: m.push(_MARK),  # MARK
    b"0": lambda m: m.pop(),  # POP
    b"1": lambda m: m.items(),  # POP_MARK
    b"N": lambda m: m.push(None),  # NONE
    b"\x88": lambda m: m.push(True),  # NEWTRUE
    b"\x89": lambda m: m.push(False),  # NEWFALSE
    b"J": lambda m: m.push(m.number("i")),  # BININT
    b"K": lambda m: m.push(m.number("B")),  # BININT1
    b"M": lambda m: m.push(m.number("H")),  # BININT2
    b"\x8a": lambda m: m.push(_long(m.take(m.number("B")))),  # LONG1
    b"\x8b": lambda m: m.push(_long(m.take(m.number("I")))),  # LONG4
    b"G": lambda m: m.push(struct.unpack(">d", m.read(8))[0]),  # BINFLOAT
    b"C": lambda m: m.push(m.take(m.number("B"))),  # SHORT_BINBYTES
    b"B": lambda m: m.push(m.take(m.number("I"))),  # BINBYTES
    b"\x8e": lambda m: m.push(m.take(m.number("Q"))),  # BINBYTES8
    b"\x96": lambda m: m.push(m.take(m.number("Q"))),  # BYTEARRAY8
    b"\x98": lambda m: m.stack[-1],  # READONLY_BUFFER
    b"\x8c": lambda m: m.push(_text(m.take(m.number("B")))),  # SHORT_BINUNICODE
    b"X": lambda m: m.push(_text(m.take(m.number("I")))),  # BINUNICODE
    b"\x8d": lambda m: m.push(_text(m.take(m.number("Q")))),  # BINUNICODE8
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b"l": lambda m: m.push(m.items()),  # LIST
    b"a": lambda m: m.extend([m.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.items()),  # APPENDS
    b")": lambda m: m.push(()),  # EMPTY_TUPLE
    b"t": lambda m: m.push(tuple(m.items())),  # TUPLE
    b"\x85": lambda m: m.tuple_of(1),  # TUPLE1
    b"\x86": lambda m: m.tuple_of(2),  # TUPLE2
    b"\x87": lambda m: m.tuple_of(3),  # TUPLE3
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
    b"u": lambda m: m.set_items(m.items()),  # SETITEMS
    b"\x94": lambda m: _memoise(m, len(m.memo)),  # MEMOIZE
    b"q": lambda m: _memoise(m, m.number("B")),  # BINPUT
    b"r": lambda m: _memoise(m, m.number("I")),  # LONG_BINPUT
    b"h": lambda m: m.push(m.memo[m.number("B")]),  # BINGET
    b"j": lambda m: m.push(m.memo[m.number("I")]),  # LONG_BINGET
    b"c": lambda m: m.name(m.line(), m.line()),  # GLOBAL
    b"\x93": lambda m: m.name(*[m.pop(), m.pop()][::-1]),  # STACK_GLOBAL
    b"R": lambda m: m.call(),  # REDUCE
    b"\x81": lambda m: m.make(),  # NEWOBJ
    b"b": lambda m: m.build(),  # BUILD
}
"""What each admitted opcode does."""

_OPCODES = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}
