"""Fetching files: from the Hugging Face hub, and the detector's weights from their release page.

Downloads resume where they stopped, and end with a digest that is checked: the hub's own, or the one in a file's name.
Access goes through huggingface_hub, so ``HF_ENDPOINT``, ``HF_TOKEN`` and the proxies' variables work as usual.
"""

import hashlib
import http.client
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mmfm.infra import disk, file_lock, store
from mmfm.infra.progress import Progress

RECORD = ".fetched.json"
"""Ending of the file beside a fetched file that says where it is from."""

_BLOCK = 1 << 20
_TIMEOUT = 60
_TRIES = 5
_PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may be another one in a moment."""
_NO_SPACE = "free some space, or set published.folder to a larger disk"


@dataclass(frozen=True)
class Remote:
    """A file of a repository on the hub.

    Attributes:
        path: below the repository's root.
        size: bytes.
        algorithm, digest: ``sha256`` of a large file's content; ``git``, the SHA-1 that Git gives it, of a small one's.
    """

    path: str
    size: int
    algorithm: str
    digest: str

    def is_at(self, file: Path) -> bool:
        """Whether a file has this content; reads it whole."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        if self.algorithm == "sha256":
            return store.file_digest(file) == self.digest
        return hashlib.sha1(b"blob %d\0" % self.size + file.read_bytes()).hexdigest() == self.digest


def look_up(repository: str, revision: str, paths: Sequence[str]) -> tuple[str, list[Remote]]:
    """Ask the hub for files of a repository.

    Returns:
        The commit that the revision stands for, and the files in the given order.

    Raises:
        ValueError: the hub can't be reached or refuses, or there is no such repository, revision or file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _explained(repository, revision):
        commit = str(HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT).sha)
        found = HfApi().get_paths_info(repository, list(paths), revision=commit)
    files = {
        file.path: Remote(file.path, file.size, "sha256", file.lfs.sha256)
        if file.lfs
        else Remote(file.path, file.size, "git", file.blob_id)
        for file in found
        if isinstance(file, RepoFile)
    }
    for path in paths:
        if path not in files:
            raise ValueError(
                f"'{repository}' has no file '{path}' at revision '{revision}'; check the name of the repository and "
                "the revision (published.repository, published.revision; for an encoder, its `weights`)"
            )
    return commit, [files[path] for path in paths]


def announce(repository: str, files: Sequence[Remote], folder: Path, commit: str) -> None:
    """Say how much there is to fetch, after checking that the disk can hold it.

    Raises:
        ValueError: it can't.
    """
    missing = [file for file in files if not (folder / file.path).is_file()]
    total = sum(file.size for file in missing)
    if missing:
        number = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
        what = f"fetch: {number}, {total / 1e9:,.2f} GB, of {repository} at commit {commit[:12]}"
        print(f"{what} to '{folder}' ({disk.free(folder) / 1e9:,.0f} GB free)", file=sys.stderr, flush=True)
    begun = [path for file in missing if (path := _partial(folder / file.path)).is_file()]
    there = sum(path.stat().st_size for path in begun)
    disk.require(folder / "fetched", "fetch", total, written=min(there, total), remedy=_NO_SPACE)


def fetch(repository: str, revision: str, paths: Sequence[str], folder: Path) -> None:
    """Fetch files of a repository into a folder, under their paths in the repository.

    What an interrupted call has fetched is kept in ``NAME.partial``; the next one goes on from there. Beside each file,
    ``NAME.fetched.json`` records repository, commit, size and digest.

    Raises:
        ValueError: as :func:`look_up` and :func:`announce`; or a file has another digest than the hub says.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    commit, files = look_up(repository, revision, paths)
    announce(repository, files, folder, commit)
    for file in files:
        target = folder / file.path
        if not file.is_at(target):
            partial = _partial(target)
            _download(hf_hub_url(repository, file.path, revision=commit), partial, build_hf_headers(), file.size)
            if not file.is_at(partial):
                partial.unlink()
                raise ValueError(
                    f"what the hub gave for '{file.path}' does not have its digest {file.digest[:12]}, and was "
                    "removed; fetch it again"
                )
            partial.replace(target)
        about = {"repository": repository, "commit": commit, "size": file.size, file.algorithm: file.digest}
        store.write_json(target.with_name(target.name + RECORD), about)


