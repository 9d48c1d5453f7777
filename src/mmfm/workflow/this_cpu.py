"""How fast this machine's CPU does the arithmetic of small networks, measured."""

import time
from dataclasses import replace

import torch

from mmfm.workflow import costs
from mmfm.workflow.costs import Rates

_EFFICIENCY = 0.25
"""Share of the rate measured on one block that trainings of small models reach: 0.03 to 0.7, more with more tokens. The
rest goes into attention, the optimiser, and calls too small for all cores."""


def rates_for(image_bytes: float, processes: int = 1) -> Rates:
    """Return :func:`rates` with the assumed rate of decoding files of a mean size."""
    return replace(rates(processes), decode=min(costs.CPU.decode, costs.DECODED_BYTES / image_bytes))


def rates(processes: int = 1) -> Rates:
    """Return the rates of each process if they share this one's threads, from half a second's measurement."""
    found = _EFFICIENCY * measured_rate() / processes
    return replace(costs.CPU, single=found, half=found, encoder=found)


def measured_rate(seconds: float = 0.5) -> float:
    """Return operations per second, float32, of all threads on a block such as those of small transformers."""
    width, rows = 384, 2048
    x, into, out = torch.ones(rows, width), torch.ones(width, 4 * width), torch.ones(4 * width, width)
    done, start = 0, time.perf_counter()
    with torch.no_grad():
        while (spent := time.perf_counter() - start) < seconds or not done:
            torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (width,)) @ into) @ out
            done += 1
    return done * 16 * rows * width**2 / spent
