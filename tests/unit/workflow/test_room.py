"""`mmfm doctor TARGET`: whether a target's stages fit a machine."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mmfm import config
from mmfm.cli.__main__ import main
from mmfm.infra import disk
from mmfm.workflow import facts, room, targets, this_cpu
from mmfm.workflow.resources import for_target, together
from support.places import DEFAULTS, ROOT

GB = 10**9
LOADED = config.load([DEFAULTS])
CPU = room.Machine(1, None, 100 * GB)
TARGET = targets.parse_target("dinov2_mode_ag.t10.txt", LOADED)
FOUND = for_target(LOADED, TARGET, 1, False, facts.assumed(LOADED))


def test_stages_of_a_comparison_have_the_remedies_of_the_stage():
    many = {"train (mode)": replace(FOUND["train"], host=200 * GB)}
    [problem] = room.problems(many, [], CPU)
    assert "lower train.micro_batch (see also" in problem


def test_finished_stages_take_no_more(tmp_path):
    assert room.unfinished(FOUND, TARGET, tmp_path) == FOUND
    made = {
        "extract": "cls_tokens/dinov2/cls_tokens.zarr",
        "fit_gmm": "gmm/dinov2/k256/gmm.safetensors",
        "train": "train/dinov2_mode/seed0.tiny.k256/ema.safetensors",
        "train (guide)": "train/dinov2_mode/seed0.tiny.k256.guide/ema.safetensors",
        "sample": "sample/dinov2_mode_ag/seed0.tiny.k256.t10.g1.5/images.npz",
        "fid_reference": "fid_reference/reference.safetensors",
    }
    assert TARGET.variant.g == 1.5
    for stage, place in made.items():
        before = room.unfinished(FOUND, TARGET, tmp_path)
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        assert set(before) - set(room.unfinished(FOUND, TARGET, tmp_path)) == {stage}
    other = replace(TARGET, variant=replace(TARGET.variant, seed=1))
    assert {"train", "sample"} < set(room.unfinished(FOUND, other, tmp_path))


def test_the_latent_cache_counts_once_and_lies_apart(tmp_path):
    sizes = {name: replace(FOUND["train"], disk=5 * GB + c, cached=c) for name, c in (("a", 3 * GB), ("b", 2 * GB))}
    results, latents = tmp_path / "results", tmp_path / "latents"
    cached = room.caches([(TARGET, sizes)])
    assert cached == 3 * GB
    ((folders, needed, free),) = room.disk_needs(sizes, cached, results, latents)
    assert (folders, needed) == ([results, latents], 13 * GB)
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, abs=GB)
    latents.mkdir()
    with open(latents / "shard", "wb") as file:
        file.truncate(GB)
    assert room.disk_needs(sizes, cached, results, latents)[0][1] == 12 * GB
    with open(latents / "shard", "wb") as file:
        file.truncate(4 * GB)
    assert [(folders, needed) for folders, needed, _ in room.disk_needs(sizes, cached, results, latents)] == [
        ([results], 10 * GB)
    ]


def test_processes_share_what_a_cpu_does(monkeypatch):
    monkeypatch.setattr(this_cpu, "measured_rate", lambda: 4e11)
    assert this_cpu.rates(2).single == this_cpu.rates().single / 2 == this_cpu.rates_for(1e5, 2).half


def test_an_input_below_a_patch_is_left_to_the_check_of_encoders():
    """Which names the key; the estimates come before it."""
    small = {**LOADED.encoders, "dinov2": replace(LOADED.encoders["dinov2"], input_size=8, weights="hf:a/b")}
    assert for_target(replace(LOADED, encoders=small), TARGET, 1, False, facts.assumed(LOADED))


def test_several_encoders_have_a_cache_each_and_a_reference_together():
    """But each its own where the features are the encoder's."""
    other = replace(TARGET, encoder="siglip2")
    needs = [(TARGET, FOUND), (replace(TARGET, setting="gmm"), FOUND), (other, FOUND)]
    assert room.caches(needs) == 2 * room.caches(needs[:1]) > 0
    found = together(LOADED, needs)
    assert {"extract (dinov2)", "extract (siglip2)", "train (dinov2_gmm)", "fid_reference"} < set(found)
    own = replace(LOADED, fid=replace(LOADED.fid, detector="encoder", encoder=""))
    assert {"fid_reference (dinov2)", "fid_reference (siglip2)"} < set(together(own, needs))


def test_estimates_say_what_of_the_disk_is_the_cache():
    cached = {name: taken.cached for name, taken in FOUND.items() if taken.cached}
    assert set(cached) == {"extract", "spatial_gmm", "train", "train (guide)"}
    off = replace(LOADED, latents=replace(LOADED.latents, cache="off"))
    without = for_target(off, TARGET, 1, False, facts.assumed(LOADED))
    for name, taken in FOUND.items():
        assert taken.disk - taken.cached == pytest.approx(without[name].disk) and without[name].cached == 0


