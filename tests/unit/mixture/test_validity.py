"""Indices of the mixture's clusters against scikit-learn on all pairs."""

import threading

import numpy as np
import pytest
import torch
from sklearn import metrics

from mmfm import data
from mmfm.infra.distributed import Ranks
from mmfm.mixture import validity

N, C, K = 300, 6, 9
GENERATOR = np.random.default_rng(0)
# Component 4 has no image, 7 a single one; everything is far from the origin.
LABELS = np.append(GENERATOR.choice([0, 1, 2, 3, 5, 6, 8], N - 1), 7).astype(np.int32)
TOKENS = (50 + GENERATOR.normal(0, 2, (K, C))[LABELS] + GENERATOR.normal(size=(N, C))).astype(np.float32)
REFERENCES = torch.full((K, C), 49.0, dtype=torch.float64)


def chunks(size, rank=0, world=1):
    return [(part, torch.from_numpy(TOKENS[part.start : part.stop])) for part in data.ranges(0, N, size)[rank::world]]


def expected(tokens=TOKENS, labels=LABELS):
    tokens = tokens.astype(np.float64)
    return {
        "silhouette": metrics.silhouette_score(tokens, labels, metric="sqeuclidean"),
        "calinski_harabasz": metrics.calinski_harabasz_score(tokens, labels),
        "davies_bouldin": metrics.davies_bouldin_score(tokens, labels),
        "silhouette_images": len(labels),
    }


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("chunk", [37, 1000])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_they_are_scikit_learns(chunk, device, monkeypatch):
    monkeypatch.setattr(validity, "_PIECE", 11 * C)
    monkeypatch.setattr(validity, "_ROWS", 4)
    rows = [(part, x.to(device)) for part, x in chunks(chunk)]
    found = validity.indices(rows, LABELS, REFERENCES.to(device), 0, Ranks(0, 1, torch.device(device)))
    assert found == pytest.approx(expected(), rel=1e-9)


def test_a_sample_gives_the_mean_over_its_images(monkeypatch):
    monkeypatch.setattr(validity, "SILHOUETTE_IMAGES", 150)
    alone = Ranks(0, 1, torch.device("cpu"))
    found = [validity.indices(chunks(64), LABELS, REFERENCES, seed, alone) for seed in (0, 0, 1)]
    every = metrics.silhouette_samples(TOKENS.astype(np.float64), LABELS, metric="sqeuclidean")
    assert found[0] == found[1] and found[0]["silhouette"] != found[2]["silhouette"]
    assert found[0]["silhouette_images"] == 150
    assert found[0]["silhouette"] == pytest.approx(every.mean(), abs=4 * every.std() / 150**0.5)
    assert found[0]["davies_bouldin"] == found[2]["davies_bouldin"]


def test_processes_share_the_sums():
    barrier, box, results = threading.Barrier(2), {}, [None, None]

    class Two:
        device, world = torch.device("cpu"), 2

        def __init__(self, rank):
            self.rank = rank

        def sum(self, tensor):
            box[self.rank] = tensor.clone()
            barrier.wait(30)
            tensor.copy_(box[0] + box[1])
            barrier.wait(30)
            return tensor

    def run(rank):
        results[rank] = validity.indices(chunks(50, rank, 2), LABELS, REFERENCES, 0, Two(rank))

    other = threading.Thread(target=run, args=(1,))
    other.start()
    run(0)
    other.join()
    assert results[0] == results[1] == pytest.approx(expected(), rel=1e-9)


def test_there_is_no_separation_to_speak_of_in_one_component_or_in_single_images():
    alone = Ranks(0, 1, torch.device("cpu"))
    for labels, k in ((np.zeros(N, np.int32), 1), (np.arange(N, dtype=np.int32), N)):
        references = torch.full((k, C), 49.0, dtype=torch.float64)
        found = validity.indices(chunks(64), labels, references, 0, alone)
        assert set(found.values()) == {None, 0}


def test_duplicated_tokens_give_numbers():
    tokens = np.repeat(TOKENS[:4], 10, axis=0)
    labels = np.repeat(np.arange(4, dtype=np.int32), 10)
    rows = [(range(40), torch.from_numpy(tokens))]
    references = torch.from_numpy(tokens[::10]).double()
    found = validity.indices(rows, labels, references, 0, Ranks(0, 1, torch.device("cpu")))
    assert found == {"silhouette": 1.0, "silhouette_images": 40, "calinski_harabasz": 1.0, "davies_bouldin": 0.0}
    assert found == expected(tokens, labels)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_they_do_not_depend_on_the_unit(scale):
    rows = [(part, x * scale) for part, x in chunks(64)]
    found = validity.indices(rows, LABELS, REFERENCES * scale, 0, Ranks(0, 1, torch.device("cpu")))
    assert found == pytest.approx(expected(), rel=1e-5)
