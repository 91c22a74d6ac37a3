"""Is the embedded model good enough to see? A grid of fixed prompts, and how often the true picture is found.

    python examples/emoji/evaluate_base.py --work build/emoji --model difftuning_control/assets/embedded

For every base picture of a style: the drawn picture's lite0 features (ImageNet features from a PyPI package) against
those of all true pictures of that style; is the true one among the five nearest, is it the nearest? At each guidance
scale, for the names that were trained on and for those held out; besides
    autoencoder     pictures merely passed through it, which is the ceiling
    composed        held-out names made of words that are known ("blue book"), among the same pictures
    recoloured      pairs never trained on ("green guitar"): is the name found among a hundred names' pictures, all
                    recoloured in that colour, and is the colour found among the same picture in every colour?
The autoencoder was trained with a perceptual term on maps of the same network, so `pixel_l1` is given beside it as a
measure that shares nothing with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import (
    Lite0,
    draw,
    load_base,
    load_model,
    load_rgba,
    pass_through,
    prompt_grid,
    rank_of_truth,
    shares,
    to_unit,
)
from variants import COLOURS, HELD_PAIRS, on_ground, recolour

WHITE = (1.0, 1.0, 1.0)
CANDIDATES = 100


def as_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return to_unit(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def recoloured(family, lite0: Lite0, work: Path, style: str, settings: dict) -> dict:
    """Name and colour of pairs that were never trained on, by the rules of this file's docstring."""
    images, records = load_rgba(work)
    own = {r["name"]: images[i] for i, r in enumerate(records) if r["style"] == style and not r["held_out"]}
    pairs = [tuple(pair.split(" ", 1)) for pair in HELD_PAIRS]
    pairs = [(c, n) for c, n in pairs if n in own and recolour(own[n], c) is not None]
    asked = dict.fromkeys(n for _, n in pairs)
    candidates = [n for n in (asked | dict.fromkeys(own)) if recolour(own[n], "blue") is not None][:CANDIDATES]
    drawn = draw(family, [f"{style} emoji {c} {n}" for c, n in pairs], **settings)
    truth, names_found, colours_found = {}, [], []
    for picture, (colour, name) in zip(drawn, pairs):
        if colour not in truth:
            pictures = [on_ground(recolour(own[n], colour), WHITE) for n in candidates]
            truth[colour] = lite0.features(as_tensor(pictures))
        found, row = lite0.features(picture[None]), torch.tensor([candidates.index(name)])
        names_found.append(rank_of_truth(found, truth[colour], row))
        same = as_tensor([on_ground(recolour(own[name], c), WHITE) for c in COLOURS])
        apart = (same - picture).square().mean((1, 2, 3))
        colours_found.append((apart < apart[list(COLOURS).index(colour)]).sum().view(1))
    found = {"name": shares(torch.cat(names_found)), "colour": shares(torch.cat(colours_found))}
    return {"pairs": len(pairs), "names": len(candidates), "colours": len(COLOURS)} | found


def measure(args: argparse.Namespace) -> dict:
    family, lite0 = load_model(args.model), Lite0()
    known, held = load_base(args.work), load_base(args.work, held_out=True)
    rows = [[i for i, r in enumerate(records) if r["style"] == args.style] for _, records in (known, held)]
    truth = to_unit(torch.cat([known[0][rows[0]], held[0][rows[1]]]))
    records = [known[1][i] for i in rows[0]] + [held[1][i] for i in rows[1]]
    features, own = lite0.features(truth), torch.arange(len(truth))
    through = pass_through(family.pipe.vae, truth)
    report = {"model": str(args.model), "style": args.style, "pictures": len(truth)}
    report["autoencoder"] = shares(rank_of_truth(lite0.features(through), features, own))
    report["autoencoder"]["pixel_l1"] = round(float((through - truth).abs().mean()), 4)
    chosen = {
        "known": own[: len(rows[0])],
        "held out": torch.tensor([i for i in own[len(rows[0]) :] if not records[i]["composed"]]),
        "composed": torch.tensor([i for i in own[len(rows[0]) :] if records[i]["composed"]]),
    }
    for label, asked in chosen.items():
        if args.limit and len(asked) > args.limit:
            asked = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))[: args.limit]]
        report[label] = {"names": len(asked)}
        for scale in args.guidance:
            prompts = [f"{args.style} emoji {records[i]['name']}" for i in asked]
            drawn = draw(family, prompts, steps=args.steps, guidance_scale=scale)
            report[label][f"guidance {scale:g}"] = shares(rank_of_truth(lite0.features(drawn), features, asked))
    settings = {"steps": args.steps, "guidance_scale": args.guidance[0]}
    report["recoloured"] = recoloured(family, lite0, args.work, args.style, settings)
    prompt_grid(family, args.grid, args.style, args.guidance[0], args.steps)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=Path("difftuning_control/assets/embedded"))
    parser.add_argument("--grid", type=Path, default=Path("build/emoji/grid.png"))
    parser.add_argument("--output", type=Path, default=None, help="write the figures to this JSON file as well")
    parser.add_argument("--style", default="noto")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="the first serves the grid too")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--limit", type=int, default=0, help="evaluate only so many names")
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
