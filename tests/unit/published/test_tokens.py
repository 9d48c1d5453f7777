"""Published tokens: the blocks are those of the array, and files that hold anything else are refused."""

import io
import random
import time
import zipfile

import numpy as np
import pytest

from mmfm.data.tokens import TokenStore
from mmfm.published.tokens import UNORDERED, import_tokens, token_blocks, token_shape
from mmfm.stages import provenance
from support.mutation import mutated

TOKENS = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)


def published(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def refused(path, message):
    for call in (token_shape, lambda path: list(token_blocks(path, 8))):
        with pytest.raises(ValueError, match=message) as error:
            call(path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1 and ";" in str(error.value)


@pytest.mark.parametrize("save", [np.savez_compressed, np.savez])
@pytest.mark.parametrize("rows", [1, 32, 50, 100, 1000])
def test_blocks(tmp_path, rows, save):
    path = tmp_path / "cls_tokens.npz"
    save(path, cls_tokens=TOKENS, another=np.ones(3))
    blocks = list(token_blocks(path, rows))
    assert token_shape(path) == (100, 7)
    assert [len(block) for block in blocks] == [min(rows, 100 - start) for start in range(0, 100, rows)]
    assert all(block.dtype == np.float32 for block in blocks) and np.array_equal(np.concatenate(blocks), TOKENS)


def test_only_what_is_asked_for_is_decompressed(tmp_path, monkeypatch):
    path, read = published(tmp_path / "cls_tokens.npz", cls_tokens=np.zeros((10_000, 700), np.float32)), []
    plain = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda member, n=-1: read.append(n) or plain(member, n))
    next(token_blocks(path, 10))
    assert sum(read) < 30_000 and min(read) > 0


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*; fetch it"):
        token_shape(tmp_path / "cls_tokens.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (TOKENS.astype(object), "are Python objects, not"),
        (TOKENS.astype(np.float64), "are 2 axes of dtype \"'<f8'\", not"),
        (TOKENS[0], "are 1 axes of dtype"),
        (TOKENS[None], "are 3 axes of dtype"),
        (np.asfortranarray(TOKENS), "by columns"),
        (TOKENS[:0], "are 2 axes"),
        (np.zeros(3, [("a", "f4"), ("b", "O")]), "are Python objects"),
    ],
)
def test_arrays_that_are_no_tokens(tmp_path, array, message):
    refused(published(tmp_path / "cls_tokens.npz", cls_tokens=array), message)


def test_no_such_array(tmp_path):
    refused(published(tmp_path / "cls_tokens.npz", arr_0=TOKENS), "has no array cls_tokens; give the cls_tokens.npz")


def member(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls_tokens.npy", content)
    return path


def header(text, version=b"\x01\x00"):
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated; fetch"),
        (b"\x93NUMPY\x01\x00\xff", "is truncated; fetch"),
        (b"x" * 99, "is not an array of NumPy"),
        (header(b"", b"\x09\x00"), "is not an array of NumPy"),
        (header(b"__import__('os').system('x')\n"), "damaged header"),
        (header(b"-" * 9000), "damaged header"),
        (header(b"(" * 9000), "damaged header"),
        (
            header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 99), }\n"),
            "take 396,000,000,000,000 bytes, it has 0",
        ),
    ],
)
def test_headers_are_not_evaluated(tmp_path, content, message):
    refused(member(tmp_path / "cls_tokens.npz", content), message)


def test_truncated_and_damaged_archives(tmp_path):
    whole = published(tmp_path / "whole.npz", cls_tokens=TOKENS).read_bytes()
    path = tmp_path / "cls_tokens.npz"
    for length in range(0, len(whole), 64):
        path.write_bytes(whole[:length])
        refused(path, r"is truncated or damaged \(.*\); fetch it again")
    for place in (200, 1000, 2000):  # a flipped bit of the compressed tokens: found at the latest by the checksum
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"is truncated or damaged \(.*\); fetch it again"):
            list(token_blocks(path, 8))


def test_mutated_archives(tmp_path):
    generator, buffer, path = random.Random(0), io.BytesIO(), tmp_path / "cls_tokens.npz"
    np.savez_compressed(buffer, cls_tokens=TOKENS[:20])
    whole, counts = buffer.getvalue(), {"read": 0, "refused": 0}
    begin = time.process_time()
    for _ in range(300):
        path.write_bytes(mutated(whole, generator))
        try:
            list(token_blocks(path, 8))
            counts["read"] += 1
        except ValueError as error:
            counts["refused"] += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
    assert min(counts.values()) > 3, counts
    assert time.process_time() - begin < 30


def test_imported_tokens_feed_a_fit_and_nothing_that_takes_a_row_for_an_image(tmp_path):
    source = published(tmp_path / "cls_tokens.npz", cls_tokens=TOKENS)
    assert import_tokens(source, tmp_path / "tokens.zarr") == (100, 7)
    opened = TokenStore.open(tmp_path / "tokens.zarr")
    assert np.array_equal(opened.read(0, 100), TOKENS) and opened.listing_digest == UNORDERED
    listing = provenance.Input("listing", "listing", tmp_path / "listing", "a" * 64)
    with pytest.raises(ValueError, match="another listing"):
        provenance.belong_together(provenance.tokens(opened), listing)


def test_a_damaged_file_leaves_nothing_behind(tmp_path):
    source = published(tmp_path / "cls_tokens.npz", cls_tokens=TOKENS)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(ValueError, match="fetch it again"):
        import_tokens(source, tmp_path / "tokens.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["cls_tokens.npz"]