def test_what_does_not_fit_is_said_with_a_remedy():
    assert list(room.problems(FOUND, [([Path("results")], 5, 6)], CPU)) == []
    (said,) = room.problems(FOUND, [([Path("results")], 6 * GB, 5 * GB)], CPU)
    assert said.startswith("'results' will take about 6.0 GB more, but only 5.0 GB are free; ")
    need = 1e6 * FOUND["train"].mem_mb(1, False)
    said = list(room.problems({"train": FOUND["train"]}, [], replace(CPU, memory=int(need) - 1)))
    assert len(said) == 1 and "train needs about 3.2 GB of memory" in said[0] and "lower train.micro_batch" in said[0]
    assert not list(room.problems({"train": FOUND["train"]}, [], replace(CPU, memory=int(need) + 1)))


def test_gpu_memory_counts_with_a_reserve():
    on_gpu = {"sample": replace(FOUND["sample"], device=9.6 * GB)}
    (said,) = room.problems(on_gpu, [], room.Machine(1, 10 * GB, 100 * GB))
    assert "sample needs about 9.6 GB of GPU memory, but a card has 10.0 GB; lower sample.batch_size" in said
    assert not list(room.problems(on_gpu, [], room.Machine(1, 11 * GB, 100 * GB)))
    assert not list(room.problems(on_gpu, [], room.Machine(1, 0, 100 * GB)))  # not known


def test_control_groups_limit_the_memory(tmp_path, monkeypatch):
    whole, place = room.memory(), Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)
    monkeypatch.setattr(room, "_CGROUPS", tmp_path)
    assert room.memory() >= whole
    if place[1] in ("", "memory"):
        root, name = tmp_path / place[1], "memory.limit_in_bytes" if place[1] else "memory.max"
        root.mkdir(exist_ok=True)
        (root / name).write_text(f"{GB}\n")
        assert room.memory() == GB
        (root / name).write_text("max\n")
        assert room.memory() >= whole


def test_a_machine_that_would_take_months_is_too_slow():
    days = [list(room.problems({"train": replace(FOUND["train"], seconds=n * 86400)}, [], CPU)) for n in (59, 1234)]
    assert days[0] == []
    (said,) = days[1]
    assert said.startswith("this machine is too slow: the stages would take about 1,234.0 d; take one with GPUs")


def test_missing_images_are_a_problem_where_a_stage_reads_them(tmp_path):
    def said(left, root="nowhere", reference="train"):
        changed = {"data": replace(LOADED.data, root=root), "fid": replace(LOADED.fid, reference=reference)}
        return room.missing_images({name: FOUND[name] for name in left}, replace(LOADED, **changed), tmp_path)

    for stage in ("extract", "train (guide)", "fid_reference"):
        assert said([stage]).startswith("'data.root' is 'nowhere', which is not a folder; set it")
    assert not said(FOUND, root="demo") and not said(FOUND, root=str(tmp_path))
    assert not said(["sample", "fid"]) and not said(["fid_reference"], reference="their.npz")
    (tmp_path / "list_images").mkdir()
    (tmp_path / "list_images" / "listing.train.safetensors").touch()
    assert not said(FOUND), "they are listed already"


def test_the_command_ends_with_a_verdict(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("config", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    target = "results/fid/dinov2_mode.txt"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(room, "memory", lambda: 100 * GB)
    monkeypatch.setattr(this_cpu, "measured_rate", lambda: 4e11)
    assert main(["doctor", target]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"'{target}' fits this machine\n") and "BLAS: " in text and "faiss" in text
    monkeypatch.setattr(disk, "free", lambda path: 10**6)
    assert main(["doctor", target]) == 1
    text = capsys.readouterr().out
    assert text.endswith(f"'{target}' will not run here as it is\n") and "problem: 'results'" in text
    line = ["doctor", "results/imagenet256/fid/dinov2_mode.txt", "--configfile", "config/imagenet256.yaml"]
    assert main(line) == 1
    text = capsys.readouterr().out
    assert "problem: 'data.root' is 'imagenet/train', which is not a folder" in text
    assert "problem: this machine is too slow: the stages would take about 1" in text
    (tmp_path / "own.yaml").write_text("run: mine\ngpus: 2\n")
    assert main(["doctor", "results/mine/fid/dinov2_mode.txt", "--configfile", "own.yaml"]) == 1
    assert "problem: 'gpus' is 2, but only 0 are available" in capsys.readouterr().out
    assert main(["doctor", "results/mine/comparison.txt", "--configfile", "own.yaml"]) == 1
    text = capsys.readouterr().out
    assert "  train (uncond)  " in text and "'results/mine/comparison.txt' will not run here as it is" in text
    assert main(["scale", "results/mine/comparison.txt", "--configfile", "own.yaml", "--gpus", "0"]) == 0
    assert "| `train (uncond)` |" in capsys.readouterr().out
    assert main(["doctor", target, "--configfile", "own.yaml"]) == 2
    assert "is not in 'results/mine/fid'" in capsys.readouterr().err
