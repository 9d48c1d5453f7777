"""Print time and peak memory of each stage, from Snakemake's benchmark files.

python benchmarks/stage_times.py [results]
"""

import csv
import sys
from pathlib import Path

ORDER = (
    "demo_images", "list_images", "extract", "latent_stats", "fit_gmm", "spatial_gmm", "train_decoder", "given_decoder",
    "train", "sample", "fid_reference", "fid",
)  # fmt: skip


def main() -> None:
    """Print a Markdown table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results") / "benchmarks"
    rows = []
    for path in folder.glob("*.tsv"):
        stage, _, job = path.stem.partition(".")
        if stage in ORDER:
            with path.open() as file:
                record = next(csv.DictReader(file, delimiter="\t"))
            rows.append((ORDER.index(stage), stage, job, float(record["s"]), float(record["max_rss"] or 0)))
    print("| stage | job | seconds | peak memory |\n|---|---|---|---|")
    for _, stage, job, seconds, memory in sorted(rows):
        print(f"| `{stage}` | {job} | {seconds:.1f} | {memory / 1000:.1f} GB |")
    print(f"| sum | | {sum(row[3] for row in rows):.1f} | |")


if __name__ == "__main__":
    main()
