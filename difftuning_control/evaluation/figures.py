"""Figures of a model's pictures against real ones, with the same prompts, seeds, steps and guidance for every side.

Real pictures pass through the model's own autoencoder first: otherwise its softness, which all sides share, would
dominate every distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftuning_control.data.examples import ImageData
from difftuning_control.data.images import fit_square, to_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation import metrics
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.evaluation.features import Features

if TYPE_CHECKING:
    from difftuning_control.data.study_inputs import Materials
    from difftuning_control.families.family import Family

LEAST_PICTURES = 5
MOST = 256  # samples of the base, or pictures that stand for them, that quality is judged against; in studies also real
MOST_REAL = 1000  # real pictures in an evaluation, as many as KID compares at once
FEW = 64  # pictures in memory; a multiple of the batches of autoencoder and features
LEAST_REAL = 6  # density looks at each one's five nearest


@dataclass(frozen=True)
class Sampling:
    """How every side draws: prompts, and the settings of `sample_pictures`.

    Args:
        prompts: one picture each, and seed.
        seeds: of the noise; a prompt is drawn once a seed.
        control: a condition a prompt, (N, 3, H, W) uint8; models without a ControlNet draw without it.
    """

    prompts: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 20
    guidance_scale: float = 4.0
    resolution: int = 512
    batch_size: int = 16
    control: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise UserError("an evaluation needs at least one prompt and one seed.")

    def draw(self, family: Family, advance: Callable[[int], object] = lambda n: None) -> list[Image.Image]:
        """All pictures, prompts in order for the first seed, then for the next."""
        pictures = []
        control = self.control if family.controlnet is not None else None
        for seed in self.seeds:
            pictures += sample_pictures(
                family,
                self.prompts,
                seed=seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                resolution=self.resolution,
                batch_size=self.batch_size,
                advance=advance,
                control=control,
            )
        return pictures

    @property
    def repeated_prompts(self) -> list[str]:
        return self.prompts * len(self.seeds)


@dataclass(frozen=True)
class Reference:
    """Features of what generated pictures are compared with, (N, D) each.

    Args:
        real: pictures of the new domain that nothing was tuned on.
        source: pictures of the old domain.
        training: the pictures that were tuned on.
        counterparts: the true picture of a caption, as a row (D,), where there is one.
    """

    features: Features
    real: Tensor
    source: Tensor
    training: Tensor
    counterparts: dict[str, Tensor] = field(default_factory=dict)


def through_autoencoder(family: Family, data: ImageData, resolution: int, batch_size: int = 16) -> list[Image.Image]:
    """Real pictures, cut to squares, encoded and decoded."""
    pictures: list[Image.Image] = []
    for start in range(0, len(data), batch_size):
        part = [fit_square(e.load(), resolution) for e in data.examples[start : start + batch_size]]
        mean, _ = family.encode_moments(torch.from_numpy(np.stack(part)))
        pictures += to_images(family.decode(family.scale_latents(mean)))
    return pictures


def reconstructed(family: Family, features: Features, data: ImageData, resolution: int) -> Tensor:
    """Features of real pictures that went through the autoencoder, (N, D); a few pictures are in memory at a time."""
    parts = [ImageData(data.source, data.examples[start : start + FEW]) for start in range(0, len(data), FEW)]
    return torch.cat([features(through_autoencoder(family, part, resolution)) for part in parts])


def decoded(family: Family, latents: Tensor, batch_size: int = 16) -> list[Image.Image]:
    """Pictures of latents (N, C, h, w) in the denoiser's scale."""
    return [picture for part in latents.split(batch_size) for picture in to_images(family.decode(part))]


def check_held_out(real: ImageData) -> None:
    """Refuse too few real pictures that nothing was tuned on.

    Raises:
        UserError: saying where more come from.
    """
    if len(real) < LEAST_REAL:
        raise UserError(
            f"an evaluation needs at least {LEAST_REAL} held-out pictures; there are {len(real)}. Raise data.holdout, "
            "or name a folder of others with data.validation_path."
        )


