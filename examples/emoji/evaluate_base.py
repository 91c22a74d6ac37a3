"""Is the embedded model good enough to see? A grid of fixed prompts, and how often the true picture is found.

    python examples/emoji/evaluate_base.py --work build/emoji --model difftuning_control/assets/embedded

For every base picture (style, name): the generated picture's lite0 features (ImageNet features from a PyPI package)
against those of all true pictures of that style; is the true one among the five nearest, is it the nearest? The same
for pictures merely passed through the autoencoder, which is the ceiling, and for the names held out of training.
Note that the autoencoder was trained with a perceptual term on shallow features of the same network, so `pixel L1`
is given beside it as a measure that shares nothing with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import Lite0, load_base, to_unit
from diffusers import StableDiffusionPipeline

from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.families.loading import family_of

PROMPTS = (
    "red heart",
    "slice of pizza",
    "dog face",
    "red apple",
    "cat face",
    "birthday cake",
    "soccer ball",
    "guitar",
    "sunflower",
    "hamburger",
    "fish",
    "butterfly",
    "banana",
    "christmas tree",
    "trophy",
    "key",
    "umbrella",
    "rabbit face",
    "strawberry",
    "teacup without handle",
    "light bulb",
    "envelope",
    "frog",
    "mushroom",
)


def rank_of_truth(features: torch.Tensor, truth: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Rank (0 is nearest) of each row's true picture among all true pictures of its style, by cosine similarity."""
    similarity = features @ truth.T
    return (similarity > similarity.gather(1, own.view(-1, 1))).sum(1)


def shares(ranks: torch.Tensor) -> dict[str, float]:
    return {"top1": round(float((ranks == 0).float().mean()), 3), "top5": round(float((ranks < 5).float().mean()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=Path("difftuning_control/assets/embedded"))
    parser.add_argument("--grid", type=Path, default=Path("build/emoji/grid.png"))
    parser.add_argument("--style", default="noto")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--limit", type=int, default=0, help="evaluate only so many names")
    args = parser.parse_args()
    family = family_of(StableDiffusionPipeline.from_pretrained(args.model))
    settings = {"seed": 0, "steps": args.steps, "guidance_scale": args.guidance, "resolution": 64}
    columns = {"with style": [f"{args.style} emoji {p}" for p in PROMPTS], "name alone": list(PROMPTS)}
    pictures = {label: sample_pictures(family, prompts, **settings) for label, prompts in columns.items()}
    rows = {}
    for label, drawn in pictures.items():
        rows[label + " "], rows[label] = drawn[:12], drawn[12:]
    save_grid(args.grid, rows, ["/".join(pair) for pair in zip(PROMPTS[:12], PROMPTS[12:])])

    lite0, report = Lite0(), {}
    known, known_records = load_base(args.work)
    held, held_records = load_base(args.work, held_out=True)
    of_style = [(i, r) for i, r in enumerate(known_records) if r["style"] == args.style]
    held_style = [(i, r) for i, r in enumerate(held_records) if r["style"] == args.style]
    truth = to_unit(torch.cat([known[[i for i, _ in of_style]], held[[i for i, _ in held_style]]]))
    names = [r["name"] for _, r in of_style + held_style]
    features = lite0.features(truth)
    through = torch.cat(
        [family.decode(family.scale_latents(family.encode_moments(part)[0])) for part in truth.split(64)]
    )
    own = torch.arange(len(truth))
    report["pictures"] = len(truth)
    report["autoencoder"] = shares(rank_of_truth(lite0.features(through), features, own))
    report["autoencoder"]["pixel_l1"] = round(float((through - truth).abs().mean()), 4)
    chosen = {"model": own[: len(of_style)], "model on held-out names": own[len(of_style) :]}
    for label, rows_ in chosen.items():
        if args.limit and len(rows_) > args.limit:
            rows_ = rows_[torch.randperm(len(rows_), generator=torch.Generator().manual_seed(0))[: args.limit]]
        drawn = sample_pictures(family, [f"{args.style} emoji {names[i]}" for i in rows_], **settings, batch_size=64)
        pixels = torch.stack([to_unit(torch.from_numpy(np.array(p))).permute(2, 0, 1) for p in drawn])
        report[label] = shares(rank_of_truth(lite0.features(pixels), features, rows_)) | {"names": len(rows_)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
