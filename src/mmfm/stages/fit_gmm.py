"""``fit_gmm``: the mixture of the global tokens by EM, and the mode of every image.

Reads the tokens, and with a listing some images, for a picture. Writes ``gmm.safetensors``, ``assignment.safetensors``,
``report.json``, ``likelihood.png``, ``weights.png`` and, with a listing, ``modes.png``.

The unit of work is an EM iteration, ``iteration-00012.safetensors`` in the state; of further starts in ``start-01/``
and so on. A kill leaves whole iterations: EM goes on from the newest one, also where ``max_iter`` was raised, and with
a lowered one from the newest that is within it. A start that is killed begins again.
"""

import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm import config
from mmfm.config import Gmm, StageConfig
from mmfm.data.listing import Listing
from mmfm.data.tokens import TokenStore
from mmfm.evaluation import contact_sheet, mixture_report
from mmfm.infra import store
from mmfm.infra.distributed import Ranks
from mmfm.infra.progress import Progress
from mmfm.mixture import initial, validity
from mmfm.mixture.em import EMState, em_iterations
from mmfm.mixture.gaussian import Mixture, covariance_shape
from mmfm.mixture.groups import GROUP_ROWS
from mmfm.mixture.streaming import Rows
from mmfm.mixture.truncated import Truncation, measure_gap
from mmfm.stages import provenance, runner
from mmfm.stages.runner import Context

_MIXTURE, _ASSIGNMENT, _REPORT, _MODES = "gmm.safetensors", "assignment.safetensors", "report.json", "modes.png"
_OUTPUTS = (_MIXTURE, _ASSIGNMENT, _REPORT, "likelihood.png", "weights.png", _MODES)

_COLLAPSED = 10  # times reg_covar: a component whose variances are all below sits on duplicates


