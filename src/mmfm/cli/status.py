"""``mmfm status``: what is finished, running, stopped and failed."""

import argparse
import shutil
import sys
import time
from pathlib import Path

DESCRIPTION = """\
Show what is finished, running, stopped and failed in a results folder.

  mmfm status                      of results/ and the runs in it
  mmfm status results/flowers      of one run
  mmfm status --watch              again every few seconds, until Ctrl-C

Only files in the folder are read, so this works on any machine that sees it, while jobs run on others and after
Snakemake has died; nothing is written. A running stage says every 10 seconds how far it is, in its state directory
(docs/results-format.md). One that has said nothing for 5 minutes counts as stopped, on its own machine as soon as its
process is gone. Jobs without state, such as `fid`, are known from their logs alone, so only if Snakemake started them;
a job that waits in a queue is not known."""

_EVERY = 5.0
"""Seconds between two looks of ``--watch``."""


def main(arguments: list[str]) -> int:
    """Print the state of results folders, once or repeatedly."""
    parser = argparse.ArgumentParser(
        prog="mmfm status", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="*", default=[Path("results")], help="folders of results (default: results)"
    )
    parser.add_argument("--watch", action="store_true", help="repeat until Ctrl-C")
    options = parser.parse_args(arguments)
    if not options.watch:
        print(*_look(options.results), sep="\n")
        return 0
    try:
        if sys.stdout.isatty():
            print("\x1b[2J", end="")
        while True:
            _show(_look(options.results))
            time.sleep(_EVERY)
    except KeyboardInterrupt:
        return 0


def _look(places: list[Path]) -> list[str]:
    from mmfm.workflow import status, status_text

    now, blocks = time.time(), []
    for place in places:
        folders = status.find(place)
        found = [status.read(folder, now, folders[1:] if folder == place else ()) for folder in folders]
        told = [status_text.render(one) for one in found if not status_text.is_empty(one)]
        blocks += told or [[f"{place}: nothing is finished, and nothing runs"]]
    return [line for block in blocks for line in ("", *block)][1:]


def _show(lines: list[str]) -> None:
    """Print lines over the earlier ones on a terminal, as many as fit; elsewhere after them, with the time."""
    clock = time.strftime("%H:%M:%S")
    if sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        fit = [clock, *lines][: height - 1]
        hidden = len(lines) + 1 - len(fit)
        fit[0] += f" ({hidden} more lines do not fit)" if hidden else ""
        # Home, clear each line's rest, clear what is below: no flicker, and nothing scrolls.
        print("\x1b[H" + "".join(f"{line[: width - 1]}\x1b[K\n" for line in fit) + "\x1b[J", end="", flush=True)
    else:
        print(clock, *lines, "", sep="\n", flush=True)
