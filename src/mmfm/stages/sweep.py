"""``sweep``: compare fits with several numbers of modes.

Reads: the reports of `fit_gmm` and `spatial_gmm`.
Writes: ``sweep.json``, a row of numbers for every K, and ``sweep.png``.
Unit of work: none; the stage takes seconds and there is nothing to resume.
After a kill: either the old files or the new ones, each whole.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmfm.config import StageConfig
from mmfm.infra import store

_FROM_FIT = (
    "n_components", "n_images", "bic", "aic", "log_likelihood", "active_components", "effective_number_by_counts",
    "images_per_active_component", "silhouette", "calinski_harabasz", "davies_bouldin", "class_purity", "class_nmi",
    "n_iter", "converged", "seconds_per_iteration", "gmm_digest",
)  # fmt: skip

_COUPLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("Gaussian source", {"color": "0.8", "linewidth": 5}),
    "mixture_independent": ("mixture, independent of the image", {"color": "C1", "linestyle": "--", "marker": "s"}),
    "mode_coupled": ("mixture, mode-coupled", {"color": "C0", "marker": "o"}),
}


def sweep(config: StageConfig, fits: Sequence[Path], spatial: Sequence[Path], out_dir: Path) -> list[dict[str, Any]]:
    """Write the table and its plot, and return the table; see :func:`collect`."""
    table = collect([store.read_json(path) for path in fits], map(store.read_json, spatial), config.sweep.modes)
    plot(out_dir / "sweep.png", table)
    store.write_json(out_dir / "sweep.json", table)
    return table


def collect(
    fits: Sequence[dict[str, Any]], spatial: Iterable[dict[str, Any]], modes: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row of numbers for every number of modes, in ascending order.

    Args:
        fits: reports of fit_gmm.
        spatial: reports of spatial_gmm, in any order.
        modes: numbers of modes to compare.

    Raises:
        ValueError: a report is missing, or the fits are not of the same images.
    """
    by_modes = {report["n_components"]: report for report in fits}
    if sorted(by_modes) != sorted(set(modes)):
        raise ValueError(
            f"sweep.modes is {_listed(modes)}, but the reports of fit_gmm are for {_listed(by_modes)} modes; "
            "give one report for each"
        )
    if len({report["n_images"] for report in fits}) > 1:
        raise ValueError("the fits used different numbers of images and can't be compared; fit all to the same tokens")
    by_digest = {report["gmm_digest"]: report for report in spatial}
    table = []
    for k in sorted(by_modes):
        fit = by_modes[k]
        if fit["gmm_digest"] not in by_digest:
            raise ValueError(f"no report of spatial_gmm belongs to the fit with {k} modes; run spatial_gmm on it")
        per_iteration = fit["seconds_per_iteration"]
        of_spatial = by_digest[fit["gmm_digest"]]
        row = {name: fit[name] for name in _FROM_FIT if name in fit}
        row["em_seconds"] = None if per_iteration is None else per_iteration * fit["n_iter"]
        table.append(row | {name: of_spatial[name] for name in ("coupling_cost", "covariance_type")})
    return table


def _listed(numbers: Sequence[int] | dict[int, Any]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def plot(path: str | Path, table: Sequence[dict[str, Any]]) -> None:
    """Plot information criteria, coupling cost and EM time against the number of modes, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 3.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    modes, n = [row["n_components"] for row in table], table[0]["n_images"]
    criteria, coupling, seconds = figure.subplots(1, 3)
    for name, style in (("BIC", "o-"), ("AIC", "s--")):
        criteria.plot(modes, [row[name.lower()] / n for row in table], style, markersize=4, label=name)
    criteria.set(title="information criteria: smaller is better", ylabel="per image (nats, times 2)")
    # The Gaussian and the independent source often cost the same, so the former is a broad line behind the others.
    for name, (label, line) in _COUPLINGS.items():
        coupling.plot(modes, [row["coupling_cost"][name] for row in table], label=label, **line)
    coupling.set_ylim(bottom=0)
    coupling.set(
        title="coupling cost: smaller is better", ylabel=r"E$\,\Vert x_{source} - x_{data}\Vert^2$ per dimension"
    )
    timed = [(row, row["em_seconds"]) for row in table if row["em_seconds"] is not None]
    seconds.plot([row["n_components"] for row, _ in timed], [time for _, time in timed], "o-", markersize=4)
    for row, time in timed:
        text = f"{row['n_iter']} iterations" + ("" if row["converged"] else ",\nstopped")
        seconds.annotate(
            text, (row["n_components"], time), (0, 7), textcoords="offset points", ha="center", fontsize=8,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # where the line is steep, it passes behind
        )  # fmt: skip
    seconds.set_xmargin(0.18)
    seconds.set_ylim(0, 1.25 * max((time for _, time in timed), default=1.0))
    seconds.set(title="time of EM", ylabel="seconds")
    for axes in (criteria, coupling, seconds):
        axes.set_title(axes.get_title(), fontsize=10)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(modes, [f"{k:,}\n({n / k:,.0f})" for k in modes])
        axes.set_xlabel("modes K (images per mode)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (criteria, coupling):
        axes.legend(frameon=False, fontsize=8)
    with store.whole_file(path) as partial:
        figure.savefig(partial)
