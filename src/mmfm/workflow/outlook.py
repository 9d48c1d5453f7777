"""What a run of the default target is about to make, and how long that takes."""

from collections.abc import Mapping, Sequence


def outlook(targets: Sequence[str], jobs: Mapping[str, int], seconds: Mapping[str, float] | None) -> str:
    """Return one line for a run without a named target.

    Args:
        targets: files that it makes.
        jobs: number of jobs still to do, by rule.
        seconds: estimated time of each rule's job; None if the number of images is not known.
    """
    count = sum(jobs.values())
    if seconds is None:
        time = "how long that takes depends on the number of images: `mmfm scale --images N`"
    else:
        total = sum(number * seconds.get(rule, 0.0) for rule, number in jobs.items())
        time = f"about {duration(total)} by the estimates of `mmfm scale`"
    return f"No target was named, so this makes {', '.join(targets)}: {count} job{'s' * (count != 1)}, {time}."


def duration(seconds: float) -> str:
    """Format a time in the largest unit that it fills."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} s"
