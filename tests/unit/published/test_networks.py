"""Import of checkpoints and decoders: what arrives, and what is refused."""

import itertools
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from mmfm import config
from mmfm.autoencoder.decoder import Decoder, DecoderConfig, load_decoder
from mmfm.flow.path import time_grid
from mmfm.infra import store
from mmfm.models.dit import DIT_PRESETS, DiT, DiTConfig
from mmfm.models.weights import load_ema
from mmfm.published.networks import TABLE, Expected, import_decoder, import_weights
from support import published_folder as tiny
from support.places import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "dit_state_dicts.json").read_text())
ENCODER = {"family": "dinov2", "weights": "hf:some/encoder", "input_size": 56}
SHAPE = (tiny.CHANNELS, tiny.GRID, tiny.GRID)


def expected(setting="mode", model=tiny.MODEL, modes=tiny.MODES, step=100_000) -> Expected:
    return Expected(setting, config.build(config.Model, model, "model"), modes, step, ENCODER, tiny.SIZE)


@pytest.fixture
def stats(tmp_path):
    torch.save({"mean": None, "var": torch.ones(SHAPE)}, tmp_path / "stats.pt")
    return tmp_path / "stats.pt"


@pytest.fixture
def imported(tmp_path, stats):
    """(content, expected) -> the model that arrives, and its metadata."""

    def run(content, wanted=None, **save):
        torch.save(content, tmp_path / "source.pt", **save)
        import_weights(tmp_path / "source.pt", tmp_path / "ema.safetensors", stats, wanted or expected())
        return load_ema(tmp_path / "ema.safetensors")

    return run


