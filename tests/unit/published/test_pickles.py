"""The reader of pickles: what it reads as pickle does, and that nothing else in a file is imported or called."""

import os
import pickle
import random
import struct
import sys
import time
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from mmfm.published import pickles
from mmfm.published.arrays import Extent, StoredArray
from mmfm.published.pickles import Estimator
from support import published_folder as tiny
from support.mutation import mutated


def plain(value):
    """Return a value that was read, with arrays loaded."""
    if isinstance(value, StoredArray):
        return value.load()
    if isinstance(value, Estimator):
        return plain(value.attributes)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def read(tmp_path: Path, content: bytes):
    (tmp_path / "file.pkl").write_bytes(content)
    return pickles.load(tmp_path / "file.pkl")


def refusal(tmp_path: Path, content: bytes) -> str:
    """Return the one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "file.pkl") in message and "fetch it again" in message
    return message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_published_mixture_is_read_as_pickle_reads_it(tmp_path, protocol):
    fitted, spatial = tiny.mixtures()
    for content in (tiny.cls_pickle(fitted), spatial):
        found = read(tmp_path, pickle.dumps(content, protocol=protocol))
        assert list(found) == list(content)
        attributes = found["model"].attributes
        for name in ("weights_", "means_", "covariances_"):
            array = attributes[name].load()
            assert array.dtype == content["model"].__dict__[name].dtype
            assert np.array_equal(array, content["model"].__dict__[name])
        assert plain(found["config"]) == content["config"] and plain(found["metadata"]) == content["metadata"]
    assert found["means"] is found["model"].attributes["means_"]  # an array is there once


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [3, 3000], ids=["in memory", "in the file"])
def test_arrays_of_any_number_type_and_order(tmp_path, protocol, order, rows):
    for code in ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "b1"):
        array = np.asarray(np.arange(rows * 8).reshape(rows, 8) % 7, dtype=code, order=order)
        content = pickle.dumps(array, protocol=protocol)
        if protocol == 2 and array.nbytes > 65536:  # as text, twice as long
            assert "write it with protocol 4" in refusal(tmp_path, content)
            continue
        found = read(tmp_path, content)
        assert found.dtype == array.dtype and np.array_equal(found.load(), array)
        assert np.array_equal(found.rows(1, 3), array[1:3])
        assert isinstance(found.content, Extent) == (array.nbytes > 65536)
    assert read(tmp_path, pickle.dumps(np.zeros((0, 4)), protocol=protocol)).load().shape == (0, 4)


def test_old_and_new_names_of_modules(tmp_path):
    fitted, _ = tiny.mixtures()
    new = pickle.dumps(fitted, protocol=2)
    for module, other in ((b"numpy._core", b"numpy.core"), (b"mixture._gaussian_mixture", b"mixture.gaussian_mixture")):
        assert module in new
        old = new.replace(module, other)
        assert np.array_equal(read(tmp_path, old).attributes["means_"].load(), fitted.means_)


def test_plain_values(tmp_path):
    content = {
        "a": [1, -1, 300, 70_000, 2**40, -(2**70), 1.5, None, True, False, "text", "ü" * 300, b"bytes", ()],
        3: ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"nested": {}}),
        None: OrderedDict(b=np.float64(2.5), c=np.int64(7), d=np.bool_(True)),
    }
    for protocol in (2, 3, 4, 5):
        assert plain(read(tmp_path, pickle.dumps(content, protocol=protocol))) == content


class Reduced:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


TRACE = "import builtins; builtins.hostile = True"
CALLS = {
    "system": Reduced(os.system, ("touch hostile-was-here",)),
    "eval": Reduced(eval, ("__import__('os').mkdir('hostile-was-here')",)),
    "getattr": Reduced(getattr, ("text", "join")),
    "numpy": Reduced(np.load, ("x",)),
    "exec in a dictionary": {"model": {"weights": [Reduced(exec, (TRACE,))]}},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", CALLS)
def test_functions_are_refused_by_name_and_never_called(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    assert "names '" in refusal(tmp_path, pickle.dumps(CALLS[name], protocol=protocol))
    assert not (tmp_path / "hostile-was-here").exists() and not hasattr(__builtins__, "hostile")


def test_a_module_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "names 'hostile_module' 'f'" in refusal(tmp_path, b"\x80\x02chostile_module\nf\n.")
    assert "hostile_module" not in sys.modules


def test_a_state_that_is_hostile_inside_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted, _ = tiny.mixtures()
    fitted.means_ = CALLS["system"]
    assert "names 'posix' 'system'" in refusal(tmp_path, pickle.dumps({"model": fitted}))
    assert not (tmp_path / "hostile-was-here").exists()


def test_arrays_of_objects_and_of_structures_are_refused(tmp_path):
    for array in (np.array([{}, None], object), np.zeros(2, [("a", "f8")]), np.array(["text"]), np.zeros(2, ">f8")):
        assert "not a plain" in refusal(tmp_path, pickle.dumps(array)), array.dtype


GM = b"csklearn.mixture._gaussian_mixture\nGaussianMixture\n"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
F8 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNK\x00K\x00K\x00tb"


def array_of(shape: bytes, content: bytes) -> bytes:
    """Return the opcodes of an array of f8 with a shape and contents of one's own."""
    return b"\x80\x02" + ARRAY + b"(K\x01" + shape + F8 + b"\x89" + content + b"tb."


def test_the_opcodes_written_by_hand_are_an_array(tmp_path):
    assert read(tmp_path, array_of(b"K\x02\x85", b"C\x10" + bytes(16))).load().tolist() == [0.0, 0.0]


