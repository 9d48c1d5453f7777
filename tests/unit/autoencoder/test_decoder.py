"""ViT decoder: published names, files, errors. Parity with the reference is in test_rae.py, through decode."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfm.autoencoder.decoder import Decoder, DecoderConfig, load_decoder, save_decoder
from support.places import GOLDEN

TINY = DecoderConfig(
    latent_dim=6, hidden_size=16, intermediate_size=24, num_heads=2, num_layers=2, patch_size=3, num_patches=4
)


def tiny(seed=0):
    return Decoder(TINY, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "decoder" / "decoder.safetensors"
    save_decoder(tiny(), path)
    return path


def test_published_names_and_shapes():
    (reference,) = json.loads((GOLDEN / "decoder_state_dict.json").read_text()).values()
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(768, 1152, 4096, 16, 28, 16, 256))
    assert {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()} == reference


def test_saved_decoder_comes_back_whole(saved):
    decoder, loaded = tiny(), load_decoder(saved)
    tokens = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    assert loaded.config == TINY and not loaded.training
    with torch.no_grad():
        images = decoder(tokens)
        assert torch.equal(images, loaded(tokens))
    assert images.shape == (2, 3, 6, 6) and images.std() > 0
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in decoder.named_parameters()} - {"decoder_pos_embed"}
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_initial_weights_follow_the_generator():
    assert torch.equal(tiny(0).decoder_pred.weight, tiny(0).decoder_pred.weight)
    assert not torch.equal(tiny(0).decoder_pred.weight, tiny(1).decoder_pred.weight)
    positions = tiny().decoder_pos_embed
    assert not positions[0, 0].any() and len(positions[0].unique(dim=0)) == 5


def test_the_class_token_is_not_rounded_in_bf16_autocast():
    """As in the published code: only products of matrices are bf16."""
    decoder = tiny().requires_grad_(False)
    decoder.trainable_cls_token.fill_(1 + 2**-10)
    seen = []
    decoder.decoder_layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        decoder(torch.zeros(2, 4, 6))
    assert torch.equal(seen[0][:, 0] - decoder.decoder_pos_embed[:, 0], decoder.trainable_cls_token[:, 0].expand(2, -1))


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors"):
        load_decoder(tmp_path / "nothing.safetensors")


def test_truncated_file(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"(?s)decoder.safetensors.*truncated.*make it again"):
        load_decoder(saved)


def test_file_without_metadata(saved):
    save_file(load_file(saved), saved)
    with pytest.raises(ValueError, match=r"(?s)decoder.safetensors.*decoder_config.*make it again"):
        load_decoder(saved)


def test_tensors_of_another_configuration(saved):
    config = json.dumps({**TINY.__dict__, "num_layers": 3})
    save_file(load_file(saved), saved, metadata={"decoder_config": config})
    with pytest.raises(ValueError, match=r"(?s)decoder.safetensors.*don't match its configuration"):
        load_decoder(saved)


def test_other_latent_width(saved):
    assert load_decoder(saved, latent_dim=6).config == TINY
    with pytest.raises(ValueError, match=r"(?s)decoder.safetensors.*6 channels.*768"):
        load_decoder(saved, latent_dim=768)


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 4, 7)])
def test_tokens_must_fit(shape):
    with pytest.raises(ValueError, match=r"takes \(B, 4, 6\)"):
        tiny()(torch.zeros(shape))


def test_latent_grid_must_be_square():
    with pytest.raises(ValueError, match="num_patches = 5"):
        DecoderConfig(6, 16, 24, 2, 2, 3, 5)
