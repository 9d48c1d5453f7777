"""The command ``heldout``: likelihoods of two sets of tokens, and sets that don't belong together."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.data import tokens
from mmfm.infra import store
from mmfm.mixture.gaussian import Mixture

RNG = np.random.default_rng(0)
TRAIN, HELDOUT = RNG.normal(size=(60, 3)).astype(np.float32), RNG.normal(1, 1, (40, 3)).astype(np.float32)


def write_tokens(path, rows, **about):
    tokens.create(path, len(rows), rows.shape[1], len(rows), np.zeros(len(rows)))[:] = rows
    tokens.finish(
        path, {"digest": path.stem, "listing_digest": path.stem, "encoder_digest": "e", "settings": {}, **about}
    )
    return path


def write_mixture(path, k, tokens_digest):
    mixture = Mixture(np.full(k, 1 / k), RNG.normal(size=(k, 3)), np.full((k, 3), 0.5))
    mixture.save(path, {"tokens_digest": tokens_digest})
    return path


@pytest.fixture
def files(tmp_path):
    train, held = write_tokens(tmp_path / "train.zarr", TRAIN), write_tokens(tmp_path / "held.zarr", HELDOUT)
    digest = tokens.TokenStore.open(train).digest
    return train, held, [write_mixture(tmp_path / f"{k}.safetensors", k, digest) for k in (4, 2)]


def run(train, held, mixtures, *more):
    return main(["heldout", "--gmm", *map(str, mixtures), "--train", str(train), "--heldout", str(held), *more])


def test_both_likelihoods_of_every_mixture(files, tmp_path, capsys):
    train, held, mixtures = files
    out = tmp_path / "heldout"
    assert run(train, held, mixtures, "--out-json", f"{out}.json", "--out-png", f"{out}.png") == 0
    rows = store.read_json(f"{out}.json")
    assert [row["n_components"] for row in rows] == [2, 4]
    for row, path in zip(rows, reversed(mixtures), strict=True):
        scores = [float(Mixture.load(path).score(part)) for part in map(torch.from_numpy, (TRAIN, HELDOUT))]
        assert [row["train"]["mean"], row["heldout"]["mean"]] == pytest.approx(scores, rel=1e-6)
        assert row["gap"] == pytest.approx(scores[0] - scores[1], rel=1e-5) and row["heldout"]["count"] == 40
        assert any("few" in line for line in row["warnings"])
    text = capsys.readouterr().out
    assert "WARNING (K = 4): 15 training images a mode are few" in text and f"{rows[0]['heldout']['mean']:.2f}" in text
    assert Image.open(f"{out}.png").size[0] > 300


def test_tokens_that_do_not_belong_together(files, tmp_path, capsys):
    train, held, mixtures = files
    other = write_tokens(tmp_path / "other.zarr", HELDOUT, encoder_digest="f")
    assert run(train, other, mixtures) == 2
    assert "extracted with another encoder than those in" in capsys.readouterr().err
    assert run(held, held, [write_mixture(tmp_path / "alien.safetensors", 2, "0" * 64)]) == 2
    assert "was made from another tokens" in capsys.readouterr().err
