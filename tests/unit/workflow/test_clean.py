"""`mmfm clean --unused` removes the state that nothing refers to, and nothing else."""

import dataclasses
import fcntl
from pathlib import Path

import numpy as np
import pytest

from mmfm import config
from mmfm.cli.__main__ import main
from mmfm.infra import stage_state, store
from mmfm.workflow import last_run
from support.latent_fills import open_cache
from support.places import DEFAULTS

CONFIGURATION = config.load([DEFAULTS])
FOLDERS = ["extract", "fit_gmm", "spatial_gmm", "train_decoder", "train", "sample", "fid_reference", "gmm", "dec"]
FOLDERS += ["reconstruction", "a", "b", "c", "other", "third", "running"]


def make(output: Path, stage: str, settings: config.Config = CONFIGURATION, inputs=None, files=None, **more) -> Path:
    """Make the state directory that a stage would make with these settings, and end its process's hold on it."""
    if stage in ("train", "sample"):
        more["setting"] = more.get("setting", "mode")
    read = config.StageConfig.of(settings, stage, encoder="dinov2", setting=more.get("setting"))
    identity = read.identity() | more
    version = config.STAGES[stage].version
    state = stage_state.state_directory(output, stage, version, identity, inputs or {}, files)
    (state / "step-00000001").mkdir(exist_ok=True)
    (state / "step-00000001" / "model.safetensors").write_bytes(bytes(1000))
    stage_state.unlock(state)
    return state


def change(section: str, **keys) -> config.Config:
    """Return the default configuration with some keys of a section changed."""
    return dataclasses.replace(CONFIGURATION, **{section: dataclasses.replace(getattr(CONFIGURATION, section), **keys)})


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    (folder / "fid").mkdir(parents=True)
    (folder / "fid" / "dinov2_mode.txt").write_text("4.84")
    last_run.save(CONFIGURATION, folder, FOLDERS)
    return folder


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_changed_setting_frees_the_state_of_the_old_one(results, capsys):
    kept = [
        make(results / stage / "dinov2" / "x", stage)
        for stage in ("extract", "fit_gmm", "spatial_gmm", "train_decoder", "train", "sample", "fid_reference")
    ]
    kept += [
        # Another value of what a name can carry, of operation and of budget.
        make(results / "a" / "x", "fit_gmm", change("gmm", n_components=7, max_iter=3)),
        make(results / "b" / "x", "train", change("train", seed=5, model="S", workers=3, epochs=1)),
        make(results / "c" / "x", "sample", change("sample", time_points=4)),
        make(results / "c" / "guided", "sample", change("sample", guidance=config.Guidance(1.5, (0.0, 0.8)))),
    ]  # fmt: skip
    doomed = [
        make(results / "gmm" / "x", "fit_gmm", change("gmm", tol=0.1)),
        make(results / "train" / "x", "train", change("train", lr=0.5)),
        make(results / "dec" / "x", "train_decoder", change("image", size=64)),
    ]
    everything = snapshot(results)
    assert main(["clean", "--unused", "--dry-run", str(results)]) == 0
    listed = capsys.readouterr().out
    assert snapshot(results) == everything
    assert listed.count("would remove") == len(doomed) and all(str(path) in listed for path in doomed)
    assert "gmm.tol is 0.001, but was 0.1" in listed and "image.size is 32, but was 64" in listed
    assert main(["clean", "--unused", str(results)]) == 0
    assert snapshot(results) == everything - {p for path in doomed for p in (path, *snapshot(path))} - {
        p for p in everything for path in doomed if path in p.parents
    }
    assert all(path.is_dir() for path in kept) and not any(path.exists() for path in doomed)
    assert main(["clean", "--unused", str(results)]) == 0
    assert "0.00 MB freed" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["fid_reference", "reconstruction"])
def test_keys_that_a_stage_ignores_free_nothing(results, stage):
    """The state has the keys as the stage reads them (Fid.read_by), not as they are configured."""
    asked = change("fid", metrics=("frechet", "recall"), reference_images=5000)
    last_run.save(asked, results, FOLDERS)
    state = make(results / stage / "x", stage, asked)
    assert main(["clean", "--unused", str(results)]) == 0
    assert state.is_dir()
    last_run.save(change("fid", detector="inception", weights="fetch"), results, FOLDERS)
    assert main(["clean", "--unused", str(results)]) == 0
    assert not state.exists()


def test_a_raised_version_and_an_input_made_anew_free_a_state(results, monkeypatch, capsys):
    gmm, listing = results / "gmm.safetensors", results / "listing.safetensors"
    old = store.write_arrays(gmm, {"means": np.zeros(3)}, {})
    same = store.write_arrays(listing, {"labels": np.zeros(2)}, {})
    inputs, files = {"listing": same, "gmm": old}, {"listing": listing, "gmm": gmm}
    state = make(results / "train" / "x", "train", inputs=inputs, files=files)
    absent = make(results / "other" / "x", "train", inputs={"gmm": old}, files={"gmm": results / "later.safetensors"})
    silent = make(results / "third" / "x", "train", inputs={"gmm": "of unknown place"})
    assert main(["clean", "--unused", str(results)]) == 0
    assert state.is_dir()
    store.write_arrays(gmm, {"means": np.ones(3)}, {})
    assert main(["clean", "--unused", str(results)]) == 0
    assert not state.exists() and absent.is_dir() and silent.is_dir()
    assert "made from another gmm than '../gmm.safetensors'" in capsys.readouterr().out
    train = config.STAGES["train"]
    monkeypatch.setitem(config.STAGES, "train", dataclasses.replace(train, version=train.version + 1))
    assert main(["clean", "--unused", str(results)]) == 0
    assert not absent.exists() and not silent.exists() and "train is at version" in capsys.readouterr().out


