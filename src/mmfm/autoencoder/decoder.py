"""ViT decoder from latent tokens to images, with the layout of the MAE decoder (He et al. 2022), as in RAE."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmfm.infra import store
from mmfm.models.layers import sincos_position_table

METADATA_KEY = "decoder_config"
PROVENANCE_KEY = "provenance"


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
        latent_dim: channels C of a latent token.
        hidden_size, intermediate_size, num_heads, num_layers: width, inner width of the MLP, attention heads, blocks.
        patch_size: side in pixels of the patch decoded from each token.
        num_patches: number of tokens N per image, a square.
        layer_norm_eps: epsilon of all layer norms.
    """

    latent_dim: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    patch_size: int
    num_patches: int
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"num_patches = {self.num_patches} is not a square; latents are square grids")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


class _QueryKeyValue(nn.Module):
    """Multi-head attention without the output projection; (B, N, D) -> (B, N, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Dense(nn.Module):
    """A linear layer named `dense`, as in the published weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = _QueryKeyValue(config)
        self.output = _Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class _Block(nn.Module):
    """Pre-norm transformer block with exact GELU; (B, N, D) -> (B, N, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Dense(config.hidden_size, config.intermediate_size)
        self.output = _Dense(config.intermediate_size, config.hidden_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Decoder(nn.Module):
    """Decodes latent tokens into images normalised like the encoder's input.

    Args:
        config: sizes.
        generator: CPU generator for the initial weights; None uses the global one.
    """

    def __init__(self, config: DecoderConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.decoder_embed = nn.Linear(config.latent_dim, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, width), requires_grad=False)
        self.decoder_layers = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, 3 * config.patch_size**2)
        self.initialize_weights(generator)

    @torch.no_grad()
    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize weights and CLS token N(0, 0.02^2), biases 0, positions sine-cosine (0 for the CLS token)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.trainable_cls_token, std=0.02, generator=generator)
        self.decoder_pos_embed.zero_()
        positions = sincos_position_table(self.config.hidden_size, isqrt(self.config.num_patches))
        self.decoder_pos_embed[0, 1:].copy_(positions)

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode tokens.

        Args:
            tokens: (B, N, C) in row-major order, not normalised by the latent statistics.

        Returns:
            images (B, 3, sqrt(N) * patch_size, sqrt(N) * patch_size); multiply by the image processor's standard
            deviation and add its mean to get pixels.

        Raises:
            ValueError: the number of tokens or channels is not that of the decoder.
        """
        expected = (self.config.num_patches, self.config.latent_dim)
        if tokens.shape[1:] != expected:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, but the decoder takes (B, {expected[0]}, {expected[1]}); "
                "use the decoder of this encoder and image size"
            )
        x = self.decoder_embed(tokens)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        patches = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        grid, p = isqrt(self.config.num_patches), self.config.patch_size
        patches = patches.reshape(-1, grid, grid, p, p, 3)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, grid * p, grid * p)


def save_decoder(decoder: Decoder, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write weights atomically as safetensors, with the configuration as JSON metadata.

    Args:
        provenance: JSON-serialisable record of how the weights were made, stored as metadata.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    metadata = {METADATA_KEY: json.dumps(asdict(decoder.config), sort_keys=True)}
    if provenance is not None:
        metadata[PROVENANCE_KEY] = json.dumps(provenance, sort_keys=True)
    with store.whole_file(path) as partial:
        save_file(state, partial, metadata=metadata)


def load_decoder(path: str | Path, device: torch.device | str = "cpu", *, latent_dim: int | None = None) -> Decoder:
    """Load a decoder written by `save_decoder`, in float32 and evaluation mode.

    Args:
        path: the safetensors file.
        device: where to put it.
        latent_dim: number of channels that the caller's latents have; None accepts any.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: the file is damaged, its configuration is missing or doesn't match the tensors, or the decoder takes
            latents of another width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no decoder at {path}; train one or import a published one")
    remedy = "delete it and make it again (run train_decoder, or import the published decoder)"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"the decoder file {path} is damaged or truncated ({error}); {remedy}") from error
    config = _parse_config(path, metadata, remedy)
    if latent_dim is not None and config.latent_dim != latent_dim:
        raise ValueError(
            f"the decoder {path} takes latents with {config.latent_dim} channels, but the encoder gives {latent_dim}; "
            "use the decoder trained for this encoder"
        )
    with torch.device("meta"):
        decoder = Decoder(config)
    try:
        decoder.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors in {path} don't match its configuration ({error}); {remedy}") from error
    return decoder.to(device).eval()


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Return the record of how a decoder was made; empty for an imported one, and for a file that is not a decoder."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))
    except (SafetensorError, OSError):
        return {}


def _parse_config(path: Path, metadata: dict[str, str], remedy: str) -> DecoderConfig:
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"the decoder file {path} has no {METADATA_KEY!r} in its metadata, so its sizes are unknown; {remedy}"
        )
    values = json.loads(metadata[METADATA_KEY])
    names = {field.name for field in fields(DecoderConfig)}
    if set(values) != names:
        raise ValueError(f"the metadata of {path} has keys {sorted(values)}, expected {sorted(names)}; {remedy}")
    return DecoderConfig(**values)
