"""Encode, normalise, decode: parity with the reference, statistics files, pixel rounding."""

import pytest
import torch

from golden.loading import FAMILY_FILES, encoder_folder, golden_decoder, read_golden
from mmfm.autoencoder.encoders import load_encoder
from mmfm.autoencoder.rae import RAE, load_statistics, to_uint8


def assert_parity(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def encoder(tmp_path):
    return load_encoder("dinov2", encoder_folder(tmp_path, "dinov2"), 16)


@pytest.mark.parametrize("name, family", FAMILY_FILES)
def test_latent_and_reconstruction_equal_reference(tmp_path, name, family):
    tensors, settings = read_golden(name)
    encoder = load_encoder(family, encoder_folder(tmp_path, name), settings["encoder_input_size"])
    torch.save({"mean": tensors["latent_mean"], "var": tensors["latent_var"]}, tmp_path / "stat.pt")
    rae = RAE(encoder, golden_decoder(name), *load_statistics(tmp_path / "stat.pt"), eps=settings["eps"])
    latent, global_token = rae.encode(tensors["image"])
    assert_parity(latent, tensors["latent"])
    assert_parity(global_token, tensors["cls_token"])
    assert_parity(rae.decode(tensors["latent"]), tensors["reconstruction"])


def test_without_statistics_latents_are_the_tokens(encoder):
    tensors, _ = read_golden("dinov2")
    latent = RAE(encoder).encode(tensors["image"]).latent
    assert torch.equal(latent, encoder(tensors["image"]).latent)


@pytest.mark.parametrize("given", ["mean", "var"])
def test_one_statistic_alone(encoder, given):
    tensors, _ = read_golden("dinov2")
    raw, value = encoder(tensors["image"]).latent, tensors[f"latent_{given}"]
    expected = raw - value if given == "mean" else raw / (value + 1e-5).sqrt()
    rae = RAE(encoder, golden_decoder("dinov2"), **{given: value})
    latent = rae.encode(tensors["image"]).latent
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rae.decode(latent), RAE(encoder, golden_decoder("dinov2")).decode(raw))


def test_pixels_are_clamped_and_truncated():
    images = torch.tensor([-0.2, 0.0, 0.999 / 255, 127.99 / 255, 1.0, 1.7])
    assert to_uint8(images).tolist() == [0, 0, 0, 127, 255, 255]
    assert to_uint8(images).dtype == torch.uint8


def test_decoding_needs_a_decoder_that_fits(encoder):
    with pytest.raises(ValueError, match="without a decoder"):
        RAE(encoder).decode(torch.zeros(1, 24, 4, 4))
    with pytest.raises(ValueError, match=r"36 tokens of 24 channels.*16 of 24"):
        RAE(encoder, golden_decoder("mae_interpolated"))


def test_statistics_must_fit_the_encoder(encoder):
    with pytest.raises(ValueError, match=r"latent variance is \(24, 5, 4\)"):
        RAE(encoder, var=torch.ones(24, 5, 4))


def test_statistics_file_with_one_entry(tmp_path):
    value = torch.rand(2, 3, 3)
    torch.save({"mean": value}, tmp_path / "mean.pt")
    torch.save({"var": value}, tmp_path / "var.pt")
    mean, var = load_statistics(tmp_path / "mean.pt")
    assert torch.equal(mean, value) and torch.equal(var, torch.ones(2, 3, 3))
    mean, var = load_statistics(tmp_path / "var.pt", latent_shape=(2, 3, 3))
    assert torch.equal(mean, torch.zeros(2, 3, 3)) and torch.equal(var, value)


@pytest.mark.parametrize(
    "content, shape, message",
    [
        (
            {"mean": torch.zeros(2, 3, 3), "var": torch.ones(2)},
            None,
            r"var in .*stat.pt is \(2,\), expected \(2, 3, 3\)",
        ),
        ({"mean": torch.zeros(4), "var": torch.ones(4)}, None, r"mean in .* is \(4,\), expected \(C, H, W\)"),
        ({"mean": torch.zeros(5, 3, 3)}, (2, 3, 3), r"is \(5, 3, 3\), expected \(2, 3, 3\)"),
        ({"mean": torch.zeros(2, 3, 3), "var": -torch.ones(2, 3, 3)}, None, "var in .* negative"),
        ({"mean": torch.full((2, 3, 3), torch.nan)}, None, "mean in .* non-finite"),
        ({"average": torch.zeros(2, 3, 3)}, None, "neither"),
    ],
)
def test_wrong_statistics_files(tmp_path, content, shape, message):
    torch.save(content, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "stat.pt", shape)


def test_unreadable_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stat.pt"):
        load_statistics(tmp_path / "stat.pt")
    (tmp_path / "stat.pt").write_bytes(b"not a zip archive")
    with pytest.raises(ValueError, match=r"stat.pt is not a readable"):
        load_statistics(tmp_path / "stat.pt")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_statistics_never_run_code(tmp_path, capsys):
    torch.save({"mean": Malicious()}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match=r"stat.pt"):
        load_statistics(tmp_path / "stat.pt")
    assert "executed" not in capsys.readouterr().out
