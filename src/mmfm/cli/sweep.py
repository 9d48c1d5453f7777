"""``mmfm sweep``: fits with several numbers of modes side by side."""

from pathlib import Path

from mmfm.cli.parser import StageParser

DESCRIPTION = """\
Plot what a number of modes K costs and brings: BIC, coupling cost and time of the fit against K. It reads reports only;
the fits share everything before them, so a sweep encodes no image twice for its tokens.

  mmfm sweep --config config/config.yaml --fits gmm/k16/report.json gmm/k64/report.json gmm/k256/report.json \\
      --spatial spatial_gmm/k16/report.json spatial_gmm/k64/report.json spatial_gmm/k256/report.json \\
      --out-dir sweep/ "sweep.modes=[16,64,256]"

reads   report.json of `fit_gmm`     one for every number in sweep.modes
        report.json of `spatial_gmm` of the same fits
writes  sweep.json                   the numbers by K
        sweep.png

How to choose K from them: docs/diagnostics.md."""


def main(arguments: list[str]) -> int:
    """Parse, read the reports, write table and picture."""
    parser = StageParser("sweep", DESCRIPTION)
    parser.add_argument("--fits", type=Path, nargs="+", required=True, help="reports of fit_gmm")
    parser.add_argument("--spatial", type=Path, nargs="+", required=True, help="reports of spatial_gmm, in any order")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the outputs")
    options, config = parser.parse(arguments)
    from mmfm.stages.sweep import sweep

    table = sweep(config, options.fits, options.spatial, options.out_dir)
    best = min(table, key=lambda row: row["bic"])
    print(f"sweep: {len(table)} fits; the smallest BIC is that of {best['n_components']:,} modes")
    return 0
