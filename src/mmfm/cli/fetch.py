"""``mmfm fetch``: fetch published files and encoders from the hub, and the detector's weights."""

import argparse
from pathlib import Path

from mmfm.published.layout import REPOSITORY

DESCRIPTION = """\
Fetch files of a repository on the Hugging Face hub into a folder. Whole files are kept; an interrupted download goes on
where it stopped; each file ends with the digest that the hub gives. HF_ENDPOINT, HF_TOKEN and proxies work as usual.

  mmfm fetch normalization_stats/dinov2-b/stat.pt decoders/dinov2-b/ViTXL_n08/model.pt
  mmfm fetch --repository facebook/dinov2-with-registers-base --folder encoder config.json model.safetensors

Snakemake runs this for what a target needs. To fetch all that a configuration needs, and for one target only:

  snakemake results/imagenet256/fetched.txt --configfile config/imagenet256.yaml
  snakemake results/published/fid/dinov2_mode.txt --configfile config/published.yaml \\
      --until fetch_published fetch_encoder fetch_detector"""


def main(arguments: list[str]) -> int:
    """Fetch the named files, or one from an address."""
    parser = argparse.ArgumentParser(
        prog="mmfm fetch", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="path in the repository; with --url, the file to write"
    )
    parser.add_argument(
        "--repository", default=REPOSITORY, help="repository on the hub, or ID@REVISION (default: %(default)s)"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="where to (default: %(default)s)")
    parser.add_argument("--url", help="fetch one file from this address; its name ends in digits of its SHA-256")
    options = parser.parse_args(arguments)
    from mmfm.published import fetching

    if options.url:
        if len(options.files) > 1:
            parser.error("--url fetches one file")
        fetching.fetch_url(options.url, Path(options.files[0]))
    else:
        repository, _, revision = options.repository.partition("@")
        fetching.fetch(repository, revision or options.revision, options.files, options.folder)
    return 0
