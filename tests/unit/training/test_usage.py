"""What the history says of a step's use of its device: the encoder's share of the time, and MFU."""

from typing import ClassVar

import pytest
import torch

from mmfm import config
from mmfm.cli import train_decoder
from mmfm.config import STAGES
from mmfm.models.flops import dit_flops
from mmfm.training.history import read_history
from mmfm.training.usage import Stopwatch, bf16_peak
from support.tiny import CHANNELS, GRID, SECTIONS, settings
from support.train_runs import assert_same, run


class Event:
    """A mark in a GPU's queue, which the GPU passes when the test says so."""

    now: float = 0.0
    made: ClassVar[list["Event"]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at, self.passed = None, False
        Event.made.append(self)

    def record(self) -> None:
        self.at, Event.now = Event.now, Event.now + 250.0

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end: "Event") -> float:
        assert self.passed and end.passed, "would wait, or fail"
        return end.at - self.at


def test_the_time_of_a_gpu_is_read_when_it_is_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    double = watch.timed(lambda x: 2 * x)
    assert [double(1), double(2), double(3)] == [2, 4, 6] and watch.take() == 0
    for event in Event.made[:4]:
        event.passed = True
    assert watch.take() == 0.5 and watch.take() == 0
    for event in Event.made[4:]:
        event.passed = True
    assert watch.take() == 0.25


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla T4", 0.0),
        ("NVIDIA GH200 480GB", 0.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0.0),
    ],
)
def test_the_peak_is_that_of_the_card(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bf16_peak(torch.device("cuda", 1)) == peak and bf16_peak(torch.device("cpu")) == 0


def test_the_history_says_what_the_encoder_and_the_model_take(tiny_pipeline, tmp_path, monkeypatch):
    usual, known, cache = tmp_path / "usual", tmp_path / "known", {"cache": "on", "folder": str(tmp_path / "latents")}
    run(tiny_pipeline, usual, epochs=1, latents={"cache": "off"})
    lines = read_history(usual / "history.jsonl")
    assert lines and all(0 < line["encoder_share"] <= 1 and "mfu" not in line for line in lines), "a CPU has no peak"
    monkeypatch.setattr("mmfm.training.trainer.bf16_peak", lambda device: 1e11)
    run(tiny_pipeline, known, epochs=1, latents=cache)
    assert_same(known, usual)
    flops = 3 * dit_flops(config.Model(*(tuple(v) for v in SECTIONS["model"].values())), GRID**2, CHANNELS)
    for line in read_history(known / "history.jsonl"):
        assert line["encoder_share"] == 0, "latents come from the disk"
        assert (
            line["mfu"] == pytest.approx(line["images_per_second"] * flops / 1e11, rel=0.01, abs=1e-4) and line["mfu"]
        )


def test_the_history_of_a_decoder_has_both_too(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfm.training.trainer.bf16_peak", lambda device: 1e11)
    monkeypatch.setattr("mmfm.stages.train_decoder._LOG_EVERY", 4)
    sections = settings(STAGES["train_decoder"].sections, decoder={"steps": 4}, latents={"cache": "off"})
    given = {"--listing": tiny_pipeline.listing, "--encoder-weights": tiny_pipeline.encoder, "--out-dir": tmp_path}
    command = [str(word) for pair in given.items() for word in pair]
    assert train_decoder.main([*command, "--settings", sections]) == 0
    (line,) = read_history(tmp_path / "history.jsonl")
    assert line["encoder_share"] > 0 and line["mfu"] > 0
