"""Encoders of transformers and timm that no code names: parity with the library's own forward pass, and errors."""

import json
import re

import pytest
import timm
import torch
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from mmfm.autoencoder.encoders import family_of, latent_shape, load_encoder
from mmfm.infra import model_folder
from support.encoders import MEAN, STD, scramble, write_hf, write_timm

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def normalised(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def assert_parity(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def plain(norm):
    norm.weight.data.fill_(1)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.fill_(0)


def vit():
    return scramble(ViTModel(ViTConfig(**SIZES)))


def dinov3():
    return scramble(DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=3)))


def siglip():
    return scramble(SiglipVisionModel(SiglipVisionConfig(**SIZES)))


def clip():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return scramble(CLIPModel(CLIPConfig(vision_config=SIZES, text_config={**text, "vocab_size": 99})))


HF = {  # a model, its vision tower, its final norm, and the number of tokens before the patches
    "vit": (vit, lambda m: m, "layernorm", 1),
    "dinov3": (dinov3, lambda m: m, "norm", 4),
    "siglip": (siglip, lambda m: m, "post_layernorm", 0),
    "clip": (clip, lambda m: m.vision_model, "", 1),
}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", HF)
def test_transformers_tokens_are_the_librarys(name, affine, size, tmp_path):
    """At the size of the position embeddings, and at another."""
    make, tower, norm, first = HF[name]
    model = make()
    folder = write_hf(tmp_path / name, model)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    latent, token = load_encoder("hf", folder, size, norm_affine=affine)(images)
    model = tower(model)
    if norm and not affine:
        plain((model.vision_model if hasattr(model, "vision_model") else model).get_submodule(norm))
    options = {"interpolate_pos_encoding": True} if name != "dinov3" else {}
    with torch.no_grad():
        expected = model(pixel_values=normalised(images), **options)
    tokens = expected.last_hidden_state
    assert_parity(latent.flatten(2).transpose(1, 2), tokens[:, first:])
    assert_parity(token, tokens[:, 0] if first else expected.pooler_output)
    assert latent_shape(folder, size) == tuple(latent.shape[1:]) == (32, size // 8, size // 8)


TIMM_MODELS = {  # architecture, arguments, tokens before the patches
    "class": ("vit_small_patch16_224", {"patch_size": 8}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}, 5),
    "mean": (
        "vit_small_patch16_224",
        {"patch_size": 8, "global_pool": "avg", "class_token": False, "fc_norm": False},
        0,
    ),
    "attention": ("vit_base_patch16_siglip_224", {"patch_size": 8}, 0),
    "clip": ("vit_base_patch16_clip_224", {"patch_size": 8}, 1),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8}, 1),
    "dinov3": ("vit_small_patch16_dinov3", {"patch_size": 8}, 5),
    "pe": ("vit_pe_core_base_patch16_224", {"patch_size": 8}, 1),
}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_tokens_are_the_librarys(name, size, tmp_path):
    architecture, arguments, first = TIMM_MODELS[name]
    folder = write_timm(tmp_path / name, architecture, **TIMM, **arguments)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=size).eval()
    for affine in (True, False):
        latent, token = load_encoder("timm", folder, size, norm_affine=affine)(images)
        if not affine and isinstance(model.norm, torch.nn.LayerNorm):
            plain(model.norm)
        with torch.no_grad():
            tokens = model.forward_features(normalised(images))
            assert_parity(latent.flatten(2).transpose(1, 2), tokens[:, first:])
            assert_parity(token, model.forward_head(tokens, pre_logits=True))
    assert latent_shape(folder, size) == tuple(latent.shape[1:]) == (32, size // 8, size // 8)
    about = model_folder.read(folder)
    assert (about.library, about.depth, family_of(folder)) == ("timm", 2, ("timm", 8))


@pytest.mark.parametrize("library", ["hf", "timm"])
def test_images_are_resized_as_the_models_config_says(library, tmp_path):
    if library == "hf":
        folder = write_hf(tmp_path / "m", vit())
    else:
        folder = write_timm(tmp_path / "m", "vit_small_patch16_224", **TIMM, patch_size=8)
    encoder, images = load_encoder(library, folder, 32), torch.rand(2, 3, 80, 80)
    small = functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    for found, expected in zip(encoder(images), encoder(small), strict=True):
        assert_parity(found, expected)
    assert encoder.image_mean.tolist() == pytest.approx(MEAN)


def test_parameters_that_tokens_do_not_need_may_be_missing(tmp_path):
    """A masked token and a pooler beside a class token, as in many checkpoints; not a layer."""
    from safetensors.torch import load_file, save_file

    folder = write_hf(tmp_path / "vit", vit())
    state = load_file(folder / "model.safetensors")
    expected = load_encoder("hf", folder, 32)(torch.ones(1, 3, 32, 32) / 2)
    kept = {name: value for name, value in state.items() if not name.startswith("pooler")}
    assert len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    found = load_encoder("hf", folder, 32)(torch.ones(1, 3, 32, 32) / 2)
    assert torch.equal(found.global_token, expected.global_token)
    lost = next(name for name in kept if name.endswith("fc1.weight") or "intermediate" in name)
    save_file({n: v for n, v in kept.items() if n != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 parameter\(s\) of ViTModel \(.*\); fetch the model again"):
        load_encoder("hf", folder, 32)


def refused(family, folder, size, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(family, folder, size)


def test_models_of_transformers_that_are_no_encoders(tmp_path):
    swin = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    folder = write_hf(tmp_path / "swin", SwinModel(swin))
    refused("hf", folder, 32, r"the 'swin' model in .* gives 8 x 8 tokens for 16 x 16 patches; give a vision trans")
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    refused("hf", write_hf(tmp_path / "resnet", resnet), 32, r"'resnet' model without patches; give a vision transf")
    masked = ViTMAEModel(ViTMAEConfig(**SIZES))
    refused("hf", write_hf(tmp_path / "mae", masked), 32, r"'vit_mae' .* gives 5 tokens for 4 x 4 patches")
    shuffled = ViTMAEModel(ViTMAEConfig(**SIZES, mask_ratio=0.0))
    message = r"'vit_mae' .* gives other tokens for the same image at every call; .* set the family to mae"
    refused("hf", write_hf(tmp_path / "shuffled", scramble(shuffled)), 32, message)
    folder = write_hf(
        tmp_path / "siglip", scramble(SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False)))
    )
    refused("hf", folder, 32, r"has no class token, and of pooled features none for tokens of 32; give a model with")
    sizes = {name: value for name, value in SIZES.items() if name != "image_size"}
    packed = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16))
    refused("hf", write_hf(tmp_path / "naflex", packed), 32, r"'siglip2_vision_model' .* does not turn images of 32")
    folder = write_hf(tmp_path / "vit", vit())
    refused("hf", folder, 35, r"input_size 35 is not a multiple of the patch size 8 .*; use 32 or 40")
    edit(folder, image_size=[32, 64])
    refused("hf", folder, 32, r"'vit' model with a grid of 4 x 8 patches; give one with square patches in a square")
    edit(folder, patch_size=[8, 4])
    refused("hf", folder, 32, r"'vit' model with patches of 8 x 4 pixels")
    edit(folder, model_type="vitt")
    refused("hf", folder, 32, r"'vitt' model, which transformers does not know \(did you mean 'vit'\?\)")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 8, "image_size": 32, **changes}))


