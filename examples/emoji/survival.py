"""Do the embedded model's concepts survive a nudge? Plain LoRA on 24 pictures of a style never seen, then ask names.

    python examples/emoji/survival.py --work build/emoji --model difftuning_control/assets/embedded

The demo's settings: rank 16 on the attention projections, 120 steps of 16 rows at a constant learning rate of 5e-3,
averaged weights (0.999 with warm-up), captions that are the name alone, no bank, no schedule of forgetting. For names
that were never tuned on, the drawn picture's lite0 features are compared with those of all true pictures of the style:
is the true one among the five nearest? The same before the tuning, and for the true pictures passed through the
autoencoder, which is the ceiling. One JSON object a style; `--grid` shows what became of the first names by alphabet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import Lite0, draw, load_model, pass_through, rank_of_truth, save_pictures, shares, step_generator, to_unit
from diffusers.training_utils import EMAModel
from peft import LoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TUNED = 24


def load_style(work: Path, style: str) -> tuple[torch.Tensor, list[str]]:
    """Pictures (N, 3, 64, 64) in [-1, 1] and names of one unseen style."""
    images = torch.from_numpy(np.load(work / "unseen" / f"{style}.npz")["images"]).permute(0, 3, 1, 2)
    return to_unit(images), [r["name"] for r in json.loads((work / "unseen" / f"{style}.json").read_text())]


def choose(count: int, asked: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are tuned on, and those that are asked."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:TUNED], order[TUNED : TUNED + asked].sort().values


@torch.no_grad()
def conditions(family, pictures: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and deviations of the latents, and the hidden states of the names."""
    pipe = family.pipe
    posterior = pipe.vae.encode(pictures).latent_dist
    ids = pipe.tokenizer(names, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return posterior.mean, posterior.std, pipe.text_encoder(ids)[0]


def tune(family, pictures: torch.Tensor, names: list[str], args: argparse.Namespace) -> None:
    """Plain LoRA; leaves the averaged weights in the denoiser."""
    pipe, unet = family.pipe, family.pipe.unet
    mean, std, hidden = conditions(family, pictures, names)
    torch.manual_seed(args.seed)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=1e-2)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True)
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    for step in range(args.steps):
        generator = step_generator(args.seed, step)
        rows = torch.randint(len(names), (args.batch_size,), generator=generator)
        latents = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        strata = torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=generator)
        t = (strata / args.batch_size * 1000).long().clamp(max=999)
        model_pred = unet(pipe.scheduler.add_noise(latents, noise, t), t, hidden[rows]).sample
        target = pipe.scheduler.get_velocity(latents, noise, t) if velocity else noise
        loss = (model_pred - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
    ema.copy_to(parameters)


def measure(args: argparse.Namespace, style: str, lite0: Lite0) -> dict:
    family = load_model(args.model)
    truth, names = load_style(args.work, style)
    tuned, asked = choose(len(names), args.names, args.seed)
    features = lite0.features(truth)
    prompts = [names[i] for i in asked]
    settings = {"steps": args.sampling_steps, "guidance_scale": args.guidance}
    drawn = {"autoencoder": pass_through(family.pipe.vae, truth[asked]), "before": draw(family, prompts, **settings)}
    tune(family, truth[tuned], [names[i] for i in tuned], args)
    drawn["after"] = draw(family, prompts, **settings)
    report = {"style": style, "model": str(args.model), "candidates": len(names), "names": len(asked)}
    for label, pictures in drawn.items():
        found = lite0.features(pictures)
        report[label] = shares(rank_of_truth(found, features, asked))
        report[label]["similarity"] = round(float((found * features[asked]).sum(1).mean()), 3)
    if args.grid is not None:
        rows = {"true": truth[asked[:12]]} | {label: pictures[:12] for label, pictures in drawn.items()}
        save_pictures(args.grid / f"survival-{style}.png", rows, prompts[:12])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=Path("difftuning_control/assets/embedded"))
    parser.add_argument("--styles", nargs="+", default=["flat", "streamline"])
    parser.add_argument("--grid", type=Path, default=None, help="folder for a grid a style")
    parser.add_argument("--output", type=Path, default=None, help="write the figures to this JSON file as well")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--names", type=int, default=160, help="how many names are asked")
    parser.add_argument("--sampling-steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lite0, rows = Lite0(), []
    for style in args.styles:
        rows.append(measure(args, style, lite0))
        print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
