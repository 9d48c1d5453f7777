"""Names in any script: drawn by a font that has them, else replaced."""

import warnings

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from mmfm.infra import fonts


@pytest.fixture
def installed(monkeypatch):
    """Let only fonts of some families be installed."""

    def install(*families: str) -> None:
        listed = [font for font in font_manager.fontManager.ttflist if font.name in families]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)

    return install


def characters(family: str) -> set[int]:
    return set(FT2Font(font_manager.findfont(family)).get_charmap())


def test_a_name_that_no_font_can_draw_is_a_number(installed):
    installed("DejaVu Sans", "STIXGeneral", "Last Resort High-Efficiency")
    assert fonts.drawable(["chat", "chiens Ünï", "柴犬", "\udc80"]) == (
        ["chat", "chiens Ünï", "class 2", "class 3"],
        ["DejaVu Sans"],
    )


def test_fonts_that_can_not_be_opened_are_passed_over(installed, tmp_path, monkeypatch):
    """Matplotlib's list is kept in a file, which outlives fonts and may be shared by machines."""
    installed("DejaVu Sans")
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    for name in ("absent", "damaged"):
        entry = font_manager.FontEntry(str(tmp_path / f"{name}.ttf"), name, "normal", "normal", 400)
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, entry])
    assert fonts.drawable(["柴犬"]) == (["class 0"], ["DejaVu Sans"])


def test_names_are_drawn_as_they_are_spelt(tmp_path):
    """Dollars begin no formula, and a character that only another face of the family has is missing."""
    (shown, other), families = fonts.drawable(["cost_$5_$", "\u037f"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure()
        drawn = figure.text(0, 0, shown, fontfamily=families)
        figure.text(0, 0, other, fontfamily=families)
        figure.savefig(tmp_path / "a.png")
    assert drawn._preprocess_math(shown) == ("cost_$5_$", False)


def test_another_font_draws_what_the_first_lacks(installed, tmp_path):
    installed("DejaVu Sans", "STIXGeneral")
    name = f"cat {chr(min(characters('STIXGeneral') - characters('DejaVu Sans')))}"
    shown, families = fonts.drawable(["dog", name])
    assert shown == ["dog", name] and families == ["DejaVu Sans", "STIXGeneral"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure()
        figure.text(0, 0, name, fontfamily=families)
        figure.savefig(tmp_path / "a.png")