def test_models_of_timm_that_are_no_encoders(tmp_path):
    folder = write_timm(tmp_path / "vit", "vit_small_patch16_224", **TIMM, patch_size=8)
    refused(
        "timm", folder, 35, r"input_size 35 is not a multiple of the patch size 8 of timm's 'vit_small.*use 32 or 40"
    )
    config = json.loads((folder / "config.json").read_text())

    def changed(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    changed(architecture="vit_smal_patch16_224")
    refused(
        "timm", folder, 32, r"'vit_smal_patch16_224', which timm .* not know \(did you mean 'vit_small_patch16_224'\?"
    )
    changed(architecture="resnet18", model_args={})
    refused("timm", folder, 32, r"timm's 'resnet18' in .* has no grid of patch tokens; give a vision transformer")
    changed(model_args={**config["model_args"], "depth": 3})
    refused("timm", folder, 32, r"can't be loaded: .*; fetch the model again")
    changed(model_args={**config["model_args"], "patch_size": [8, 4]})
    refused("timm", folder, 32, r"patches of 8 x 4 pixels")
    changed(model_args={**config["model_args"], "global_pool": ""})
    refused("timm", folder, 32, r"pools its tokens of 32 channels to \(17, 32\); give one with a class token")


def test_the_other_librarys_family_is_named(tmp_path):
    ours = write_timm(tmp_path / "timm", "vit_small_patch16_224", **TIMM, patch_size=8)
    theirs = write_hf(tmp_path / "hf", vit())
    refused("hf", ours, 32, r"timm's 'vit_small_patch16_224', but the family is hf; set the family to timm")
    refused("timm", theirs, 32, r"'vit' model of transformers, but the family is timm; set the family to hf")
    refused("dinov2", theirs, 32, r"'vit' model, but the family is dinov2 .*; set the family to hf, or give weights of")
    with pytest.raises(FileNotFoundError, match=re.escape("is not a folder; set `hf:`")):
        load_encoder("timm", "timm/vit", 32)