@pytest.mark.parametrize("save", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("bare", [False, True])
def test_the_average_of_a_checkpoint_arrives(imported, bare, save):
    model = tiny.network(tiny.MODEL)
    content = model.state_dict() if bare else tiny.checkpoint(model, "mode", 25_000)
    made, about = imported(content, expected(step=100_000), **save)
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
    assert about["setting"] == "mode" and made.config.num_classes == tiny.MODES and made.null_label is None
    assert about["step"] == (100_000 if bare else 25_000)
    assert about["settings"]["train"]["means_precision"] == "reference"


def golden_network():
    """Return tensors and sizes of the reference's small model."""
    with safe_open(ROOT / "tests" / "golden" / "dit_ddt_tiny.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def test_an_imported_model_moves_as_the_reference_does(tmp_path):
    """From a checkpoint to the reference's velocity and Euler trajectory, in float32."""
    tensors, sizes = golden_network()
    shape = (sizes["in_channels"], sizes["input_size"], sizes["input_size"])
    torch.save({"mean": None, "var": torch.ones(shape)}, tmp_path / "stats.pt")
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    torch.save({"ema": state, "train_steps": 7}, tmp_path / "source.pt")
    model = {name: sizes[name] for name in ("hidden_size", "depth", "num_heads")}
    wanted = expected("mode", model, modes=sizes["num_classes"])
    import_weights(tmp_path / "source.pt", tmp_path / "ema.safetensors", tmp_path / "stats.pt", wanted)
    made, about = load_ema(tmp_path / "ema.safetensors")
    assert about["step"] == 7 and made.null_label == sizes["num_classes"]
    x, y = tensors["x"], tensors["y"]
    with torch.no_grad():
        velocity = made(x, tensors["t"], y)
        assert (velocity - tensors["velocity"]).abs().max() <= 1e-5 * tensors["velocity"].abs().max()
        times, states = time_grid(8, 3.0), [x]
        for now, after in itertools.pairwise(times):
            states.append(states[-1] + (after - now) * made(states[-1], now.expand(len(x)), y))
    trajectory = tensors["euler_trajectory"]
    found = torch.stack(states[-len(trajectory) :])
    assert (found - trajectory).abs().max() <= 1e-5 * trajectory.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_becomes_float32(imported, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny.network(tiny.MODEL).state_dict().items()}
    made, _ = imported({"ema": state})
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in made.state_dict().items())


def test_the_digest_is_that_of_the_arrays(imported, tmp_path):
    made, about = imported({"ema": tiny.network(tiny.MODEL).state_dict()})
    arrays = {name: tensor.numpy() for name, tensor in made.state_dict().items()}
    assert about["digest"] == store.array_digest(*(arrays[name] for name in sorted(arrays)))


def test_a_model_without_labels_leaves_its_table_behind(imported):
    model = tiny.network(tiny.MODEL)
    made, about = imported(tiny.checkpoint(model, "gmm"), expected("gmm"))
    assert made.y_embedder is None and about["setting"] == "gmm"
    with torch.no_grad():
        x, t = torch.randn(2, *SHAPE), torch.rand(2)
        plain = DiT(replace(model.config, num_classes=0))
        plain.load_state_dict({n: v for n, v in model.state_dict().items() if n != TABLE})
        assert torch.equal(made(x, t), plain.eval()(x, t))


def test_one_more_row_is_the_null_label(imported):
    sizes = DiTConfig(tiny.GRID, 1, tiny.CHANNELS, **tiny.MODEL, num_classes=tiny.MODES, label_dropout=0.1)
    made, _ = imported({"ema": DiT(sizes).state_dict()})
    assert made.null_label == tiny.MODES


def test_class_conditional_weights_of_1000_classes(imported):
    sizes = DiTConfig(tiny.GRID, 1, tiny.CHANNELS, **tiny.MODEL, num_classes=1000, label_dropout=0.1)
    model = DiT(sizes)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.mul_(3)  # trained
    made, _ = imported(model.state_dict(), expected("class", modes=None))
    assert made.config.num_classes == 1000 and made.null_label == 1000


def refused(imported, message: str, content, wanted=None):
    with pytest.raises(ValueError, match=message) as caught:
        imported(content, wanted)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_something_else_are_refused(imported):
    model = tiny.network(tiny.MODEL)
    state = model.state_dict()
    refused(imported, "in the setting 'gmm', not 'mode'", tiny.checkpoint(model, "gmm"))
    refused(imported, "no average of them", {"model": state})
    refused(imported, "knows 6 labels, but the mixture has 4 modes", {"ema": state}, expected(modes=4))
    refused(imported, "knows 6 labels, but the mixture has 4 modes", {"ema": state}, expected("gmm", modes=4))
    refused(
        imported,
        "one for each mode, so it is not of the setting 'uncond'",
        {"ema": state},
        expected("uncond", modes=None),
    )
    refused(imported, "has no label table", {"ema": {n: v for n, v in state.items() if n != TABLE}})
    refused(
        imported, r"lacks 'blocks.3.*configured model", {"ema": state}, expected(model={**tiny.MODEL, "depth": [3, 1]})
    )
    refused(imported, r"'pos_embed' .* is \[1, 16, 32\], but \[1, 16, 16\]", {"ema": state}, expected(model=tiny.GUIDE))
    refused(imported, "has 'surplus', which the configured model lacks", {"ema": {**state, "surplus": torch.ones(1)}})
    refused(imported, "holds no state dict", {"ema": {"a": 1}})
    refused(imported, "not finite", {"ema": {**state, "x_embedder.proj.bias": torch.full((32,), torch.nan)}})


def test_the_label_table_tells_the_setting(imported):
    """A table of published size says whether it was trained, even if nothing else in the file does."""
    sizes = DiTConfig(tiny.GRID, 1, tiny.CHANNELS, **tiny.MODEL, num_classes=400, label_dropout=0.0)
    torch.manual_seed(0)
    untouched = DiT(sizes).state_dict()
    trained = {**untouched, TABLE: 1.5 * untouched[TABLE]}
    refused(imported, "never trained, so it is not of the setting 'mode'", {"ema": untouched}, expected(modes=400))
    refused(
        imported, "trained label table, so it is not of the setting 'gmm'", {"ema": trained}, expected("gmm", modes=400)
    )
    imported({"ema": trained}, expected(modes=400))
    imported({"ema": untouched}, expected("gmm", modes=400))
    rounded = {**untouched, TABLE: untouched[TABLE].bfloat16()}
    imported({"ema": rounded}, expected("gmm", modes=400))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


def test_nothing_in_a_file_runs(imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(imported, "not a PyTorch file of tensors and plain values", {"ema": Hostile()})
    (tmp_path / "source.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="not a PyTorch file"):
        import_weights(tmp_path / "source.pt", tmp_path / "e", tmp_path / "stats.pt", expected())
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused_in_one_line(stats, tmp_path, share):
    torch.save({"ema": tiny.network(tiny.MODEL).state_dict()}, tmp_path / "source.pt")
    content = (tmp_path / "source.pt").read_bytes()
    (tmp_path / "source.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"or is damaged .* fetch it again") as caught:
        import_weights(tmp_path / "source.pt", tmp_path / "ema.safetensors", stats, expected())
    assert "\n" not in str(caught.value) and not (tmp_path / "ema.safetensors").exists()


def test_weights_of_this_project_are_checked_and_copied(imported, stats, tmp_path):
    _, about = imported({"ema": tiny.network(tiny.MODEL).state_dict()})
    own, copy = tmp_path / "ema.safetensors", tmp_path / "copy.safetensors"
    assert import_weights(own, copy, stats, expected()) == about["digest"]
    assert copy.read_bytes() == own.read_bytes()
    with pytest.raises(ValueError, match="weights of the setting 'mode', not 'gmm'"):
        import_weights(own, copy, stats, expected("gmm"))
    with pytest.raises(ValueError, match="has hidden_size"):
        import_weights(own, copy, stats, expected(model=tiny.GUIDE))
    with pytest.raises(ValueError, match="knows 6 modes, but the mixture has 4"):
        import_weights(own, copy, stats, expected(modes=4))
    torch.save({"mean": None, "var": torch.ones(8, 4, 4)}, stats)
    with pytest.raises(ValueError, match="for other latents than the statistics"):
        import_weights(own, copy, stats, expected())


@pytest.mark.parametrize("name", ["XL", "S"])
def test_the_names_and_shapes_of_published_models_are_taken_and_no_others(name):
    """At full size, on the meta device: the check of names and shapes that import makes."""
    from mmfm.published.networks import _check_shapes

    published = GOLDEN[f"DiTDH-{name}"]["state_dict"]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in published.items()}
        sizes = DiTConfig(16, 1, 768, **DIT_PRESETS[name], num_classes=0, label_dropout=0.0)
        wanted = {key: tuple(tensor.shape) for key, tensor in DiT(sizes).state_dict().items()}
    rows = state.pop(TABLE)
    assert tuple(rows.shape) == (1001, DIT_PRESETS[name]["hidden_size"][0])
    _check_shapes("file", state, wanted, "it", "")
    state.pop("final_layer.linear.bias")
    with pytest.raises(ValueError, match=r"lacks 'final_layer.linear.bias'"):
        _check_shapes("file", state, wanted, "it", "")


def decoded(folder, content, stats, heads=tiny.HEADS, size=tiny.SIZE):
    torch.save(content, folder / "model.pt")
    extra = import_decoder(folder / "model.pt", folder / "decoder.safetensors", stats, heads, size)
    return load_decoder(folder / "decoder.safetensors"), extra


@pytest.mark.parametrize("nested", [False, True])
def test_a_decoder_arrives_and_says_what_it_left_behind(stats, tmp_path, nested):
    source = tiny.decoder()
    content = {**source.state_dict(), "encoder.head": torch.ones(3)}
    made, extra = decoded(tmp_path, {"model": content} if nested else content, stats)
    tokens = torch.randn(2, tiny.GRID**2, tiny.CHANNELS)
    with torch.no_grad():
        assert torch.equal(made(tokens), source(tokens))
    assert extra == ["encoder.head"] and made.config == source.config


def test_other_decoders_are_refused(stats, tmp_path):
    state = tiny.decoder().state_dict()
    with pytest.raises(ValueError, match=r"images of 32 pixels, but .* 'image.size' is 64"):
        decoded(tmp_path, state, stats, size=64)
    with pytest.raises(ValueError, match=r"not a decoder in the published layout \(it lacks 'decoder_embed.weight'\)"):
        decoded(tmp_path, {"a": torch.ones(2)}, stats)
    del state["decoder_layers.0.output.dense.bias"]
    with pytest.raises(ValueError, match=r"lacks 'decoder_layers.0.output.dense.bias'"):
        decoded(tmp_path, state, stats)
    torch.save({"mean": None, "var": torch.ones(8, 4, 4)}, stats)
    with pytest.raises(ValueError, match="the statistics are of 16 tokens of 8"):
        decoded(tmp_path, tiny.decoder().state_dict(), stats)


def test_the_published_decoder_of_full_size_is_ours():
    """Names, shapes and the sizes that follow from them, on the meta device."""
    (published,) = json.loads((ROOT / "tests" / "golden" / "decoder_state_dict.json").read_text()).values()
    with torch.device("meta"):
        own = Decoder(DecoderConfig(768, 1152, 4096, 16, 28, 16, 256)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in own.items()} == published


def test_a_refused_file_is_named_by_its_digest(tmp_path, stats, capsys):
    from mmfm.cli.__main__ import main

    source = tmp_path / "model.pt"
    source.write_bytes(b"no PyTorch file")
    store.write_json(tmp_path / "model.pt.fetched.json", {"sha256": "f" * 64})
    line = ["import", "decoder", str(source), "--out", str(tmp_path / "d"), "--stats", str(stats), "--heads", "2"]
    assert main([*line, "--image-size", "32"]) == 2
    said = capsys.readouterr().err
    assert (
        f"(SHA-256 {store.file_digest(source)[:12]}, but ffffffffffff was fetched: delete it and fetch it again)"
        in said
    )
    assert len(said.splitlines()) == 1
