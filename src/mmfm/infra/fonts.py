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
        a name for each, and families for matplotlib's ``fontfamily``, of which the first that has a character draws it.
    """
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    missing, families = {ord(character) for name in names for character in name}, [_OWN]
    known = (font for font in fontManager.ttflist if not font.name.startswith(_PLACEHOLDERS))
    for font in sorted(known, key=lambda font: (font.name != _OWN, font.style != "normal", font.weight != 400)):
        if not missing:
            break
        if found := missing & FT2Font(font.fname).get_charmap().keys():
            missing -= found
            families += [font.name] if font.name not in families else []
    shown = [f"class {i}" if missing.intersection(map(ord, name)) else name for i, name in enumerate(names)]
    return shown, families
