"""Metrics as pure functions of features (N, D).

    fid                |μ_r − μ_g|² + tr(Σ_r + Σ_g − 2 (Σ_r Σ_g)^½)               lower is better
    kid                unbiased MMD² with the kernel (x·y / D + 1)³              lower is better, fair to few pictures
    density_coverage   how deep generated pictures lie among real ones, how many real ones have a neighbour
    domain_hit_rate    share that a logistic regression takes for the target's pictures and not for the source's
    pair_similarity    cosine to the true counterpart
    memorisation       cosine to the nearest training picture
    diversity          1 − cosine between pictures of the same prompt

References:
    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs (Bińkowski et al., 2018), https://arxiv.org/abs/1801.01401
    Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), https://arxiv.org/abs/2002.09797
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.system.hub import hub_or_cache

BLOCK = 1024  # rows that are compared at once


def _need(features: Tensor, least: int, metric: str, what: str) -> Tensor:
    if features.ndim != 2:
        raise UserError(f"{metric} needs features (N, D); the {what} ones are {tuple(features.shape)}.")
    if len(features) < least:
        raise UserError(f"{metric} needs at least {least} {what} pictures; there are {len(features)}.")
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"the {what} features for {metric} are not finite.")
    return features.double()


class _Given(nn.Module):
    """Lets torchmetrics take features for pictures."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_warning(real: int, generated: int, dimensions: int) -> str | None:
    """Why an FID of so few pictures misleads, or None."""
    few = min(real, generated)
    if few >= 5 * dimensions:
        return None
    return (
        f"FID of {few} pictures in {dimensions} dimensions is biased upwards (5 times as many are wanted); compare it "
        "only between sides of equal size, and trust KID more."
    )


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to the features, at least 0; warns under 5 D pictures.

    With rows A and B that are centred and divided by √(N − 1), tr (Σ_r Σ_g)^½ is the sum of the singular values of
    A Bᵀ, pictures by pictures. Eigenvalues of the D × D product, as in torchmetrics, take a hundred times as long for
    some dozens of pictures.

    Raises:
        UserError: with fewer than 2 pictures on a side.
    """
    real, generated = _need(real, 2, "FID", "real"), _need(generated, 2, "FID", "generated")
    if (warning := fid_warning(len(real), len(generated), real.shape[1])) is not None:
        warnings.warn(warning, stacklevel=2)
    means = real.mean(0), generated.mean(0)
    rows = [(x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((real, generated), means)]
    a, b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in rows)  # the same covariance, D rows
    shared = torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return max(0.0, float(distance))


def kid(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance, mean and standard deviation over random subsets; near 0 for equal distributions, may be below.

    Args:
        subset_size: pictures of each side in a subset; the smaller side's number, but at most 1000, when None.
        seed: of the subsets; the global generator is left as it was.

    Raises:
        UserError: with fewer pictures than a subset, or subsets of fewer than 2.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # the same

    size = subset_size if subset_size is not None else min(len(real), len(generated), 1000)
    if size < 2:
        raise UserError(f"KID needs at least 2 pictures on each side; there are {len(real)} and {len(generated)}.")
    real, generated = _need(real, size, "KID", "real"), _need(generated, size, "KID", "generated")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # of its buffer's size
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def density_coverage(real: Tensor, generated: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density (at least 0, about 1 where the distributions agree) and coverage (0 to 1).

    Density counts, for a generated picture, the real pictures whose k-nearest-neighbour ball holds it, over k;
    coverage is the share of real pictures whose ball holds a generated one.

    Raises:
        UserError: with no more than `neighbours` real pictures.
    """
    real = _need(real, neighbours + 1, "density", "real")
    generated = _need(generated, 1, "density", "generated")
    radii = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values  # the nearest is the picture itself
    inside = torch.cdist(real, generated) < radii[:, None]
    return float(inside.double().sum(0).mean() / neighbours), float(inside.any(1).double().mean())


