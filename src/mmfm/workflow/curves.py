"""Names of curves: those of results in which one part lists its values, such as ``dinov2_mode.t5,10,25``."""

import re

VALUE = r"\d+(?:\.\d+)?"
"""Regular expression for a value."""

_LIST = re.compile(rf"\.(t|step|g|k)({VALUE}(?:,{VALUE})+)(?![^.])")

EXAMPLE = "dinov2_mode.t5,10,25"


def expand(name: str) -> tuple[str, list[str]]:
    """Return what varies, and the name of the result at each point.

    Args:
        name: ``ENCODER_SETTING[_ag].VARIANT`` with one part that lists its values, in which order doesn't matter.

    Returns:
        the part (``t``, ``step``, ``g`` or ``k``), and a name for each value.

    Raises:
        ValueError: no part or more than one lists values, or a value is there twice.
    """
    found = list(_LIST.finditer(name))
    if len(found) != 1:
        listing = " and ".join(f"'{match[0]}'" for match in found) if found else "no part"
        raise ValueError(
            f"'{name}' does not name a curve: {listing} of it lists values; let exactly one of .t, .step, .g and .k do "
            f"so, as in {EXAMPLE}"
        )
    match = found[0]
    values = match[2].split(",")
    if len({float(value) for value in values}) < len(values):
        raise ValueError(f"'{match[0]}' has a value twice; name each point of a curve once")
    return match[1], [f"{name[: match.start()]}.{match[1]}{value}{name[match.end() :]}" for value in values]
