"""``fit_gmm``: fit the mixture of the global tokens by EM and assign every image to a mode.

Reads: the tokens; with a listing also some of its images, for a picture of the modes.
Writes: ``gmm.safetensors``, ``assignment.safetensors``, ``report.json``, ``likelihood.png``, ``weights.png`` and, with
    a listing, ``modes.png``.
Unit of work: an EM iteration, ``iteration-00012.safetensors`` in the state; further initialisations (``gmm.n_init``)
    have theirs in ``start-01/`` and so on.
After a kill: EM continues from the newest whole iteration, also if ``gmm.max_iter`` was raised; if it was lowered, from
    the newest iteration within it. A kill during an initialisation repeats it.
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

_COLLAPSED = 10  # a component whose variances are all below this multiple of reg_covar sits on duplicates


def fit_gmm(config: StageConfig, tokens: Path, listing: Path | None, out_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Fit the mixture of a token store and return the report, on every process.

    Args:
        listing: listing of the training images, to draw images of some modes; None for no picture.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: see :func:`fit`; also if the tokens were not made from the listing.
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
        ValueError: there are fewer images than components, the covariances exceed the memory limit, or a token is not
            finite.
    """
    section, n = config.gmm, len(tokens)
    if n < section.n_components:
        raise ValueError(
            f"gmm.n_components, or .k in the target's name, is {section.n_components}, but there are only {n} images; "
            f"set it to {n} or less (.k{n}), or use more images"
        )
    covariance_shape(section.covariance_type, section.n_components, tokens.width)
    digests, files = {"tokens": tokens.digest}, {"tokens": tokens.path}
    if section.init_means:
        files["init_means"] = Path(section.init_means)
        digests["init_means"] = ranks.from_main(
            lambda: initial.given_means_digest(section.init_means, section.n_components, tokens.width)
        )
    identity = config.with_keys(gmm={"init_means": ""}).identity()  # the file's digest counts, not its path
    outputs = {name: out_dir / name for name in _OUTPUTS}
    budget = {"max_iter": section.max_iter, "n_init": section.n_init}
    with Context.open(config, ranks, provenance.Inputs(digests, files), outputs, identity) as context:
        if not runner.restore(context, budget):
            fitted = _fit(context, tokens)
            runner.finish(context, lambda finished: _write(finished, fitted, tokens), budget)
        # Drawn last: a damaged image must not keep the mixture from being published.
        if listing is not None:
            ranks.from_main(lambda: _add_picture(context, tokens, listing))
    return ranks.from_main(lambda: store.read_json(outputs[_REPORT]))


@dataclass(frozen=True)
class _Fitted:
    """The best fit of all initialisations.

    Attributes:
        labels: (N,) int32, mode of every image.
        counts: (K,) int64, number of images in every mode.
        log_likelihood: mean over the images, in nats.
        diagnostics: what the report says besides the summary of the mixture.
    """

    state: EMState
    labels: np.ndarray
    counts: np.ndarray
    log_likelihood: float
    diagnostics: dict[str, Any]


def _fit(context: Context, tokens: TokenStore) -> _Fitted:
    """Run or continue EM from every initialisation; assign every image to its likeliest component in the best fit."""
    section, ranks = context.config.gmm, context.ranks
    block_rows = GROUP_ROWS * section.n_components
    rows = Rows(tokens.read, len(tokens), section.chunk_size, ranks, section.cache_gb * 1e9, block_rows)
    dtype = getattr(torch, section.precision)
    runs = [_run_em(rows, section, context.state, dtype, number) for number in range(section.n_init)]
    state, seconds = max(runs, key=lambda run: run[0].lower_bounds[-1])
    labels, log_likelihood = predict_all(rows, state.mixture, dtype)
    counts = np.bincount(labels, minlength=section.n_components).astype(np.int64)
    diagnostics = validity.indices(rows, labels, state.mixture.means, section.seed, ranks) | {
        "n_iter": state.n_iter,
        "converged": state.converged,
        "lower_bounds": list(state.lower_bounds),
        "reseeded_components": sum(state.reseeded),
        "collapsed_components": _collapsed(state.mixture, counts, section.reg_covar),
        "seconds_per_iteration": float(np.mean(seconds)) if seconds else None,
        "settings": config.keys_of_kind(section, "identity", "budget"),
    }
    if state.winners is not None:
        mean, error, images = measure_gap(rows, state.mixture, state.winners, Truncation(), dtype)
        diagnostics["truncation_gap"] = {"nats_per_image": mean, "standard_error": error, "images": images}
    if len(runs) > 1:
        diagnostics["final_lower_bounds_of_starts"] = [run[0].lower_bounds[-1] for run in runs]
    return _Fitted(state, labels, counts, log_likelihood, diagnostics)


