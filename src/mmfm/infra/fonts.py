"""Fonts of pictures, for names in any script, as users' folders have them."""

from collections.abc import Sequence

_OWN = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more, but not Chinese, Japanese, Korean or Thai."""

_PLACEHOLDERS = "Last Resort"
"""Comes with matplotlib, too, and has a box for every character."""


def drawable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names of classes as the installed fonts can draw them, and the families of these fonts.

    A name with a character that no font has is replaced by its number: ``class 3``. Fonts are opened, which takes a
    while if there are many, only as long as characters are missing.

    Returns:
        a name for each, with dollars that don't begin a formula, and families for matplotlib's ``fontfamily``, of which
        the first that has a character draws it.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    missing, families = {ord(character) for name in names for character in name}, [_OWN]
    upright = {font.name for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)}
    for family in sorted(upright, key=lambda family: (family != _OWN, family)):
        if not missing:
            break
        if family.startswith(_PLACEHOLDERS):
            continue
        try:  # matplotlib keeps its list, which may be of another machine or of fonts removed since
            characters = FT2Font(findfont(FontProperties(family=[family]))).get_charmap().keys()
        except (OSError, RuntimeError):
            continue
        if missing & characters:
            missing -= characters
            families += [family] if family != _OWN else []
    shown = [f"class {i}" if missing.intersection(map(ord, name)) else name for i, name in enumerate(names)]
    return [name.replace("$", r"\$") for name in shown], families
