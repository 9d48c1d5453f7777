"""Fetching from a stand-in for the hub: resumption, digests, and what is said when it fails."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from mmfm.published import fetching
from support.hub import COMMIT, Hub, serving

CONTENT = bytes(range(256)) * 20_000  # 5 MB
NAMED = f"weights-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def hub():
    with serving(Hub(files={"a/large.pt": CONTENT, "config.json": b"{}", NAMED: CONTENT})) as served:
        yield served


def fetched(hub: Hub, folder, *paths: str, revision: str = "main"):
    """Fetch in a process of its own, because huggingface_hub reads the address once."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom mmfm.published import fetching\nfetching._TRIES = 2\n"
        "try:\n    fetching.fetch('some/model', sys.argv[2], sys.argv[3:], Path(sys.argv[1]))\n"
        "except ValueError as error:\n    sys.exit(f'error: {error}')\n"
    )
    environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), revision, *paths],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("large", [True, False])
def test_files_arrive_with_a_record_of_their_commit_and_digest(hub, tmp_path, large):
    hub.large = large
    run = fetched(hub, tmp_path, "a/large.pt", "config.json")
    assert run.returncode == 0, run.stderr
    assert "2 files, 0.01 GB, of some/model at commit 0123456789ab" in run.stderr
    assert (tmp_path / "a" / "large.pt").read_bytes() == CONTENT
    about = json.loads((tmp_path / "a" / "large.pt.fetched.json").read_text())
    algorithm = "sha256" if large else "git"
    digest = hub.entry("a/large.pt")["lfs"]["oid"] if large else hub.entry("a/large.pt")["oid"]
    assert about == {"repository": "some/model", "commit": COMMIT, "size": len(CONTENT), algorithm: digest}
    before = len(hub.requests)
    assert fetched(hub, tmp_path, "a/large.pt").returncode == 0
    assert not any("resolve" in path for path, _ in hub.requests[before:]), "a whole file is fetched again"


def test_a_repository_can_name_its_revision(hub, tmp_path):
    line = ["fetch", "--repository", f"some/model@{COMMIT}", "--folder", str(tmp_path), "config.json"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run([sys.executable, "-m", "mmfm.cli", *line], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "some/model at commit 0123456789ab" in run.stderr
    assert any(path.endswith(f"some/model/revision/{COMMIT}") for path, _ in hub.requests), hub.requests


def test_broken_connections_are_resumed_where_they_broke(hub, tmp_path):
    hub.drop_after = 2_000_000
    run = fetched(hub, tmp_path, "a/large.pt")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "a" / "large.pt").read_bytes() == CONTENT
    ranges = [asked for path, asked in hub.requests if "resolve" in path]
    assert ranges == ["", "bytes=2000000-", "bytes=4000000-"]


def test_another_process_goes_on_with_what_a_killed_one_left(hub, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large.pt.partial").write_bytes(CONTENT[:3_000_000])
    assert fetched(hub, tmp_path, "a/large.pt").returncode == 0
    assert [asked for path, asked in hub.requests if "resolve" in path] == ["bytes=3000000-"]
    assert (tmp_path / "a" / "large.pt").read_bytes() == CONTENT and not list(tmp_path.rglob("*.partial"))


def test_a_server_without_ranges_is_read_from_the_start(hub, tmp_path):
    hub.ranges = False
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large.pt.partial").write_bytes(b"x" * 1000)
    assert fetched(hub, tmp_path, "a/large.pt").returncode == 0
    assert (tmp_path / "a" / "large.pt").read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_begun_anew(hub, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large.pt.partial").write_bytes(bytes(len(CONTENT) + 5))
    assert fetched(hub, tmp_path, "a/large.pt").returncode == 0
    assert (tmp_path / "a" / "large.pt").read_bytes() == CONTENT


def test_two_processes_do_not_write_one_file(hub, tmp_path):
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "large.pt.partial").open("ab") as held:
        assert fetching.file_lock.try_lock(held)
        assert "another process is fetching" in fetched(hub, tmp_path, "a/large.pt").stderr


def test_content_with_another_digest_is_refused_and_removed(hub, tmp_path):
    hub.wrong = True
    run = fetched(hub, tmp_path, "a/large.pt")
    assert "error: what the hub gave for 'a/large.pt' does not have its digest" in run.stderr
    assert not list(tmp_path.rglob("large.pt*"))


def test_errors_of_the_hub_are_one_line_with_a_remedy(hub, tmp_path):
    assert "has no such revision" in fetched(hub, tmp_path, "config.json", revision="typo").stderr
    assert "has no file 'other.pt' at revision 'main'; check the name" in fetched(hub, tmp_path, "other.pt").stderr
    hub.status = 401
    run = fetched(hub, tmp_path, "config.json")
    assert "check its name, or set HF_TOKEN" in run.stderr
    hub.status, hub.address = 200, "http://127.0.0.1:9"  # nobody listens there
    run = fetched(hub, tmp_path, "config.json")
    assert "error: 'some/model' (revision 'main') can't be reached" in run.stderr
    assert "where there is a network, or set published.root" in run.stderr
    assert "Traceback" not in run.stderr


def test_more_than_the_disk_holds_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.disk, "free", lambda path: 1000)
    huge = fetching.Remote("a.pt", 2000, "sha256", "")
    with pytest.raises(ValueError, match=r"fetch still has about .* GB to write.*published.folder"):
        fetching.announce("some/model", [huge], tmp_path, COMMIT)
    (tmp_path / "a.pt.partial").write_bytes(bytes(1500))
    fetching.announce("some/model", [huge], tmp_path, COMMIT)


def test_a_file_from_an_address_is_resumed_and_checked_by_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_TRIES", 2)
    hub.drop_after = 2_000_000
    fetching.fetch_url(f"{hub.address}/{NAMED}", tmp_path / NAMED)
    assert (tmp_path / NAMED).read_bytes() == CONTENT
    hub.wrong, hub.drop_after = True, 0
    with pytest.raises(ValueError, match=r"has the digest .* and was removed"):
        fetching.fetch_url(f"{hub.address}/{NAMED}", tmp_path / "again" / NAMED)
    with pytest.raises(ValueError, match="carries no digest"):
        fetching.fetch_url(f"{hub.address}/{NAMED}", tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"can't be fetched .*run the same command again"):
        fetching.fetch_url(f"{hub.address}/missing-12345678.pth", tmp_path / "missing-12345678.pth")


def test_a_token_stays_with_the_hub(hub, tmp_path, monkeypatch):
    seen = []

    class Response:
        status, headers = 200, {"Content-Length": "0"}

        def read(self, size):
            return b""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def urlopen(request, timeout):
        seen.append((dict(request.headers), dict(request.unredirected_hdrs)))
        return Response()

    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    with (tmp_path / "f").open("ab") as file:
        fetching._append("http://hub/f", file, {"Authorization": "Bearer secret"}, None)
    redirected, own = seen[0]
    assert own["Authorization"] == "Bearer secret" and "Authorization" not in redirected
