"""Golden encoders and decoders as the files and modules that the stages load."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from mmfm.autoencoder.decoder import Decoder, DecoderConfig

GOLDEN = Path(__file__).parent

# (golden file, family)
FAMILY_FILES = [("dinov2", "dinov2"), ("siglip2", "siglip2"), ("mae", "mae"), ("mae_interpolated", "mae")]


def read_golden(name):
    """Tensors and parsed metadata of rae_{name}_tiny.safetensors."""
    with safe_open(GOLDEN / f"rae_{name}_tiny.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def _part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def encoder_folder(parent, name):
    """Write the golden encoder as a folder in the Hugging Face layout and return its path."""
    tensors, settings = read_golden(name)
    folder = parent / f"{name}-encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings["encoder_config"]))
    processor = {key: settings[key] for key in ("image_mean", "image_std")}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(_part(tensors, "encoder."), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def golden_decoder(name):
    """The golden decoder as a module."""
    tensors, settings = read_golden(name)
    config = settings["decoder_config"]
    assert config.pop("hidden_act") == "gelu"
    decoder = Decoder(DecoderConfig(**{key.removeprefix("decoder_"): value for key, value in _rename(config)}))
    decoder.load_state_dict(_part(tensors, "decoder."))
    return decoder.eval().requires_grad_(False)


def _rename(config):
    short = {"decoder_num_attention_heads": "num_heads", "decoder_num_hidden_layers": "num_layers"}
    return [(short.get(key, key), value) for key, value in config.items()]
