"""DiTDH: a diffusion transformer with a decoupled wide head (Zheng et al. 2025, "Diffusion Transformers with
Representation Autoencoders"; Wang et al. 2025, "DDT: Decoupled Diffusion Transformer").

Many narrow encoder blocks turn the noisy latent into one condition per token. A few wide head blocks predict the
velocity from the same latent and that condition.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfm.models.layers import (
    DiTBlock,
    FinalLayer,
    FourierTimeEmbed,
    LabelEmbed,
    PatchEmbed,
    Rope2d,
    patchify,
    sincos_position_table,
)

DIT_PRESETS: dict[str, dict[str, tuple[int, int]]] = {
    "XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)},
    "S": {"hidden_size": (384, 2048), "depth": (12, 2), "num_heads": (6, 16)},
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiTDH; pairs are (encoder, head).

    Attributes:
        input_size: height and width of the latent.
        patch_size: side of a patch in latent positions; 1 makes every position a token.
        in_channels: channels of the latent.
        hidden_size, depth, num_heads: width, number of blocks, number of attention heads.
        num_classes: number of labels; 0 for an unconditional model.
        label_dropout: probability with which the training loop replaces a label with the null label; if positive, the
            label table has one extra row.
        mlp_ratio: ratio of inner to outer width of the equivalent plain MLP.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: tuple[int, int]
    depth: tuple[int, int]
    num_heads: tuple[int, int]
    num_classes: int
    label_dropout: float
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "depth", "num_heads"):
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be two positive integers, (encoder, head)")
            object.__setattr__(self, name, pair)
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        for width, heads in zip(self.hidden_size, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"hidden_size {width} is not a multiple of num_heads {heads}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes = {self.num_classes} must be 0 (unconditional) or positive")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout = {self.label_dropout} must be a probability in [0, 1)")


class DiT(nn.Module):
    """Velocity network v(x, t, y).

    The forward pass is deterministic: for label dropout, the caller writes `null_label` into y.

    Args:
        config: sizes.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
        init: name in :data:`mmfm.config.choices.INITS`; see :meth:`initialize_weights`.
        generator: CPU generator for the initial weights; None uses the global one.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        checkpoint_activations: bool = False,
        init: str = "xavier",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        (enc_width, dec_width), (enc_heads, dec_heads) = config.hidden_size, config.num_heads
        grid = config.input_size // config.patch_size

        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, enc_width), requires_grad=False)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dec_width)
        self.s_embedder = PatchEmbed(config.patch_size, config.in_channels, enc_width)
        self.s_projector = nn.Linear(enc_width, dec_width) if enc_width != dec_width else nn.Identity()
        self.t_embedder = FourierTimeEmbed(enc_width)
        self.y_embedder: LabelEmbed | None = None
        if config.num_classes:
            self.y_embedder = LabelEmbed(config.num_classes + (config.label_dropout > 0), enc_width)
        self.final_layer = FinalLayer(dec_width, config.patch_size**2 * config.in_channels)
        self.enc_feat_rope = Rope2d(grid, enc_width // enc_heads)
        self.dec_feat_rope = Rope2d(grid, dec_width // dec_heads)
        self.blocks = nn.ModuleList(
            [DiTBlock(enc_width, enc_heads, config.mlp_ratio) for _ in range(config.depth[0])]
            + [DiTBlock(dec_width, dec_heads, config.mlp_ratio) for _ in range(config.depth[1])]
        )
        self.initialize_weights(init, generator)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label"; None for models that are unconditional or have no label dropout."""
        config = self.config
        return config.num_classes if config.num_classes and config.label_dropout > 0 else None

    @torch.no_grad()
    def initialize_weights(self, init: str, generator: torch.Generator | None = None) -> None:
        """Initialize linear layers Xavier-uniform, embeddings N(0, 0.02^2), Fourier frequencies N(0, 1), and modulation
        and output layers to zero (adaLN-Zero, Peebles and Xie 2023).

        With ``pytorch``, the linear layers but the patch embeddings keep PyTorch's defaults (weights and biases uniform
        within 1 / sqrt(inputs)), as in the published code, where only the two embeddings are Xavier-uniform.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and init == "pytorch":
                bound = module.in_features**-0.5
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embedder.W, generator=generator)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for layer in (*(b.adaLN_modulation[-1] for b in (*self.blocks, self.final_layer)), self.final_layer.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        grid = self.config.input_size // self.config.patch_size
        self.pos_embed.copy_(sincos_position_table(self.pos_embed.shape[-1], grid))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the velocity of the flow at x.

        Args:
            x: latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is source.
            y: labels (B,) int64, `null_label` for no label; None for an unconditional model.

        Returns:
            velocities (B, C, H, W).

        Raises:
            ValueError: labels were given to an unconditional model, or none to a conditional one.
        """
        self._check_labels(y)
        time = self.t_embedder(t).unsqueeze(1)
        label = 0 if self.y_embedder is None else self.y_embedder(y).unsqueeze(1)
        blocks, num_encoder_blocks = list(self.blocks), self.config.depth[0]

        patches = patchify(x, self.config.patch_size)
        tokens = self.s_embedder(patches) + self.pos_embed
        # The modulation of every block starts with a SiLU of this condition; the outer SiLU computes it once for all.
        condition = F.silu(F.silu(time + label))
        tokens = self._run(blocks[:num_encoder_blocks], tokens, condition, self.enc_feat_rope)
        condition = F.silu(self.s_projector(F.silu(time + tokens)))
        tokens = self._run(blocks[num_encoder_blocks:], self.x_embedder(patches), condition, self.dec_feat_rope)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _check_labels(self, y: Tensor | None) -> None:
        if self.y_embedder is None and y is not None:
            raise ValueError("an unconditional model (num_classes = 0) takes no labels; pass y=None")
        if self.y_embedder is not None and y is None:
            hint = "" if self.null_label is None else f", filled with null_label = {self.null_label} for no label"
            raise ValueError(f"a model with {self.config.num_classes} labels needs y (B,); pass labels{hint}")

    def _run(self, blocks: Iterable[nn.Module], tokens: Tensor, condition: Tensor, rope: Rope2d) -> Tensor:
        for block in blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, rope, use_reentrant=False)
            else:
                tokens = block(tokens, condition, rope)
        return tokens

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p * p * C), channels last within a patch -> (B, C, H, W)."""
        p, grid = self.config.patch_size, self.config.input_size // self.config.patch_size
        patches = patches.view(-1, grid, grid, p, p, self.config.in_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, grid * p, grid * p)