def test_everything_else_stays(results, capsys):
    """Running stages, other runs, folders without a record, and what only looks like state."""
    other = change("gmm", tol=0.1)
    running = make(results / "running" / "x", "fit_gmm", other)
    stage_state.lock(running, "fit_gmm")
    last_run.save(other, results / "run2", FOLDERS)
    of_other_run = make(results / "run2" / "gmm" / "x", "fit_gmm", other)
    of_older_run = make(results / "run3" / "gmm" / "x", "fit_gmm", other)
    alike = results / "state-0123456789abcdef"
    alike.mkdir()
    (alike / "about.json").write_text((running / "about.json").read_text())
    link = results / "linked" / running.name
    link.parent.mkdir()
    unrecorded = make(results.parent / "unrecorded" / "x", "fit_gmm", other)
    link.symlink_to(unrecorded, target_is_directory=True)
    everything = snapshot(results.parent)
    try:
        assert main(["clean", "--unused", str(results)]) == 0
        assert f"in use, kept:   {running}" in capsys.readouterr().out
        assert main(["clean", "--unused", str(unrecorded.parent)]) == 0
        assert snapshot(results.parent) == everything and of_other_run.is_dir()
        assert of_older_run.is_dir()
    finally:
        stage_state.unlock(running)


def test_latent_caches_are_listed_and_removed_only_when_asked_for(tmp_path, capsys):
    folder, results = tmp_path / "kept" / "latents", tmp_path / "results"
    cache, filling = open_cache(folder), open_cache(folder, image_size=64)
    for each in (cache, filling):
        store.write_json(each.path / "about.json", each.key.about())
        (each.path / "view0-0.safetensors").write_bytes(bytes(3_000_000))
    foreign = folder / "mine-0123456789abcdef"
    store.write_json(foreign / "about.json", cache.key.about())
    last_run.save(change("latents", folder=str(folder)), results, FOLDERS)
    everything = snapshot(tmp_path)
    assert main(["clean", "--unused", str(results)]) == 0
    said = capsys.readouterr().out
    line = f"kept without --latents: {cache.path} (3.00 MB): latents of tiny, 32 px images at 32 px on cpu"
    assert line in said and str(foreign) not in said
    assert main(["clean", "--latents", "--dry-run", str(results)]) == 0
    assert capsys.readouterr().out.count("would remove") == 2 and snapshot(tmp_path) == everything
    with open(filling.path / "lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert main(["clean", "--latents", str(results)]) == 0
    said = capsys.readouterr().out
    assert f"in use, kept: {filling.path}" in said and f"removed: {cache.path}" in said
    assert set(folder.iterdir()) == {filling.path, foreign}
    assert main(["clean", "--latents", str(results)]) == 0
    assert main(["clean", "--latents", str(results)]) == 0
    assert "no latent caches" in capsys.readouterr().out and foreign.exists() and results.exists()


def test_without_locks_latent_caches_stay(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(37, "No locks available")

    cache = open_cache(tmp_path / "latents")
    store.write_json(cache.path / "about.json", cache.key.about())
    last_run.save(change("latents", folder=str(tmp_path / "latents")), tmp_path / "results", FOLDERS)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["clean", "--latents", str(tmp_path / "results")]) == 0
    assert f"in use, kept: {cache.path}" in capsys.readouterr().out and (cache.path / "about.json").exists()


def test_bad_calls_are_one_line(results, capsys):
    assert main(["clean", "--unused", str(results / "absent")]) == 2
    (results / last_run.FILE).write_text("{}")
    make(results / "gmm" / "x", "fit_gmm")
    assert main(["clean", "--unused", str(results)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no folder" in lines[0] and "is not a valid configuration" in lines[1]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_without_options_both_are_listed_and_nothing_is_removed(results, tmp_path, capsys, options):
    cache = open_cache(tmp_path / "latents")
    store.write_json(cache.path / "about.json", cache.key.about())
    last_run.save(change("latents", folder=str(tmp_path / "latents")), results, FOLDERS)
    state = make(results / "gmm" / "x", "fit_gmm", change("gmm", tol=0.1))
    everything = snapshot(tmp_path)
    assert main(["clean", *options, str(results)]) == 0
    said = capsys.readouterr().out
    assert f"would remove: {state} (" in said and f"would remove: {cache.path} (" in said
    assert said.splitlines()[-1] == "nothing was removed; --unused removes the state, --latents the latent caches"
    assert snapshot(tmp_path) == everything