def fetch_url(url: str, target: Path) -> None:
    """Fetch a file whose name ends in the first digits of its SHA-256, as ``weights-6726825d.pth``; resumes.

    Raises:
        ValueError: the address can't be read, or the content has another digest.
    """
    match = re.search(r"-([0-9a-f]{8,})\.", target.name)
    if match is None:
        raise ValueError(f"'{target.name}' carries no digest; give the file the name that it was published under")
    partial = _partial(target)
    _download(url, partial)
    digest = store.file_digest(partial)
    if not digest.startswith(match[1]):
        partial.unlink()
        raise ValueError(f"what '{url}' gave has the digest {digest[:12]}, not {match[1]}, and was removed; try again")
    partial.replace(target)


def _partial(target: Path) -> Path:
    """Return where an unfinished download of a file lies. (huggingface_hub's own begin anew in every process.)"""
    return target.with_name(target.name + ".partial")


def _download(url: str, partial: Path, headers: Mapping[str, str] | None = None, size: int | None = None) -> None:
    """Append what a file lacks of the content at an address, through several broken connections.

    Raises:
        ValueError: the address can't be read, or the connection breaks again and again without a byte.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    with partial.open("ab") as file:
        if file_lock.try_lock(file) is False:
            raise ValueError(f"another process is fetching '{partial.with_suffix('')}'; wait until it has finished")
        if size is not None and file.tell() > size:
            _empty(file)
        while True:
            before = file.tell()
            try:
                return _append(url, file, headers or {}, size)
            except (OSError, http.client.HTTPException) as error:
                if disk.is_full(error, partial):
                    raise
                file.flush()
                tries = 0 if file.tell() > before else tries + 1
                final = isinstance(error, urllib.error.HTTPError) and error.code not in _PASSING
                if tries >= _TRIES or final:
                    raise ValueError(
                        f"'{url}' can't be fetched ({error}); run the same command again to go on, or fetch it where "
                        f"there is a network, and put it at '{partial.with_suffix('')}'"
                    ) from error
                time.sleep(tries)


def _append(url: str, file: BinaryIO, headers: Mapping[str, str], size: int | None) -> None:
    """Append what a file lacks of the content at an address, in one request."""
    have = file.tell()
    if have and have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a token is not for the servers that the hub redirects to
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left: the digest says whether it is whole
            return
        raise
    with response:
        if have and response.status != 206:  # the server can't resume
            _empty(file)
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        disk.require(Path(file.name), "fetch", total, written=have, remedy=_NO_SPACE)
        with Progress(f"fetch {Path(file.name).stem}", total // _BLOCK, "MiB", done=have // _BLOCK) as progress:
            while block := response.read(_BLOCK):
                file.write(block)
                progress.advance(file.tell() // _BLOCK - progress.done)
        if file.tell() < total:
            raise OSError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _empty(file: BinaryIO) -> None:
    file.truncate(0)
    file.seek(0)


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Turn the hub's errors into one line with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        if isinstance(error, errors.GatedRepoError):
            said, remedy = "asks for consent", "accept its terms on the hub, and set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            said, remedy = "has no such revision", "set the revision to a branch, a tag or a commit"
        elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            said, remedy = "is not there, or not for you", "check its name, or set HF_TOKEN"
        else:
            said = "can't be reached"
            remedy = (
                "run the same command where there is a network, or set published.root (of an encoder, its `weights`) "
                "to a folder that has the files"
            )
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"'{repository}' (revision '{revision}') {said} ({reason.rstrip('.')}); {remedy}") from error
