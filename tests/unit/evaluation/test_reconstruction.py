"""PSNR and SSIM against closed cases and plain loops."""

import math

import numpy as np
import pytest
import torch

from mmfm.evaluation.reconstruction import psnr, ssim


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Originals and decoded images, uint8 (3, 3, 16, 14): smooth with noise, the second pair noisier than the first."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(20, 230, 16)[:, None] + 5 * np.arange(14)
    originals = np.stack([np.stack([ramp, ramp[::-1], ramp.mean() + 0 * ramp])] * 3)
    originals = originals + generator.normal(0, 10, originals.shape)
    noise = generator.normal(size=originals.shape) * np.array([2.0, 20.0, 0.0])[:, None, None, None]
    return tuple(torch.from_numpy(part.clip(0, 255).astype(np.uint8)) for part in (originals, originals + noise))


def test_psnr_of_known_errors():
    black = torch.zeros((2, 3, 12, 12), dtype=torch.uint8)
    grey = black.clone()
    grey[0] += 51  # a fifth of the peak everywhere
    grey[1, 0] += 255  # the peak in a third of the values
    expected = torch.tensor([20 * math.log10(5), 10 * math.log10(3)], dtype=torch.float64)
    assert torch.allclose(psnr(black, grey), expected)
    assert torch.equal(psnr(black, black), torch.full((2,), torch.inf, dtype=torch.float64))


def test_ssim_equals_the_formula_window_by_window(pair):
    originals, decoded = (part.numpy().astype(np.float64) for part in pair)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for i in range(3):
        found = []
        for channel in range(3):
            for top in range(16 - 10):
                for left in range(14 - 10):
                    x = originals[i, channel, top : top + 11, left : left + 11]
                    y = decoded[i, channel, top : top + 11, left : left + 11]
                    mx, my = (weights * x).sum(), (weights * y).sum()
                    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                    cov = (weights * (x - mx) * (y - my)).sum()
                    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                    found.append(value)
        assert ssim(*pair)[i].item() == pytest.approx(np.mean(found), rel=1e-9)


def test_order_and_symmetry(pair):
    for measure in (psnr, ssim):
        assert torch.equal(measure(*pair), measure(*reversed(pair)))
        slightly, strongly, equal = measure(*pair)
        assert strongly < slightly < equal
    assert ssim(*pair)[2].item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_refuses_other_images(measure, pair):
    originals, decoded = pair
    for wrong in ((originals.float(), decoded), (originals[:, :1], decoded[:, :1]), (originals, decoded[0])):
        with pytest.raises(ValueError, match=r"they must be \(B, 3, H, W\) uint8"):
            measure(*wrong)
    with pytest.raises(ValueError, match="decode at the same size"):
        measure(originals, decoded[:, :, :12])


def test_ssim_needs_a_whole_window(pair):
    with pytest.raises(ValueError, match="14 x 10 pixels are smaller"):
        ssim(pair[0][:, :, :10], pair[1][:, :, :10])
