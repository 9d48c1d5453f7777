"""The stage fit_gmm: start, EM with a checkpoint every iteration, labels of all images, report."""

import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfm import config
from mmfm.config import Gmm
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.mixture import initial, report, validity
from mmfm.mixture.em import EMState, Rows, em_iterations
from mmfm.mixture.gaussian import Mixture
from mmfm.tokens import TokenStore

VERSION = config.VERSIONS["fit_gmm"]


def fit(tokens: TokenStore, settings: Gmm, out_dir: str | Path, ranks: Ranks) -> dict[str, Any]:
    """Fit the mixture of the global tokens and give every image to its likeliest component.

    Writes ``gmm.safetensors``, ``assignment.safetensors``, ``report.json``, ``likelihood.png`` and ``weights.png``
    (layouts in docs/stages.md). After a kill, or with a raised ``max_iter``, EM goes on from its newest whole
    iteration; with a lowered one from the newest that is within it. A collective call; the main process writes.

    Returns:
        The report, on every process.

    Raises:
        ValueError: fewer images than components, or a token that is not finite.
    """
    out_dir, n = Path(out_dir), len(tokens)
    if n < settings.n_components:
        raise ValueError(
            f"gmm.n_components is {settings.n_components}, but there are only {n} images; "
            f"set it to {n} or less, or use more images"
        )
    identity = config.identity({"gmm": settings})
    state_dir = ranks.from_main(
        lambda: store.state_directory(
            out_dir / "gmm.safetensors",
            "fit_gmm",
            VERSION,
            identity,
            {"tokens": tokens.digest},
            {"tokens": tokens.path},
        )
    )
    rows = Rows(tokens.read, n, settings.chunk_size, ranks, settings.cache_gb)
    dtype = getattr(torch, settings.precision)
    state, seconds = _run_em(tokens, rows, settings, state_dir, dtype)
    labels, log_likelihood = predict_all(rows, state.mixture, dtype)
    separation = validity.indices(rows, labels, state.mixture.means, settings.seed, ranks)

    def publish() -> dict[str, Any]:
        counts = np.bincount(labels, minlength=settings.n_components).astype(np.int64)
        summary = report.summarise(state.mixture, labels, counts, log_likelihood, np.asarray(tokens.labels[:]))
        summary |= separation | {
            "n_iter": state.n_iter,
            "converged": state.converged,
            "lower_bounds": list(state.lower_bounds),
            "seconds_per_iteration": float(np.mean(seconds)) if seconds else None,
            "settings": config.keys_of_kind(settings, "identity", "budget"),
        }
        _publish(out_dir, state, labels, counts, summary, tokens)
        return summary

    return ranks.from_main(publish)


def _run_em(
    tokens: TokenStore, rows: Rows, settings: Gmm, state_dir: Path, dtype: torch.dtype
) -> tuple[EMState, list[float]]:
    ranks = rows.ranks
    newest = ranks.from_main(lambda: newest_iteration(state_dir, settings.max_iter))
    if newest is None:
        state = EMState(initial.start(tokens.read, rows, settings))
        ranks.from_main(functools.partial(save_iteration, state_dir, state))
    else:
        state = load_iteration(newest, ranks.device)
    seconds, begin = [], time.perf_counter()
    iterations = em_iterations(
        rows, state, max_iter=settings.max_iter, tol=settings.tol, reg_covar=settings.reg_covar, dtype=dtype
    )
    with Progress("fit_gmm", settings.max_iter, "iterations", done=state.n_iter, enabled=ranks.is_main) as progress:
        for state in iterations:
            ranks.from_main(functools.partial(save_iteration, state_dir, state))
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            progress.advance(note=f"log-likelihood {state.lower_bounds[-1]:.4f}")
        progress.say(f"{'converged' if state.converged else 'stopped at gmm.max_iter'} after {state.n_iter} iterations")
        progress.total = progress.done
    return state, seconds


def _iteration_path(state_dir: Path, number: int) -> Path:
    return state_dir / f"iteration-{number:05d}.safetensors"


def save_iteration(state_dir: Path, state: EMState) -> None:
    """Write the state whole; keep it, the one before (in case this one is damaged) and the start.

    Later iterations, left by a run with a larger ``max_iter``, stay.
    """
    metadata = {"lower_bounds": list(state.lower_bounds), "converged": state.converged}
    state.mixture.save(_iteration_path(state_dir, state.n_iter), metadata)
    for path in state_dir.glob("iteration-*.safetensors"):
        if 0 < int(path.stem.split("-")[1]) < state.n_iter - 1:
            path.unlink()


def load_iteration(path: Path, device: torch.device | str = "cpu") -> EMState:
    """Read what :func:`save_iteration` wrote.

    Raises:
        ValueError: the file is truncated, or its contents don't have the digest that they were written with.
    """
    try:
        arrays, metadata = store.map_arrays(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if metadata.get("digest") != store.array_digest(*(arrays[name] for name in sorted(arrays))):
        raise ValueError(f"{path} is damaged; delete it")
    return EMState(Mixture.load(path, device), tuple(metadata["lower_bounds"]), metadata["converged"])


def newest_iteration(state_dir: Path, max_iter: int) -> Path | None:
    """Return the newest iteration that ``max_iter`` allows, passing over damaged ones; None if there is none."""
    for path in sorted(state_dir.glob("iteration-*.safetensors"), reverse=True):
        try:
            if load_iteration(path).n_iter <= max_iter:
                return path
        except ValueError:
            continue
    return None


def predict_all(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> tuple[np.ndarray, float]:
    """Return the component with the largest posterior of every row, (N,) int32, and the mean log-likelihood (nats)."""
    labels, total = [np.empty(0, np.int32)], torch.zeros((), dtype=torch.float64, device=rows.ranks.device)
    for _, x in rows:
        joint = mixture.log_joint(x, dtype)
        labels.append(joint.argmax(1).int().cpu().numpy())
        total += joint.logsumexp(1).double().sum()
    gathered = np.concatenate(rows.ranks.gather(np.concatenate(labels)))
    return gathered, float(rows.ranks.sum(total)) / rows.n


def _publish(
    out_dir: Path, state: EMState, labels: np.ndarray, counts: np.ndarray, summary: dict[str, Any], tokens: TokenStore
) -> None:
    digest = state.mixture.save(
        out_dir / "gmm.safetensors",
        {
            "tokens_digest": tokens.digest,
            "listing_digest": tokens.listing_digest,
            "encoder_digest": tokens.attributes.get("encoder_digest"),
            "settings": summary["settings"],
            "n_iter": state.n_iter,
            "converged": state.converged,
            "lower_bound": state.lower_bounds[-1],
        },
    )
    store.write_arrays(
        out_dir / "assignment.safetensors",
        {"labels": labels, "counts": counts},
        {"gmm_digest": digest, "listing_digest": tokens.listing_digest},
    )
    report.plot_likelihood(out_dir / "likelihood.png", state.lower_bounds, state.converged)
    report.plot_weights(out_dir / "weights.png", state.mixture.weights.cpu().numpy(), counts)
    store.write_json(out_dir / "report.json", {**summary, "gmm_digest": digest})
