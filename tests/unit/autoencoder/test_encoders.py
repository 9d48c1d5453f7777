"""Frozen encoders: parity with the reference through Hugging Face folders, checkpoint layouts, errors."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from golden.loading import FAMILY_FILES, encoder_folder, read_golden
from mmfm.autoencoder.encoders import load_encoder


def assert_parity(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def edit_weights(folder, rename=lambda name: name, drop=(), add=()):
    state = {rename(k): v for k, v in load_file(folder / "model.safetensors").items() if k not in drop}
    save_file(state | dict(add), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name, family", FAMILY_FILES)
def test_tokens_equal_reference(tmp_path, name, family):
    tensors, settings = read_golden(name)
    encoder = load_encoder(family, encoder_folder(tmp_path, name), settings["encoder_input_size"])
    latent, global_token = encoder(tensors["image"])
    assert_parity(latent.flatten(2).transpose(1, 2), tensors["patch_tokens"])
    assert_parity(global_token, tensors["cls_token"])
    assert latent.shape[1:] == (encoder.hidden_size, *encoder.grid) and latent.is_contiguous()
    assert encoder.image_mean.tolist() == pytest.approx(settings["image_mean"])
    assert encoder.image_std.tolist() == pytest.approx(settings["image_std"])


def test_frozen_in_evaluation_mode_and_outside_autocast(tmp_path):
    tensors, settings = read_golden("mae")
    encoder = load_encoder("mae", encoder_folder(tmp_path, "mae"), settings["encoder_input_size"])
    outer = torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    latent = encoder(tensors["image"]).latent
    assert torch.equal(latent, encoder(tensors["image"]).latent), "the patch order must not be random"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latent, encoder(tensors["image"]).latent)


NAMES = {"q": "query", "k": "key", "v": "value"}


def hub_name(family, name):
    """Names that the published checkpoints have, older than those of the installed transformers."""
    if family == "siglip2":
        return name
    name = re.sub(r"attention\.([qkv])_proj", lambda m: f"attention.attention.{NAMES[m[1]]}", name)
    name = name.replace("attention.o_proj", "attention.output.dense")
    if family == "mae":
        name = name.replace("vit.layers", "vit.encoder.layer")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
    return name


@pytest.mark.parametrize("name, family", FAMILY_FILES[:3])
def test_layout_of_published_checkpoints(tmp_path, name, family):
    tensors, settings = read_golden(name)
    folder = encoder_folder(tmp_path, name)
    extra = {"dinov2": [], "mae": [("decoder.mask_token", torch.ones(1, 1, 8))]}.get(
        family, [("text_model.embeddings.token_embedding.weight", torch.ones(4, 8))]
    )
    edit_weights(folder, rename=lambda key: hub_name(family, key), add=extra)
    if family == "siglip2":
        vision = json.loads((folder / "config.json").read_text())
        config = {"model_type": "siglip", "vision_config": vision, "text_config": {"model_type": "siglip_text_model"}}
        (folder / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(family, folder, settings["encoder_input_size"])
    assert_parity(encoder(tensors["image"]).global_token, tensors["cls_token"])


def test_family_mismatch_names_both(tmp_path):
    folder = encoder_folder(tmp_path, "dinov2")
    with pytest.raises(ValueError, match=r"(?s)dinov2_with_registers.*family is mae.*set the family to dinov2"):
        load_encoder("mae", folder, 16)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"'clip' .* must be one of dinov2, siglip2, mae"):
        load_encoder("clip", "anything", 16)


def test_absent_model_says_how_to_fetch_it():
    with pytest.raises(FileNotFoundError, match="hf download nobody/no-such-encoder"):
        load_encoder("dinov2", "nobody/no-such-encoder", 224)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_folder_without_a_file(tmp_path, file):
    folder = encoder_folder(tmp_path, "dinov2")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_encoder("dinov2", folder, 16)


def test_truncated_weights(tmp_path):
    folder = encoder_folder(tmp_path, "dinov2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"(?s)the weights of the encoder.*cannot be read"):
        load_encoder("dinov2", folder, 16)


def test_missing_parameters_are_refused_but_for_unused_ones(tmp_path):
    folder = encoder_folder(tmp_path, "dinov2")
    edit_weights(folder, drop=["embeddings.mask_token"])
    load_encoder("dinov2", folder, 16)
    edit_weights(folder, drop=["encoder.layer.1.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=r"lacks 1 parameter.*encoder.layer.1.mlp.fc1.weight"):
        load_encoder("dinov2", folder, 16)


def test_processor_without_normalisation(tmp_path):
    folder = encoder_folder(tmp_path, "dinov2")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match="image_std"):
        load_encoder("dinov2", folder, 16)


def test_input_size_must_be_whole_patches(tmp_path):
    with pytest.raises(ValueError, match="input_size 18"):
        load_encoder("dinov2", encoder_folder(tmp_path, "dinov2"), 18)


@pytest.mark.parametrize("images", [torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
def test_images_must_be_float_batches(tmp_path, images):
    encoder = load_encoder("dinov2", encoder_folder(tmp_path, "dinov2"), 16)
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\) float"):
        encoder(images)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [28, 42])
def test_dinov2_with_and_without_registers_gives_the_tokens_of_the_library(tmp_path, registers, size):
    """At the size of its position table, and at another, to which they are interpolated."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    torch.manual_seed(0)
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.eval().save_pretrained(tmp_path)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    images = torch.rand(3, 3, size, size)
    latent, token = load_encoder("dinov2", tmp_path, size)(images)

    mean, std = (torch.tensor(processor[name])[:, None, None] for name in ("image_mean", "image_std"))
    model.layernorm.weight.data.fill_(1)
    model.layernorm.bias.data.fill_(0)
    with torch.no_grad():
        expected = model((images - mean) / std).last_hidden_state
    assert_parity(token, expected[:, 0])
    assert_parity(latent.flatten(2).transpose(1, 2), expected[:, 1 + registers :])


def test_a_precision_is_the_networks_alone(tmp_path):
    """In bf16, tokens are rounded but float32, and images are resized exactly; TF32 is full precision on a CPU."""
    folder, images = encoder_folder(tmp_path, "dinov2"), torch.rand(4, 3, 40, 40)
    exact, tf32, rounded = (
        load_encoder("dinov2", folder, 16, precision=name)(images) for name in ("float32", "tf32", "bf16")
    )
    assert torch.equal(exact.latent, tf32.latent) and torch.equal(exact.global_token, tf32.global_token)
    for found, expected in zip(rounded, exact, strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        assert found.dtype == torch.float32 and 1e-4 < error < 3e-2
    with pytest.raises(ValueError, match=r"unknown precision 'tf23' \(did you mean 'tf32'\?\)"):
        load_encoder("dinov2", folder, 16, precision="tf23")
