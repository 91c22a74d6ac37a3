"""The variational bound that trains the variance of a model which predicts it beside ε, such as a DiT.

One term of the bound a row, in bits per dimension, with q the forward process and p the model:

    t > 0    KL( q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t) )
    t = 0    −log p(x_0 | x_1), the normal density gathered over bins of 2/255

    log σ²_p = (v + 1)/2 · log β_t + (1 − v)/2 · log β̃_t,    v the model's further output

The mean of p comes from ε without its gradient, so the bound moves nothing but v.

References:
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), https://arxiv.org/abs/2102.09672
    Scalable Diffusion Models with Transformers (Peebles & Xie, 2022), https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difftuning_control.objective.noise import NoiseProcess, looked_up
from difftuning_control.objective.rows import moved

BOUND_WEIGHT = 0.001  # λ of L_simple + λ L_vlb
BIN = 1 / 255  # half of the width of a bin
EDGE = 0.999  # beyond it a bin is open


def variational_bound(
    process: NoiseProcess,
    latents: Tensor,
    noisy_model_input: Tensor,
    noise_pred: Tensor,
    variance: Tensor,
    levels: Tensor,
) -> Tensor:
    """The bound's term of every row at its level, (B,) float32, in bits per dimension; only `variance` has a gradient.

    Args:
        latents, noisy_model_input, noise_pred: x_0, x_t and ε, (B, C, h, w).
        variance: v, the same shape; −1 stands for β̃_t and 1 for β_t.
        levels: t, (B,).
    """
    latents, noisy, noise_pred = latents.float(), noisy_model_input.float(), noise_pred.detach().float()
    smallest, largest, of_clean, of_noisy = _posterior(process, levels, latents)
    predicted = (noisy - _at(process.sigmas, levels, noisy) * noise_pred) / _at(process.alphas, levels, noisy)
    true_mean, mean = (of_clean * clean + of_noisy * noisy for clean in (latents, predicted))
    share = (variance.float() + 1) / 2
    log_variance = share * largest + (1 - share) * smallest
    divergence = 0.5 * (
        log_variance
        - smallest
        - 1
        + torch.exp(smallest - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    last = moved(levels == 0, latents).view(-1, *[1] * (latents.ndim - 1))
    bound = torch.where(last, -discretized_log_likelihood(latents, mean, 0.5 * log_variance), divergence)
    return bound.flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal distribution's mass in the bin of width 2/255 around each value; the outer bins are open."""
    inverse, centred = torch.exp(-log_scale), values - mean
    below, above = (_normal_cdf(inverse * (centred + side)) for side in (-BIN, BIN))
    mass = torch.where(values < -EDGE, above, torch.where(values > EDGE, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the models of these papers were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _posterior(process: NoiseProcess, levels: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log β̃_t and log β_t, and what x_0 and x_t are multiplied by in the mean of q(x_{t−1} | x_t, x_0).

    β̃_0 is 0, of which there is no logarithm; β̃_1 stands in, as in the papers' code.
    """
    kept = process.alphas.double().square()
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    betas = 1 - kept / before
    smallest = betas * (1 - before) / (1 - kept)
    smallest = torch.cat([smallest[1:2], smallest[1:]])
    of_clean = betas * before.sqrt() / (1 - kept)
    of_noisy = (1 - betas).sqrt() * (1 - before) / (1 - kept)
    tables = (smallest.log(), betas.log(), of_clean, of_noisy)
    a, b, c, d = (_at(table.float(), levels, like) for table in tables)  # not every device has float64
    return a, b, c, d


def _at(table: Tensor, levels: Tensor, like: Tensor) -> Tensor:
    return looked_up(table, levels, like.device).to(like.dtype).view(-1, *[1] * (like.ndim - 1))
