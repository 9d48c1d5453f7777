"""``mmfm sweep``: compare mixtures with different numbers of modes."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Compare mixtures with different numbers of modes K: plot BIC, coupling cost and time of the fit against K. Only reports
are read. In the workflow, all fits use the same tokens, so the images are not encoded again for them.

  mmfm sweep --config config/config.yaml --fits gmm/k16/report.json gmm/k64/report.json gmm/k256/report.json \\
      --spatial spatial_gmm/k16/report.json spatial_gmm/k64/report.json spatial_gmm/k256/report.json \\
      --out-dir sweep/ "sweep.modes=[16,64,256]"

reads   report.json of `fit_gmm`     one for every number in sweep.modes
        report.json of `spatial_gmm` for the same fits
writes  sweep.json                   the values by K
        sweep.png                    the plot

docs/diagnostics.md explains how to choose K."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the stage, and print a summary."""
    parser = StageParser("sweep", DESCRIPTION)
    parser.add_argument("--fits", type=Path, nargs="+", required=True, help="reports of fit_gmm")
    parser.add_argument("--spatial", type=Path, nargs="+", required=True, help="reports of spatial_gmm, in any order")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.stages.sweep import sweep

    table = sweep(config, options.fits, options.spatial, options.out_dir)
    best = min(table, key=lambda row: row["bic"])
    print(f"sweep: {len(table)} fits; {best['n_components']:,} modes have the smallest BIC")
    return 0
