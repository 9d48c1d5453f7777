"""A folder like the published one, of tiny shapes, made as the published scripts make theirs."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.models.dit import DiT, DiTConfig
from mmfm.published import layout
from support.places import DEMO

CHANNELS, GRID, MODES, SIZE = 16, 4, 6, 32
MODEL = {"hidden_size": [32, 32], "depth": [2, 1], "num_heads": [2, 2]}
GUIDE = {"hidden_size": [16, 32], "depth": [1, 1], "num_heads": [2, 2]}
HEADS = 2


def network(model: dict, seed: int = 0) -> DiT:
    """Return a model with weights that are not at their start, so that its output is not zero, and a label table."""
    torch.manual_seed(seed)
    made = DiT(DiTConfig(GRID, 1, CHANNELS, **model, num_classes=MODES, label_dropout=0.0))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "embedding_table" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return made.eval()


def checkpoint(model: DiT, setting: str, step: int = 100_000) -> dict:
    """Return what the published training saves: weights, their average, optimiser, and where they are from."""
    state = model.state_dict()
    name = {"gmm": "UNCONDITIONAL-GMM-8192-DIAG", "mode": "MODE-CONDITIONAL-GMM-8192-DIAG"}[setting]
    return {
        "model": {key: torch.zeros_like(value) for key, value in state.items()},
        "ema": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"last_epoch": 3},
        "train_steps": step,
        "epoch": 20,
        "config_path": f"configs/stage2/training/ImageNet256/DiTDH-XL_DINOv2-B-{name}.yaml",
        "training_cfg": {"epochs": 80, "global_batch_size": 1024},
        "cli_overrides": {},
    }


def decoder() -> Decoder:
    """Return a decoder with random weights."""
    torch.manual_seed(3)
    sizes = DecoderConfig(CHANNELS, 32, 64, HEADS, 2, SIZE // GRID, GRID**2)
    return Decoder(sizes, generator=torch.Generator().manual_seed(3)).eval()


def mixtures(k: int = MODES, seed: int = 0) -> tuple[GaussianMixture, dict]:
    """Return a CLS mixture fitted by scikit-learn, and a spatial mixture as the published script builds it."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([rng.normal(i, 0.5, (40, CHANNELS)) for i in range(k)]).astype(np.float32)
    fitted = GaussianMixture(k, covariance_type="diag", random_state=42).fit(tokens)
    shape = (CHANNELS, GRID, GRID)
    means = rng.normal(0, 0.6, (k, *shape))
    means -= np.einsum("k,kchw->chw", fitted.weights_, means)  # latents that are centred have mean 0
    means = (means + means[..., ::-1]) / 2
    spread = np.einsum("k,kchw->", fitted.weights_, means**2) / means[0].size
    variances = np.full(k, 1 - spread) * rng.uniform(0.9, 1.1, k)
    model = GaussianMixture(k, covariance_type="spherical")
    model.weights_, model.means_, model.covariances_ = fitted.weights_, means.reshape(k, -1), variances
    model.precisions_cholesky_ = 1 / np.sqrt(variances + 1e-8)
    model.converged_, model.n_iter_, model.lower_bound_ = True, 0, -np.inf
    spatial = {
        "model": model,
        "means": model.means_,
        "variances": variances,
        "weights": fitted.weights_,
        "cluster_counts": np.full(k, 80, np.int64),
        "config": {"n_components": k, "covariance_type": "spherical", "source_cls_gmm": "gmm.pkl"},
        "metadata": {"data_path": "imagenet", "num_samples": 40 * k, "spatial_dim": list(shape)},
    }
    return fitted, spatial


def cls_pickle(fitted: GaussianMixture) -> dict:
    """Return the dictionary that the published script saves beside a CLS mixture."""
    config = {"n_components": fitted.n_components, "covariance_type": "diag", "init_params": "k-means++"}
    metadata = {"data_path": "imagenet", "image_size": 224, "data_limit_percentage": 1.0}
    metrics = {**config, "converged": True, "log_likelihood": np.float64(1.5), "silhouette_score": np.float32(0.1)}
    labels = np.zeros(240, np.int64)
    return {"model": fitted, "labels": labels, "config": config, "metrics": metrics, "metadata": metadata}


def write(root: Path, family: str = "dinov2") -> SimpleNamespace:
    """Write the whole folder and return what is in it."""
    places = [layout.decoder(family), layout.statistics(family), layout.mixture(family), layout.guide(family, "mode")]
    places += [layout.checkpoint(family, setting) for setting in ("gmm", "mode")]
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    made = SimpleNamespace(
        var=torch.rand(CHANNELS, GRID, GRID) + 0.5, decoder=decoder(), model=network(MODEL), guide=network(GUIDE, 1)
    )
    made.fitted, made.spatial = mixtures()
    torch.save({"mean": None, "var": made.var}, root / layout.statistics(family))
    torch.save({**made.decoder.state_dict(), "encoder.extra": torch.zeros(2)}, root / layout.decoder(family))
    for setting in ("gmm", "mode"):
        for step in layout.steps(family):
            torch.save(checkpoint(made.model, setting, step), root / layout.checkpoint(family, setting, step))
        torch.save({"ema": made.guide.state_dict()}, root / layout.guide(family, setting))
    with open(root / layout.mixture(family), "wb") as file:
        pickle.dump(cls_pickle(made.fitted), file)
    with open(root / layout.spatial_mixture(family), "wb") as file:
        pickle.dump(made.spatial, file, protocol=4)
    reference = root / layout.REFERENCE
    reference.parent.mkdir(parents=True, exist_ok=True)
    np.savez(reference, mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((4, SIZE, SIZE, 3), np.uint8))
    return made


def keys(root: Path | str) -> dict:
    """Return the keys that replace those of config/published.yaml by the tiny ones."""
    return {
        "published": {"root": str(root)},
        "gpus": 0,
        "models": {"XL": MODEL, "S": GUIDE},
        "image": {"size": SIZE},
        "gmm": {"n_components": MODES},
        "decoder": {"num_heads": HEADS},
        "sample": {"n_images": 80, "time_points": 5, "batch_size": 40, "shard_size": 40, "compile": False},
        "fid": {
            "detector": "fashion",
            "weights": str(DEMO / "detector" / "detector.safetensors"),
            "batch_size": 40,
            "workers": 0,
        },
    }
