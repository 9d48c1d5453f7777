"""The records of a run and the curve that is drawn of them."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from mmfm.training import history as curve


@pytest.fixture
def axis():
    return Figure().add_subplot()


def lines_of(losses) -> list[dict]:
    return [{"step": 10 * i, "loss": loss, "lr": 0.1} for i, loss in enumerate(losses, 1)]


def test_few_losses_are_drawn_as_they_are_and_many_with_a_running_mean(axis):
    curve._draw_loss(axis, lines_of([3.0, 2.0, 1.5]))
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [[10, 3], [20, 2], [30, 1.5]] and line.get_marker() == "."
    assert axis.get_yscale() == "linear"
    losses = np.random.default_rng(0).uniform(1, 2, 103)
    axis.clear()
    curve._draw_loss(axis, lines_of(losses))
    raw, mean = (line.get_ydata() for line in axis.lines)
    assert np.array_equal(raw, losses)
    window = int(axis.lines[1].get_label().rsplit(" ", 1)[1])
    expected = [losses[max(0, i - window + 1) : i + 1].mean() for i in range(103)]
    assert 1 < window < 10 and np.allclose(mean, expected)


def test_a_loss_over_orders_of_magnitude_is_drawn_on_a_logarithm(axis):
    for losses, scale in (([100.0, 1.0], "log"), ([3.0, 2.0], "linear"), ([100.0, 0.0], "linear"), ([], "linear")):
        axis.clear()
        curve._draw_loss(axis, lines_of(losses))
        assert axis.get_yscale() == scale, losses


def test_only_distances_that_compare_are_joined(axis):
    about = {"measure": "FID", "n_images": 5000, "time_points": 25, "detector_digest": "d", "reference_digest": "r"}

    def draw(*distances):
        axis.clear()
        curve._draw_distances(axis, [{**about, "step": s, "distance": d, **other} for s, d, other in distances])
        return [line.get_xydata().tolist() for line in axis.lines]

    found = draw((5, 8.0, {}), (5, 4.0, {"n_images": 100}), (10, 6.0, {}))
    assert found == [[[5, 8], [10, 6]], [[5, 4]]]
    assert [line.get_label().split(",")[0] for line in axis.lines] == ["5", "100 images"]
    assert "last 6" in axis.lines[0].get_label() and axis.get_ylabel() == "FID"
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "linear" and low == 0 and 8 < high < 12
    assert len(draw((5, 8.0, {}), (10, 6.0, {"reference_digest": "s"}))) == 2
    draw((5, 80.0, {}), (10, 6.0, {}))
    assert axis.get_yscale() == "log"
    draw((5, 0.0, {}))
    assert axis.get_ylim()[1] > 0


@pytest.mark.parametrize("measured", [False, True])
def test_the_curve_has_a_part_for_each_of_its_quantities(tmp_path, monkeypatch, measured):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    about = {"measure": "FID", "n_images": 9, "time_points": 5, "detector_digest": "d", "reference_digest": "r"}
    distances = [{**about, "step": 20, "distance": 3.0}] if measured else []
    curve.draw_curve(lines_of([3.0, 2.0]), tmp_path / "curve.png", "a run", distances)
    axes = figures[0].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", *["FID"] * measured, "learning rate"]
    axes[0].set_xlim(20, 23)
    assert all(step == round(step) for step in axes[-1].get_xticks()), "steps are whole"
    axes[0].set_xlim(0, 77)
    assert axes[-1].get_xlim() == (0, 77), "the parts share their steps"
    assert axes[0].get_title() == "a run" and axes[-1].get_xlabel() == "step"
    assert axes[-1].lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.1]] and axes[-1].get_ylim()[0] == 0
    tall = [axis.get_window_extent().height for axis in axes]
    assert tall == sorted(tall, reverse=True) and (tmp_path / "curve.png").stat().st_size > 1000
    monkeypatch.undo()
    plt.close(figures[0])


def test_records_are_read_up_to_a_step_and_up_to_where_a_kill_cut_them(tmp_path):
    path = tmp_path / "history.jsonl"
    for step in (2, 6, 4):
        curve.append_line(path, {"step": step, "loss": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in curve.read_history(path)] == [2, 6, 4]
    assert [line["step"] for line in curve._until(path, 4)] == [2, 4]
    curve.keep_until(path, 4)
    assert [line["step"] for line in curve.read_history(path)] == [2, 4] and path.read_text().endswith("}\n")
    assert curve.read_history(tmp_path / "none") == []