def _run_em(rows: Rows, section: Gmm, state_dir: Path, dtype: torch.dtype, number: int) -> tuple[EMState, list[float]]:
    """Run or continue EM from initialisation ``number``; return its last state and the seconds of every iteration."""
    ranks = rows.ranks
    if number:
        state_dir = state_dir / f"start-{number:02d}"
    newest, beyond = ranks.from_main(lambda: newest_iteration(state_dir, section.max_iter))
    truncation = Truncation() if section.e_step == "truncated" else None
    if newest is None:
        mixture, winners = initial.start(rows, section, number)
        state = EMState(mixture, winners=winners if truncation else None)
        _save(rows, state_dir, state)
    else:
        state = load_iteration(newest, ranks.device, rows.local)
    seconds, begin = [], time.perf_counter()
    iterations = em_iterations(
        rows,
        state,
        max_iter=section.max_iter,
        tol=section.tol,
        reg_covar=section.reg_covar,
        dtype=dtype,
        truncation=truncation,
        shrinkage=section.shrinkage,
    )
    with Progress("fit_gmm", section.max_iter, "iterations", done=state.n_iter, enabled=ranks.is_main) as progress:
        if beyond and not state.converged:
            progress.say(
                f"resuming at iteration {state.n_iter}, the newest within gmm.max_iter; an earlier run reached {beyond}"
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
    """Write a state on the main process, with the winners of all processes."""
    if state.winners is not None:
        state = replace(state, winners=torch.cat(rows.ranks.gather(state.winners.cpu())))
    rows.ranks.from_main(functools.partial(save_iteration, state_dir, state))


def _collapsed(mixture: Mixture, counts: np.ndarray, reg_covar: float) -> int:
    """Return the number of components with images whose variances are all close to ``reg_covar``."""
    return int(((mixture.diagonal().amax(1) <= _COLLAPSED * reg_covar).cpu().numpy() & (counts > 0)).sum())


def save_iteration(state_dir: Path, state: EMState) -> None:
    """Write a state, and remove older ones except iteration 0 and the previous one, in case this file gets damaged.

    Later iterations, from a run with a larger ``max_iter``, stay.
    """
    metadata = {
        "lower_bounds": list(state.lower_bounds),
        "converged": state.converged,
        "reseeded": list(state.reseeded),
        "slack": state.slack if math.isfinite(state.slack) else None,
    }
    metadata["metadata_digest"] = store.fingerprint(metadata)  # the file's own digest covers the arrays only
    winners = {} if state.winners is None else {"winners": state.winners.numpy()}
    state.mixture.save(state_dir / f"iteration-{state.n_iter:05d}.safetensors", metadata, winners)
    for path in state_dir.glob("iteration-*.safetensors"):
        if 0 < _iteration_number(path) < state.n_iter - 1:
            path.unlink()


def _iteration_number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def load_iteration(path: Path, device: torch.device | str = "cpu", local: range | None = None) -> EMState:
    """Read what :func:`save_iteration` wrote.

    Args:
        local: rows whose winners to read; None for all.

    Raises:
        ValueError: the file is truncated, damaged, or not a checkpoint of EM.
    """
    arrays, metadata = store.map_arrays(path)
    if metadata.get("digest") != store.array_digest(*(arrays[name] for name in sorted(arrays))):
        raise ValueError(f"{path} is damaged; delete it")
    names = ("lower_bounds", "converged", "reseeded", "slack")
    missing = [name for name in names if name not in metadata]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of fit_gmm (it has no {', '.join(missing)}); delete it")
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
    """Find the iteration to continue from.

    Returns:
        The path of the newest undamaged iteration up to ``max_iter``, or None; and the number of the newest iteration
        beyond ``max_iter``, or 0.
    """
    files = {_iteration_number(path): path for path in state_dir.glob("iteration-*.safetensors")}
    beyond = max((number for number in files if number > max_iter), default=0)
    for number in sorted((number for number in files if number <= max_iter), reverse=True):
        try:
            load_iteration(files[number])
        except ValueError:
            continue
        return files[number], beyond
    return None, beyond


def predict_all(rows: Rows, mixture: Mixture, dtype: torch.dtype) -> tuple[np.ndarray, float]:
    """Return every row's component of largest posterior, (N,) int32, and the mean log-likelihood in nats."""
    device = rows.ranks.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    labels = torch.empty(len(rows.local), dtype=torch.int32, device=device)
    for chunk, x in rows:
        joint = mixture.log_joint(x, dtype, rows.workspace)
        top, best = joint.max(1, keepdim=True)
        labels[chunk.start - rows.local.start :][: len(x)] = best.squeeze(1)
        total += (joint.sub_(top).exp_().sum(1).double().log() + top.squeeze(1)).sum()
    gathered = np.concatenate(rows.ranks.gather(labels.cpu().numpy()))
    return gathered, float(rows.ranks.sum(total)) / rows.n


def _write(finished: Path, fitted: _Fitted, tokens: TokenStore) -> None:
    """Write all results except the picture of the modes."""
    state, labels, counts = fitted.state, fitted.labels, fitted.counts
    classes = np.asarray(tokens.labels[:])
    report = mixture_report.summarise(state.mixture, labels, counts, fitted.log_likelihood, classes)
    report |= fitted.diagnostics
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
    """Add the picture of some modes to the published results, unless it exists."""
    if context.outputs[_MODES].is_file():
        return
    labels = store.map_arrays(context.outputs[_ASSIGNMENT])[0]["labels"]
    mixture, images = Mixture.load(context.outputs[_MIXTURE]), Listing.open(listing)
    size = context.config.gmm.chunk_size
    runner.amend(context, lambda made: contact_sheet.draw(made / _MODES, images, tokens.read, labels, mixture, size))