MANY, CYCLE = b"\x8a\x06" + (10**12).to_bytes(6, "little"), b"]q\x00h\x00a"
LIES = {
    "a shape that lies": (array_of(MANY + b"\x85", b"C\x08" + bytes(8)), "not 8,000"),
    "a negative shape": (array_of(b"J\xff\xff\xff\xff\x85", b"C\x08" + bytes(8)), "of the shape"),
    "a length that lies": (array_of(b"K\x02\x85", b"\x8e" + struct.pack("<Q", 2**60)), "ends too early"),
    "a short length that lies": (b"\x80\x04\x8c\xff123.", "ends too early"),
    "a number that lies": (b"\x80\x02\x8b" + struct.pack("<I", 2**31) + b".", "ends too early"),
    "a list in itself as contents": (array_of(b"K\x01\x85", CYCLE), "plain contents"),
    "a memo that is not there": (b"\x80\x02h\x07.", "KeyError"),
    "a mark in the memo": (b"\x80\x02(q\x00.", "remembers something"),
    "an extension": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "a persistent id": (b"\x80\x02K\x01Q.", "the opcode BINPERSID"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "the opcode INST"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
    "no opcode": (b"\x80\x02\xff.", "where an opcode should be"),
    "a state for a list": (b"\x80\x02]}b.", "gives a list a state"),
    "a state for a function": (b"\x80\x02cnumpy\ndtype\n}X\x04\x00\x00\x00callK\x01sb.", "gives a _Named a state"),
    "a call of a value": (b"\x80\x02K\x01)R.", "not a function"),
    "a class that is none": (b"\x80\x02cnumpy\ndtype\n)\x81.", "unknown class"),
    "arguments for a mixture": (b"\x80\x02" + GM + b"K\x01\x85\x81.", "unknown class"),
    "a name that is not text": (b"\x80\x04K\x01K\x02\x93.", "names int int"),
    "a tuple as a key": (b"\x80\x02}K\x01\x85K\x02s.", "a tuple as a key"),
    "appending to a dictionary": (b"\x80\x02}K\x01a.", "as if it were a list"),
    "an empty stack": (b"\x80\x020.", "IndexError"),
    "no end": (b"\x80\x02K\x01", "ends too early"),
    "nothing": (b"", "ends too early"),
    "text": (b"<!doctype html>", "where an opcode should be"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie_are_refused(tmp_path, name):
    content, said = LIES[name]
    start = time.monotonic()
    assert said in refusal(tmp_path, content)
    assert time.monotonic() - start < 20  # none may count to 10^12


def test_nested_tuples_take_no_time(tmp_path):
    """Each holds the one before twice: to print, compare or hash it would take 2^60 steps."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    bomb = b"\x80\x02)" + doubled
    assert isinstance(read(tmp_path, bomb + b"."), tuple)
    refusal(tmp_path, bomb + b"K\x01\x93.")
    refusal(tmp_path, b"\x80\x02}" + bomb[2:] + b"K\x01s.")
    refusal(tmp_path, b"\x80\x02cnumpy\ndtype\n" + bomb[2:] + b"\x85R.")
    refusal(tmp_path, b"\x80\x02" + ARRAY + b"(K\x01" + bomb[2:] + F8 + b"\x89C\x00tb.")


DICTIONARY = b"ccollections\nOrderedDict\n"
ENCODE = b"c_codecs\nencode\nq\x00X" + struct.pack("<I", 50_000) + b"a" * 50_000 + b"X\x06\x00\x00\x00latin1\x86q\x01R"
LARGE_KEY = b"\x8a\x08" + (2**61 - 1).to_bytes(8, "little")  # the numbers n (2^61 - 1) share one hash
BOMBS = {
    "keys of one hash": (b"\x80\x02}" + LARGE_KEY + b"Ns.", "a int as a key"),
    "a dictionary from pairs": (b"\x80\x02" + DICTIONARY + b"]K\x01K\x01\x86a\x85R.", "in an unusual way"),
    "a text encoded many times": (b"\x80\x02" + ENCODE + b"h\x00h\x01R" * 50 + b".", "more bytes than it holds"),
    "too many values": (b"\x80\x02" + b"]" * 300_000 + b".", "more than 200,000 opcodes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_would_take_much_are_refused(tmp_path, name):
    content, said = BOMBS[name]
    assert said in refusal(tmp_path, content)


def test_dates_and_paths_in_metadata_do_no_harm(tmp_path):
    content = {"a": datetime(2026, 1, 1), "b": Path("x/y"), "c": np.ones(3)}
    found = read(tmp_path, pickle.dumps(content))
    assert found["a"] is None and found["b"] is None and found["c"].load().tolist() == [1, 1, 1]


def test_truncated_files_are_refused(tmp_path):
    fitted, _ = tiny.mixtures()
    content = pickle.dumps(tiny.cls_pickle(fitted))
    for stop in range(0, len(content) - 1, 64):
        refusal(tmp_path, content[:stop])


def test_a_thousand_mutated_files_are_read_or_refused(tmp_path):
    fitted, spatial = tiny.mixtures(3)
    spatial["model"].means_ = spatial["means"] = np.ones((3, 16))
    sources = [pickle.dumps(value, protocol=p) for value in (tiny.cls_pickle(fitted), spatial) for p in (2, 4, 5)]
    rng, fine = random.Random(0), 0
    for number in range(1000):
        (tmp_path / "file.pkl").write_bytes(mutated(sources[number % len(sources)], rng))
        try:
            pickles.load(tmp_path / "file.pkl")
            fine += 1
        except ValueError as error:
            assert "\n" not in str(error)
    assert 20 < fine < 900  # a fuzz in which nothing or everything passes shows nothing
