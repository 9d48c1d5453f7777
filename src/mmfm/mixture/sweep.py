"""Fits with several numbers of modes side by side: a table and a picture from their reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfm.infra import store

_FROM_FIT = (
    "n_components", "n_images", "bic", "aic", "log_likelihood", "active_components", "effective_number_by_counts",
    "images_per_active_component", "silhouette", "calinski_harabasz", "davies_bouldin", "class_purity", "class_nmi",
    "n_iter", "converged", "seconds_per_iteration", "gmm_digest",
)  # fmt: skip


def collect(
    fits: Sequence[dict[str, Any]], spatial: Sequence[dict[str, Any]], modes: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row of numbers for every number of modes, in ascending order.

    Args:
        fits: reports of fit_gmm.
        spatial: reports of spatial_gmm, in any order.
        modes: the wanted numbers of modes.

    Raises:
        ValueError: a report of one of them is missing, fits of different images, or a spatial mixture of another fit.
    """
    by_modes = {report["n_components"]: report for report in fits}
    if sorted(by_modes) != sorted(set(modes)):
        raise ValueError(
            f"sweep.modes is {_listed(modes)}, but the reports of fit_gmm are of {_listed(by_modes)} modes; "
            "give one of each"
        )
    if len({report["n_images"] for report in fits}) > 1:
        raise ValueError(
            "the fits are of different numbers of images and can't be compared; fit all to the same tokens"
        )
    by_digest = {report["gmm_digest"]: report for report in spatial}
    table = []
    for k in sorted(by_modes):
        fit = by_modes[k]
        if fit["gmm_digest"] not in by_digest:
            raise ValueError(f"no report of spatial_gmm is of the fit with {k} modes; run spatial_gmm on it")
        per_iteration = fit["seconds_per_iteration"]
        about = by_digest[fit["gmm_digest"]]
        row = {name: fit[name] for name in _FROM_FIT if name in fit}
        row["em_seconds"] = None if per_iteration is None else per_iteration * fit["n_iter"]
        table.append(row | {"coupling_cost": about["coupling_cost"], "covariance_type": about["covariance_type"]})
    return table


def _listed(numbers: Sequence[int] | dict[int, Any]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def plot(path: str | Path, table: Sequence[dict[str, Any]]) -> None:
    """Draw BIC, coupling cost and seconds of EM against the number of modes, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(11, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    modes = [row["n_components"] for row in table]
    likelihood, coupling, seconds = figure.subplots(1, 3)
    n = table[0]["n_images"]
    likelihood.plot(modes, [row["bic"] / n for row in table], marker="o", markersize=4, label="BIC")
    likelihood.plot(modes, [row["aic"] / n for row in table], marker="s", markersize=4, linestyle="--", label="AIC")
    likelihood.set_title("information criteria per image (small is good)", fontsize=10)
    likelihood.set_ylabel("nats, times 2")
    names = {
        "gaussian": "Gaussian source",
        "mixture_independent": "mixture, independent",
        "mode_coupled": "mode-coupled",
    }
    for (name, label), style in zip(names.items(), (":", "--", "-"), strict=True):
        coupling.plot(
            modes, [row["coupling_cost"][name] for row in table], style, marker="o", markersize=4, label=label
        )
    coupling.set_ylim(bottom=0)
    coupling.set_title("coupling cost", fontsize=10)
    coupling.set_ylabel(r"E$\,\Vert x_{source} - x_{data}\Vert^2$ per dimension")
    timed = [row for row in table if row["em_seconds"] is not None]
    seconds.plot([row["n_components"] for row in timed], [row["em_seconds"] for row in timed], marker="o", markersize=4)
    for row in timed:
        text = f"{row['n_iter']} iterations" + ("" if row["converged"] else ", stopped")
        seconds.annotate(text, (row["n_components"], row["em_seconds"]), xytext=(0, 7), textcoords="offset points",
                         fontsize=8, ha="center")  # fmt: skip
    seconds.set_ylim(bottom=0)
    seconds.margins(x=0.15, y=0.15)
    seconds.set_title("time of EM", fontsize=10)
    seconds.set_ylabel("seconds")
    for axes in (likelihood, coupling, seconds):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(modes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(modes, [f"{k:,}" for k in modes])
        axes.set_xlabel("modes K")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (likelihood, coupling):
        axes.legend(frameon=False, fontsize=8)
    with store.whole_file(path) as partial:
        figure.savefig(partial)