def domain_hit_rate(source: Tensor, target: Tensor, generated: Tensor) -> tuple[float, float]:
    """Share of generated pictures that look like the target's and not like the source's, and how sure that judge is.

    A logistic regression on standardised features, classes weighted equally. The second number is its accuracy on
    source and target pictures it was not fitted on (5-fold); near 0.5 the first one means nothing.

    Raises:
        UserError: with fewer than 5 pictures of source or target.
    """
    from sklearn.linear_model import LogisticRegression  # saves sklearn where no judge is fitted
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = [_need(f, 5, "domain hit rate", w) for f, w in ((source, "source"), (target, "target"))]
    inputs = torch.cat(parts).numpy()
    labels = np.repeat([0, 1], [len(p) for p in parts])
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced"))
    accuracy = cross_val_score(judge, inputs, labels, cv=5, scoring="balanced_accuracy").mean()
    hits = judge.fit(inputs, labels).predict(_need(generated, 1, "domain hit rate", "generated").numpy())
    return float(hits.mean()), float(accuracy)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def pair_similarity(generated: Tensor, truth: Tensor) -> float:
    """Mean cosine between each generated picture and its true counterpart, row by row, −1 to 1.

    Raises:
        UserError: if the numbers of pictures differ.
    """
    if len(generated) != len(truth):
        raise UserError(f"there are {len(generated)} generated pictures and {len(truth)} true counterparts.")
    generated, truth = _need(generated, 1, "pair similarity", "generated"), _need(truth, 1, "pair similarity", "true")
    return float(F.cosine_similarity(generated, truth).mean())


def memorisation(generated: Tensor, training: Tensor) -> float:
    """Mean cosine of each generated picture to the nearest training picture, −1 to 1; near 1 it is copied."""
    generated = _need(generated, 1, "memorisation", "generated")
    parts = (_need(part, 1, "memorisation", "train") for part in training.split(BLOCK))  # there may be very many
    return float(torch.stack([_cosine(generated, part).amax(1) for part in parts]).amax(0).mean())


def diversity(generated: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean of 1 − cosine over pairs of pictures of the same prompt; None where no prompt was drawn twice."""
    if len(prompts) != len(generated):
        raise UserError(f"there are {len(generated)} generated pictures and {len(prompts)} prompts.")
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    distances = []
    for rows in (g for g in groups.values() if len(g) > 1):
        similarity = _cosine(generated[rows].double(), generated[rows].double())
        pairs = len(rows) * (len(rows) - 1)
        distances.append(1 - float(similarity.sum() - similarity.trace()) / pairs)
    return sum(distances) / len(distances) if distances else None


def clip_score(pictures: Sequence[Any], prompts: Sequence[str], model: str = "openai/clip-vit-large-patch14") -> float:
    """100 · max(mean cosine of picture and its prompt in CLIP, 0); `model` is a Hub id or a local directory.

    References:
        CLIPScore (Hessel et al., 2021), https://arxiv.org/abs/2104.08718

    Raises:
        UserError: if the model's weights are not to be had.
    """
    from transformers import CLIPModel, CLIPProcessor  # saves it where there is no CLIP

    from difftuning_control.families.hub import quiet_loading  # for such models alone

    try:
        with hub_or_cache(model), quiet_loading():
            clip, processor = (
                CLIPModel.from_pretrained(model, use_safetensors=True),
                CLIPProcessor.from_pretrained(model),
            )
    except OSError:
        raise UserError(
            f"the weights of CLIP ({model}) are not on this machine and could not be downloaded; leave the CLIP score "
            "out, or name a local directory."
        ) from None
    shown = [picture.convert("RGB") for picture in pictures]
    inputs = processor(text=list(prompts), images=shown, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = clip(**inputs)
    return max(100 * float(F.cosine_similarity(output.image_embeds, output.text_embeds).mean()), 0.0)
