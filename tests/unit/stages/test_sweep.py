"""The sweep over the number of modes: table, picture, refusals."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmfm.cli.__main__ import main
from mmfm.infra import store


def fit_report(k, **changes):
    made = {
        "n_components": k, "n_images": 500, "bic": 1000.0 * abs(k - 8) + 1, "aic": 900.0, "n_iter": 10,
        "seconds_per_iteration": k / 10, "converged": k < 16, "gmm_digest": f"gmm{k}", "lower_bounds": [-1.0],
    }  # fmt: skip
    return made | changes


def spatial_report(k, **changes):
    cost = {"gaussian": 2.0, "mixture_independent": 1.9, "mode_coupled": 1 / k}
    return {"n_components": k, "gmm_digest": f"gmm{k}", "coupling_cost": cost, "covariance_type": "diag"} | changes


def run(tmp_path, fits, spatial, modes):
    paths = {"fits": [], "spatial": []}
    for name, reports in (("fits", fits), ("spatial", spatial)):
        for i, report in enumerate(reports):
            paths[name].append(str(tmp_path / f"{name}{i}.json"))
            store.write_json(paths[name][-1], report)
    given = ["--settings", json.dumps({"sweep": {"modes": modes}}), "--out-dir", str(tmp_path / "out")]
    return main(["sweep", *given, "--fits", *paths["fits"], "--spatial", *paths["spatial"]])


def test_numbers_and_picture_by_number_of_modes(tmp_path, capsys):
    fits = [fit_report(16, seconds_per_iteration=None), fit_report(4), fit_report(8)]
    assert run(tmp_path, fits, [spatial_report(k) for k in (4, 8, 16)], [4, 8, 16]) == 0
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["n_components"] for row in table] == [4, 8, 16]
    assert [row["em_seconds"] for row in table] == [4.0, 8.0, None]
    assert [row["coupling_cost"]["mode_coupled"] for row in table] == [1 / 4, 1 / 8, 1 / 16]
    assert "lower_bounds" not in table[0] and table[0]["covariance_type"] == "diag"
    assert "8 modes have the smallest BIC" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize(
    ("fits", "spatial", "modes", "message"),
    [
        ([4], [4], [4, 8], "sweep.modes is 4, 8, but the reports of fit_gmm are for 4 modes"),
        ([4, 8], [4], [4, 8], "no report of spatial_gmm belongs to the fit with 8 modes"),
    ],
)
def test_missing_reports_are_named(tmp_path, capsys, fits, spatial, modes, message):
    assert run(tmp_path, map(fit_report, fits), map(spatial_report, spatial), modes) == 2
    assert message in capsys.readouterr().err


def test_fits_of_different_images_are_not_compared(tmp_path, capsys):
    fits = [fit_report(4), fit_report(8, n_images=400)]
    assert run(tmp_path, fits, [spatial_report(4), spatial_report(8)], [4, 8]) == 2
    assert "different numbers of images" in capsys.readouterr().err


def test_a_spatial_mixture_of_another_fit_is_refused(tmp_path, capsys):
    assert run(tmp_path, [fit_report(4)], [spatial_report(4, gmm_digest="old")], [4]) == 2
    assert "run spatial_gmm on it" in capsys.readouterr().err


def test_an_empty_list_of_modes_is_refused(tmp_path, capsys):
    assert run(tmp_path, [fit_report(4)], [spatial_report(4)], []) == 2
    assert "'sweep.modes' must list at least one number" in capsys.readouterr().err


def test_a_steep_line_passes_behind_the_labels(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    assert run(tmp_path, [fit_report(4), fit_report(64)], [spatial_report(4), spatial_report(64)], [4, 64]) == 0
    seconds = figures[0].axes[2]
    (line,) = seconds.lines
    for label in seconds.texts:
        assert label.get_path_effects() and label.get_zorder() > line.get_zorder()