def fit_gmm(config: StageConfig, tokens: Path, listing: Path | None, out_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Fit the mixture of a token store and return the report, on every process.

    Args:
        listing: of the training images, to draw some of every kind of mode; None: no picture.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: see :func:`fit`; also tokens that were not made from the listing.
    """
    opened = TokenStore.open(tokens)
    if listing is not None:
        provenance.belong_together(provenance.tokens(opened), provenance.listing(listing))
    return fit(config, opened, out_dir, ranks, listing)


def fit(
    config: StageConfig, tokens: TokenStore, out_dir: Path, ranks: Ranks, listing: Path | None = None
) -> dict[str, Any]:
    """Fit the mixture of opened tokens; see :func:`fit_gmm`. A collective call; the main process writes.

    Raises:
        ValueError: fewer images than components, covariances beyond the memory limit, a token that is not finite.
    """
    settings, n = config.gmm, len(tokens)
    if n < settings.n_components:
        raise ValueError(
            f"gmm.n_components is {settings.n_components}, but there are only {n} images; "
            f"set it to {n} or less, or use more images"
        )
    covariance_shape(settings.covariance_type, settings.n_components, tokens.width)
    digests, files = {"tokens": tokens.digest}, {"tokens": tokens.path}
    if settings.init_means:
        files["init_means"] = Path(settings.init_means)
        digests["init_means"] = ranks.from_main(
            lambda: initial.given_means_digest(settings.init_means, settings.n_components, tokens.width)
        )
    identity = config.with_keys(gmm={"init_means": ""}).identity()  # known by its digest, wherever it lies
    outputs = {name: out_dir / name for name in _OUTPUTS}
    budget = {"max_iter": settings.max_iter, "n_init": settings.n_init}
    with Context.open(config, ranks, provenance.Inputs(digests, files), outputs, identity) as context:
        if not runner.restore(context, budget):
            fitted = _fit(context, tokens)
            runner.finish(context, lambda finished: _write(finished, fitted, tokens), budget)
        # The mixture does not wait for the picture: an image may be damaged.
        if listing is not None:
            ranks.from_main(lambda: _add_picture(context, tokens, listing))
    return ranks.from_main(lambda: store.read_json(outputs[_REPORT]))


@dataclass(frozen=True)
class _Fitted:
    """The best of all starts.

    Attributes:
        labels: (N,) int32, mode of every image.
        counts: (K,) int64, images of every mode.
        log_likelihood: mean over the images, in nats.
        numbers: for the report, besides those of the mixture.
    """

    state: EMState
    labels: np.ndarray
    counts: np.ndarray
    log_likelihood: float
    numbers: dict[str, Any]


def _fit(context: Context, tokens: TokenStore) -> _Fitted:
    """Run or continue EM from every start; give every image to its likeliest component under the best."""
    settings, ranks = context.config.gmm, context.ranks
    truncated = settings.e_step == "truncated"
    stretch = GROUP_ROWS * settings.n_components
    rows = Rows(tokens.read, len(tokens), settings.chunk_size, ranks, settings.cache_gb * 1e9, stretch)
    dtype = getattr(torch, settings.precision)
    runs = [_run_em(rows, settings, context.state, dtype, number) for number in range(settings.n_init)]
    best = max(range(len(runs)), key=lambda number: runs[number][0].lower_bounds[-1])
    state, seconds = runs[best]
    labels, log_likelihood = predict_all(rows, state.mixture, dtype)
    counts = np.bincount(labels, minlength=settings.n_components).astype(np.int64)
    numbers = validity.indices(rows, labels, state.mixture.means, settings.seed, ranks) | {
        "n_iter": state.n_iter,
        "converged": state.converged,
        "lower_bounds": list(state.lower_bounds),
        "reseeded_components": sum(state.reseeded),
        "collapsed_components": _collapsed(state.mixture, counts, settings.reg_covar),
        "seconds_per_iteration": float(np.mean(seconds)) if seconds else None,
        "settings": config.keys_of_kind(settings, "identity", "budget"),
    }
    if truncated:
        numbers["truncation_gap"] = _truncation_gap(rows, state, dtype)
    if len(runs) > 1:
        numbers["final_lower_bounds_of_starts"] = [run[0].lower_bounds[-1] for run in runs]
    return _Fitted(state, labels, counts, log_likelihood, numbers)


def _run_em(rows: Rows, settings: Gmm, state_dir: Path, dtype: torch.dtype, number: int) -> tuple[EMState, list[float]]:
    """Run or continue EM from start ``number``."""
    ranks = rows.ranks
    if number:
        state_dir = state_dir / f"start-{number:02d}"
    newest, beyond = ranks.from_main(lambda: newest_iteration(state_dir, settings.max_iter))
    truncated = settings.e_step == "truncated"
    if newest is None:
        mixture, winners = initial.start(rows, settings, number)
        state = EMState(mixture, winners=winners if truncated else None)
        _save(rows, state_dir, state)
    else:
        state = load_iteration(newest, ranks.device, rows.local)
    seconds, begin = [], time.perf_counter()
    iterations = em_iterations(
        rows,
        state,
        max_iter=settings.max_iter,
        tol=settings.tol,
        reg_covar=settings.reg_covar,
        dtype=dtype,
        truncation=Truncation() if truncated else None,
    )
    with Progress("fit_gmm", settings.max_iter, "iterations", done=state.n_iter, enabled=ranks.is_main) as progress:
        if beyond and not state.converged:
            progress.say(
                f"goes on from iteration {state.n_iter}: what is kept of earlier runs ({beyond}) is above gmm.max_iter"
            )
        for state in iterations:
            _save(rows, state_dir, state)
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            progress.advance(note=f"log-likelihood {state.lower_bounds[-1]:.4f}")
        progress.say(f"{'converged' if state.converged else 'stopped at gmm.max_iter'} after {state.n_iter} iterations")
        progress.total = progress.done
    return state, seconds


def _save(rows: Rows, state_dir: Path, state: EMState) -> None:
    """Write a state from the main process, with the winners of all."""
    if state.winners is not None:
        parts = rows.ranks.gather(state.winners.cpu())
        state = replace(state, winners=torch.cat(parts))
    rows.ranks.from_main(functools.partial(save_iteration, state_dir, state))


def _truncation_gap(rows: Rows, state: EMState, dtype: torch.dtype) -> dict[str, float]:
    mean, error, images = measure_gap(rows, state.mixture, state.winners, Truncation(), dtype)
    return {"nats_per_image": mean, "standard_error": error, "images": images}


def _collapsed(mixture: Mixture, counts: np.ndarray, reg_covar: float) -> int:
    return int(((mixture.diagonal().amax(1) <= _COLLAPSED * reg_covar).cpu().numpy() & (counts > 0)).sum())


def _iteration_path(state_dir: Path, number: int) -> Path:
    return state_dir / f"iteration-{number:05d}.safetensors"


def save_iteration(state_dir: Path, state: EMState) -> None:
    """Write the state whole; keep it, the one before (in case this one is damaged) and the start.

    Later iterations, left by a run with a larger ``max_iter``, stay.
    """
    metadata = {
        "lower_bounds": list(state.lower_bounds),
        "converged": state.converged,
        "reseeded": list(state.reseeded),
        "slack": state.slack if math.isfinite(state.slack) else None,
    }
    metadata["metadata_digest"] = store.fingerprint(metadata)  # the arrays' digest is the file's own
    winners = {} if state.winners is None else {"winners": state.winners.numpy()}
    state.mixture.save(_iteration_path(state_dir, state.n_iter), metadata, winners)
    for path in state_dir.glob("iteration-*.safetensors"):
        if 0 < _number(path) < state.n_iter - 1:
            path.unlink()


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def load_iteration(path: Path, device: torch.device | str = "cpu", local: range | None = None) -> EMState:
    """Read what :func:`save_iteration` wrote.

    Args:
        local: global indices of the rows whose winners are wanted; None for all.

    Raises:
        ValueError: the file is truncated, or its contents don't have the digests that they were written with.
    """
    arrays, metadata = store.map_arrays(path)
    if metadata.get("digest") != store.array_digest(*(arrays[name] for name in sorted(arrays))):
        raise ValueError(f"{path} is damaged; delete it")
    names = ("lower_bounds", "converged", "reseeded", "slack")
    missing = [name for name in names if name not in metadata]
    if missing:
        raise ValueError(f"{path} is no checkpoint of fit_gmm (it has no {', '.join(missing)}); delete it")
    if metadata.get("metadata_digest") != store.fingerprint({name: metadata[name] for name in names}):
        raise ValueError(f"{path} is damaged; delete it")
    return EMState(
        Mixture.load(path, device),
        tuple(metadata["lower_bounds"]),
        metadata["converged"],
        tuple(metadata["reseeded"]),
        math.inf if metadata["slack"] is None else metadata["slack"],
        _local_winners(arrays, local, device),
    )


def _local_winners(arrays: dict[str, np.ndarray], local: range | None, device: torch.device | str) -> Tensor | None:
    if "winners" not in arrays:
        return None
    own = arrays["winners"] if local is None else arrays["winners"][local.start : local.stop]
    return torch.tensor(own, device=device)


def newest_iteration(state_dir: Path, max_iter: int) -> tuple[Path | None, int]:
    """Return the newest whole iteration that ``max_iter`` allows, and the number of the newest that it does not.

    Returns:
        Its path, None if there is none; and that number, 0 if there is none.
    """
    files = {_number(path): path for path in state_dir.glob("iteration-*.safetensors")}
    beyond = max((number for number in files if number > max_iter), default=0)
    for number in sorted((number for number in files if number <= max_iter), reverse=True):
        try:
            load_iteration(files[number])
        except ValueError:  # damaged
            continue
        return files[number], beyond
    return None, beyond


def predict_all(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> tuple[np.ndarray, float]:
    """Return the component with the largest posterior of every row, (N,) int32, and the mean log-likelihood (nats)."""
    device = rows.ranks.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    labels = torch.empty(len(rows.local), dtype=torch.int32, device=device)
    for chunk, x in rows:
        joint = mixture.log_joint(x, dtype, rows.space)
        top, best = joint.max(1, keepdim=True)
        labels[chunk.start - rows.local.start :][: len(x)] = best.squeeze(1)
        total += (joint.sub_(top).exp_().sum(1).double().log() + top.squeeze(1)).sum()
    gathered = np.concatenate(rows.ranks.gather(labels.cpu().numpy()))
    return gathered, float(rows.ranks.sum(total)) / rows.n


def _write(finished: Path, fitted: _Fitted, tokens: TokenStore) -> None:
    """Write all results but the picture of the modes."""
    state, labels, counts = fitted.state, fitted.labels, fitted.counts
    report = mixture_report.summarise(
        state.mixture, labels, counts, fitted.log_likelihood, np.asarray(tokens.labels[:])
    )
    report |= fitted.numbers
    about = {
        "tokens_digest": tokens.digest,
        "listing_digest": tokens.listing_digest,
        "encoder_digest": tokens.attributes.get("encoder_digest"),
        "settings": report["settings"],
        "n_iter": state.n_iter,
        "converged": state.converged,
        "lower_bound": state.lower_bounds[-1],
    }
    digest = state.mixture.save(finished / _MIXTURE, about)
    made_from = {"gmm_digest": digest, "listing_digest": tokens.listing_digest}
    store.write_arrays(finished / _ASSIGNMENT, {"labels": labels, "counts": counts}, made_from)
    mixture_report.plot_likelihood(finished / "likelihood.png", state.lower_bounds, state.converged)
    mixture_report.plot_weights(finished / "weights.png", state.mixture.weights.cpu().numpy(), counts)
    store.write_json(finished / _REPORT, {**report, "gmm_digest": digest})


def _add_picture(context: Context, tokens: TokenStore, listing: Path) -> None:
    """Publish a picture of some modes beside the mixture, unless it is there."""
    if context.outputs[_MODES].is_file():
        return
    labels = store.map_arrays(context.outputs[_ASSIGNMENT])[0]["labels"]
    mixture, images = Mixture.load(context.outputs[_MIXTURE]), Listing.open(listing)
    rows = context.config.gmm.chunk_size
    runner.amend(context, lambda made: contact_sheet.draw(made / _MODES, images, tokens.read, labels, mixture, rows))
