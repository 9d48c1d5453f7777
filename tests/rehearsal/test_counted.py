"""The formulas of the estimates against what PyTorch counts, for models of five shapes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfm import config
from mmfm.autoencoder.decoder import Decoder, DecoderConfig
from mmfm.infra.distributed import Ranks
from mmfm.models.dit import DiT
from mmfm.models.flops import decoder_flops, dit_flops
from mmfm.training import latents, setup
from mmfm.training.options import Run
from mmfm.training.trainer import Trainer
from mmfm.workflow import costs
from support import counting
from support.rehearsal import META

RANKS = Ranks(0, 1, META)

SHAPES = {
    "XL": (config.Model((1152, 2048), (28, 2), (16, 16)), 16, 768),
    "S": (config.Model((384, 2048), (12, 2), (6, 16)), 16, 768),
    "tiny": (config.Model((192, 192), (3, 1), (6, 6)), 4, 192),
    "even": (config.Model((512, 512), (4, 4), (8, 8)), 8, 768),
    "deep": (config.Model((768, 1024), (6, 2), (12, 16)), 16, 384),
}


DECODERS = [(1152, 768, 256, 16), (192, 384, 16, 8), (384, 768, 256, 128)]
"""Width, channels, tokens, and side of a patch."""


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_operations(shape):
    model, grid, channels = shape
    forward, both = counting.operations(counting.sizes(model, grid, channels))
    found = dit_flops(model, grid**2, channels)
    print(f"operations: {found:.4e}, counted {forward:.4e}: {found / forward:.4f}; training {3 * found / both:.4f}")
    assert found == pytest.approx(forward, rel=0.02) and 3 * found == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize("recomputed", [False, True])
def test_stored_activations(shape, recomputed):
    model, grid, channels = shape
    counted = counting.activations(counting.sizes(model, grid, channels), recomputed)
    found = costs.dit_activations(model, grid**2, channels, recomputed)
    print(f"activations: {found:.4e}, counted {counted:.4e}: {found / counted:.4f}")
    assert found == pytest.approx(counted, rel=0.1)


def test_parameters(shape):
    model, grid, channels = shape
    with torch.device("meta"):
        counted = sum(p.numel() for p in DiT(counting.sizes(model, grid, channels)).parameters())
    found = costs.dit_parameters(model, channels)
    print(f"parameters: {found:.4e}, counted {counted:.4e}: {found / counted:.4f}")
    assert found == pytest.approx(counted, rel=0.02)


def test_weights_gradients_optimizer_and_average(shape, full, tmp_path):
    model, grid, channels = shape
    sizes = counting.sizes(model, grid, channels)
    with META:
        network, x = DiT(sizes), torch.empty(2, channels, grid, grid)
    plan = latents.BatchPlan(0, 100, 2)
    run = Run("train", network, lambda forward, _, x: forward(x, x[:, 0, 0, 0]).mean((1, 2, 3)), plan, tmp_path, RANKS)
    made = Trainer(run, setup.optimizer_options(full.train, 50), setup.loop_options(full.train, 50))
    made._train_step(network, ((micro, x) for micro in plan.micro_batches(0)))
    moments = [state[name] for state in made.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*made.division.tensors, *made.division.gradients(), *moments, *made.division.averages]
    counted = sum(t.nbytes for t in tensors)
    found = costs.dit_parameters(model, channels) * (costs.TRAINED_BYTES + costs.EMA_BYTES)
    print(f"weights and optimiser: {found:.4e}, counted {counted:.4e}: {found / counted:.4f}")
    assert found == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("width", "channels", "tokens", "patch"), DECODERS)
def test_stored_activations_of_the_decoder(full, width, channels, tokens, patch):
    d = replace(full.decoder, hidden_size=width, intermediate_size=4 * width, num_layers=4)
    sizes = DecoderConfig(channels, d.hidden_size, d.intermediate_size, d.num_heads, d.num_layers, patch, tokens)

    def losses(model, batch):
        """As the task `Reconstruction` computes them."""
        return (torch.empty(()) - model(torch.empty(batch, tokens, channels)).float()).abs().flatten(1).mean(1)

    counted = counting.stored(lambda: Decoder(sizes), losses)
    found = costs.decoder_activations(d, channels, tokens, patch)
    print(f"activations of the decoder: {found:.4e}, counted {counted:.4e}: {found / counted:.4f}")
    assert found == pytest.approx(counted, rel=0.1)


def test_operations_of_encoder_and_decoder(full, autoencoder):
    d, size = full.decoder, costs.encoder_size("nowhere", 224, 14)
    with FlopCounterMode(display=False) as counter:
        latent = autoencoder.encoder(torch.empty(1, 3, 224, 224, device=META)).latent
        encoded = counter.get_total_flops()
        autoencoder.decoder(latent.flatten(2).transpose(1, 2))
    assert size.flops == pytest.approx(encoded, rel=0.02)
    assert decoder_flops(d, 768, 256, 16) == pytest.approx(counter.get_total_flops() - encoded, rel=0.02)


@pytest.mark.parametrize(("width", "channels", "tokens", "patch"), DECODERS)
def test_operations_of_the_decoder(full, width, channels, tokens, patch):
    d = replace(full.decoder, hidden_size=width, intermediate_size=4 * width, num_layers=4)
    sizes = DecoderConfig(channels, d.hidden_size, d.intermediate_size, d.num_heads, d.num_layers, patch, tokens)
    with META, FlopCounterMode(display=False) as counter:
        Decoder(sizes)(torch.empty(1, tokens, channels))
    assert decoder_flops(d, channels, tokens, patch) == counter.get_total_flops()


def test_the_counters_count():
    """One linear map after another, by hand."""
    width, tokens, inner = 16, 16, int(2 / 3 * 64)
    small = counting.sizes(config.Model((width, width), (1, 1), (2, 2)), 4, 8)
    attention = 2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width
    block = attention + 2 * tokens * width * 3 * inner
    embedding = 2 * (2 * tokens * 8 * width) + 2 * (512 * width + width * width)
    modulation = 2 * width * 6 * width * (1 + tokens) + 2 * tokens * width * 2 * width
    forward, both = counting.operations(small)
    assert forward == 2 * block + embedding + modulation + 2 * tokens * width * 8
    assert 2.7 < both / forward < 3