def build_reference(
    family: Family,
    features: Features,
    *,
    real: ImageData,
    training: ImageData,
    source: Tensor,
    resolution: int,
) -> Reference:
    """Features of all that an evaluation compares with.

    Args:
        real, training: of the new domain; they pass through the autoencoder.
        source: features of pictures of the old domain as the model draws or decodes them.

    Raises:
        UserError: with fewer than 6 real or 5 source pictures.
    """
    check_held_out(real)
    if len(source) < LEAST_PICTURES:
        raise UserError(f"an evaluation needs at least {LEAST_PICTURES} source pictures; there are {len(source)}.")
    held_out = reconstructed(family, features, real, resolution)
    counterparts = {example.caption: row for example, row in zip(real.examples, held_out)}
    if len(counterparts) < len(real):  # captions are no names here, so no picture is the true one of its caption
        counterparts = {}
    trained = reconstructed(family, features, training, resolution)
    return Reference(features, held_out, source, trained, counterparts)


def reference_of(family: Family, features: Features, inputs: Materials) -> Reference:
    """The reference of a study: its held-out pictures, and its decoded bank for the old domain."""
    return build_reference(
        family,
        features,
        real=inputs.held_out.sample(MOST),
        training=inputs.data,
        source=features(decoded(family, inputs.bank.latents[:MOST])),
        resolution=inputs.resolution,
    )


def figures(
    pictures: Sequence[Image.Image], prompts: Sequence[str], reference: Reference, generated: Tensor | None = None
) -> dict[str, Any]:
    """Every figure of one side: kid, fid, domain_hit, pair_similarity, memorisation, density, coverage, diversity, …

    `domain_judge` is the accuracy of the classifier behind domain_hit; `pair_similarity`, `diversity` and `clip_score`
    are None where there are no counterparts, no prompt was drawn twice, or the features are no CLIP's.

    Args:
        generated: the pictures' features, where they are known already.

    Raises:
        UserError: with fewer than 5 pictures.
    """
    if len(pictures) < LEAST_PICTURES:
        raise UserError(f"an evaluation needs at least {LEAST_PICTURES} generated pictures; there are {len(pictures)}.")
    generated, clip = reference.features(pictures) if generated is None else generated, reference.features.clip
    kid, kid_spread = metrics.kid(reference.real, generated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once for all sides, by `fid_warning`
        fid = metrics.fid(reference.real, generated)
    hit, judge = metrics.domain_hit_rate(reference.source, reference.real, generated)
    density, coverage = metrics.density_coverage(reference.real, generated)
    paired = [i for i, prompt in enumerate(prompts) if prompt in reference.counterparts]
    truth = [reference.counterparts[prompts[i]] for i in paired]
    return {
        "kid": kid,
        "kid_spread": kid_spread,
        "fid": fid,
        "domain_hit": hit,
        "domain_judge": judge,
        "pair_similarity": metrics.pair_similarity(generated[paired], torch.stack(truth)) if truth else None,
        "memorisation": metrics.memorisation(generated, reference.training),
        "density": density,
        "coverage": coverage,
        "diversity": metrics.diversity(generated, prompts),
        "clip_score": metrics.clip_score(pictures, prompts, clip) if clip is not None else None,
        "pictures": len(pictures),
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and standard deviation over seeds (None for one) and their number."""
    sample = np.array(values, dtype=np.float64)
    return {
        "mean": float(sample.mean()),
        "spread": float(sample.std(ddof=1)) if len(sample) > 1 else None,
        "runs": len(sample),
    }


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Mean and spread of every figure that all runs have as a number."""
    names = [k for k, v in runs[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    common = [k for k in names if all(isinstance(r.get(k), (int, float)) for r in runs)]
    return {name: spread([r[name] for r in runs]) for name in common if name not in ("seed", "steps", "pictures")}
