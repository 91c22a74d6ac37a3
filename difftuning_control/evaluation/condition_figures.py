"""Figures of how well a drawn picture follows its condition: it is annotated again and compared with what was asked.

    edges        F1 = 2 P R / (P + R); P: share of found edge pixels with an asked one within a pixel, R: the reverse
    depth        RMSE = (mean (asked − found)²)^½                                               lower is better
    normals      mean of cos ∠(n_asked, n_found), n = (2 c − 1) / |2 c − 1| for a colour c
    masks        mIoU = mean over asked segments of |A ∩ B| / |A ∪ B|, B the found segment matched to A
    similarity   SSIM, of the conditions as they are

Soft edge maps are cut at a quarter of full scale, for lineart_standard draws its middle line at a half. Colours of
segments are arbitrary, so segments are matched one to one such that the sum of their IoU is largest; what was not
segmented, in black, counts as one.

References:
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023), https://arxiv.org/abs/2302.05543
    Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004),
    https://doi.org/10.1109/TIP.2003.819861
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from difftuning_control.evaluation.metric_table import lower_is_better

KINDS = ("edges", "depth", "normals", "masks", "similarity")
MAIN: dict[str, tuple[str, bool]] = {  # of each kind the figure that says how well it is followed; is higher better?
    kind: (name, not lower_is_better(name)) for kind, name in zip(KINDS, ("f1", "rmse", "cosine", "miou", "ssim"))
}
EDGE = 0.25
SEGMENT = 0.005
NO_DIRECTION = 0.02  # a normal that short is grey up to the rounding of its colour


def fidelity(kind: str, asked: Tensor, found: Tensor) -> dict[str, Tensor]:
    """Figures of how well found conditions agree with the asked ones, each (N,) float32 on the CPU.

    edges: f1 and ssim; depth: rmse and ssim; normals: cosine and rmse; masks: miou; similarity: ssim. All reach 1 at
    best but rmse, which reaches 0; f1, miou and rmse lie in 0 to 1, cosine and ssim in −1 to 1.

    Args:
        kind: one of `KINDS`, as `ControlSpec.kind` says it; `MAIN` names its main figure.
        asked, found: conditions (N, 3, H, W) in 0 to 1; edges are bright on black.

    Raises:
        ValueError: if the kind is unknown, the shapes differ or a value lies outside of 0 to 1.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of conditions is {kind!r}; expected one of {', '.join(KINDS)}.")
    if asked.shape != found.shape or asked.ndim != 4 or asked.shape[1] != 3 or not asked.numel():
        raise ValueError(
            f"conditions are {tuple(asked.shape)} asked and {tuple(found.shape)} found; expected equal (N, 3, H, W)."
        )
    for name, values in (("asked", asked), ("found", found)):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"the {name} conditions lie in {low:g} to {high:g}; expected values from 0 to 1.")
    # by single pictures, for many at once take much memory; on the CPU, for GPUs round the convolutions of SSIM
    rows = [_FIGURES[kind](a.detach().cpu().double(), f.detach().cpu().double()) for a, f in zip(asked, found)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in rows[0]}


def _edges(asked: Tensor, found: Tensor) -> dict[str, float]:
    return {"f1": _f1(asked.mean(0) > EDGE, found.mean(0) > EDGE), "ssim": _ssim(asked, found)}


def _depth(asked: Tensor, found: Tensor) -> dict[str, float]:
    return {"rmse": _rmse(asked.mean(0), found.mean(0)), "ssim": _ssim(asked, found)}


def _normals(asked: Tensor, found: Tensor) -> dict[str, float]:
    return {"cosine": _cosine(2 * asked - 1, 2 * found - 1), "rmse": _rmse(asked, found)}


def _masks(asked: Tensor, found: Tensor) -> dict[str, float]:
    return {"miou": _miou(asked, found)}


def _similarity(asked: Tensor, found: Tensor) -> dict[str, float]:
    return {"ssim": _ssim(asked, found)}


_FIGURES = {"edges": _edges, "depth": _depth, "normals": _normals, "masks": _masks, "similarity": _similarity}


def _rmse(asked: Tensor, found: Tensor) -> float:
    return float((asked - found).square().mean().sqrt())


def _f1(asked: Tensor, found: Tensor) -> float:
    """Of edges (H, W) bool, with a tolerance of one pixel in eight directions; 1 if there are none on either side."""
    if not (asked.any() and found.any()):
        return float(not asked.any() and not found.any())
    near_asked, near_found = (F.max_pool2d(e[None].double(), 3, 1, 1)[0] > 0 for e in (asked, found))
    precision, recall = float(near_asked[found].double().mean()), float(near_found[asked].double().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _cosine(asked: Tensor, found: Tensor) -> float:
    """Mean over pixels of normals (3, H, W); where one has no direction 0, where neither has 1."""
    absent = [n.norm(dim=0) < NO_DIRECTION for n in (asked, found)]
    cosine = F.cosine_similarity(asked, found, dim=0)
    cosine = torch.where(absent[0] | absent[1], (absent[0] & absent[1]).double(), cosine)
    return float(cosine.mean())


def _ssim(asked: Tensor, found: Tensor) -> float:
    """With a Gaussian window of σ = 1.5 and 11 pixels, or the largest that fits into a smaller picture."""
    # saves torchmetrics where no similarity is asked
    from torchmetrics.functional.image import structural_similarity_index_measure

    radius = (min(asked.shape[1:]) - 1) // 2
    sigma = 1.5 if radius >= 5 else max(radius, 0.3) / 3.5  # torchmetrics takes the window from σ: radius ⌊3.5 σ + ½⌋
    asked, found = asked[None].float(), found[None].float()  # ten times as fast as float64
    value = structural_similarity_index_measure(found, asked, sigma=sigma, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return float(value)


def _segments(picture: Tensor, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's segment, −1 in those that cover less than a share of the picture, and the segments' pixels."""
    red, green, blue = (picture * 255).round().long().flatten(1).numpy()
    _, segment, pixels = np.unique((red * 256 + green) * 256 + blue, return_inverse=True, return_counts=True)
    kept = pixels >= least * len(segment)
    return np.where(kept, kept.cumsum() - 1, -1)[segment], pixels[kept]


def _miou(asked: Tensor, found: Tensor) -> float:
    """Over asked segments of at least 0.5 % of the picture, found ones from a tenth of that; 1 if there are none."""
    from scipy.optimize import linear_sum_assignment  # saves scipy.optimize where no segments are

    (a, a_pixels), (b, b_pixels) = _segments(asked, SEGMENT), _segments(found, SEGMENT / 10)
    if not len(a_pixels):
        return float(not (b_pixels >= SEGMENT * len(b)).any())
    both, shape = (a >= 0) & (b >= 0), (len(a_pixels), len(b_pixels))
    overlap = np.bincount(a[both] * shape[1] + b[both], minlength=shape[0] * shape[1]).reshape(shape)
    iou = overlap / (a_pixels[:, None] + b_pixels - overlap)
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / len(a_pixels))
