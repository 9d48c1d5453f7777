"""What a results folder says of its runs: the jobs' time and memory, and the configuration."""

import csv
from collections.abc import Iterable
from pathlib import Path

import yaml

from mmfm.config.registry import STAGES
from mmfm.evaluation.comparison import Comparison
from mmfm.evaluation.comparison_page import Jobs, Run
from mmfm.infra import store
from mmfm.workflow import last_run


def runs_of(comparison: Comparison) -> list[Run]:
    """Return what the results folders of a comparison say of their runs, in the order of the results."""
    folders = dict.fromkeys(result.folder for result in comparison.results)
    return [Run(folder, _jobs(folder / "benchmarks"), _configuration(folder)) for folder in folders]


def _jobs(folder: Path) -> list[Jobs]:
    """Sum the resource records of Snakemake by rule: stages in their order, then other rules."""
    records: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.glob("*.tsv")):
        with path.open(newline="") as file:
            records.setdefault(path.name.partition(".")[0], []).extend(csv.DictReader(file, delimiter="\t"))
    order = [*STAGES, *sorted(set(records) - set(STAGES))]
    found = []
    for rule in (rule for rule in order if records.get(rule)):
        rows = records[rule]
        peaks = _numbers(row.get("max_rss") for row in rows)
        found.append(Jobs(rule, len(rows), sum(_numbers(row.get("s") for row in rows)), max(peaks, default=None)))
    return found


def _numbers(texts: Iterable[str | None]) -> list[float]:
    """Return the numbers among the cells; a job too short to be measured has ``NA``."""
    return [float(text) for text in texts if text and text[0].isdigit()]


def _configuration(folder: Path) -> str:
    path = folder / last_run.FILE
    if not path.is_file():
        return ""
    return yaml.safe_dump(store.read_json(path)["configuration"], sort_keys=True, allow_unicode=True)
