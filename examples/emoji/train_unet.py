"""Train the embedded model's denoiser and its small text model, jointly, on the bank of latents.

    python examples/emoji/train_unet.py --work build/emoji --steps 17000
    python examples/emoji/train_unet.py --work build/emoji --export difftuning_control/assets/embedded

v-prediction (arXiv:2202.00512) on Stable Diffusion's noise schedule with min-SNR weights (arXiv:2303.09556); beside it,
maps of the picture as an ImageNet network sees it are read out of the denoiser's middle (arXiv:2410.06940). A third of
the rows are base pictures as they are, the others their variants, whose captions say what was done to them; one caption
in four leaves the style out, one in ten is empty. The learning rate is constant after a warm-up and falls to nothing
over the last part of `--steps` (`--decay`), so that a run can be exported or lengthened at any point before that.
Resumable: run the same command again. A signal to end (TERM) saves first. `--export` writes the averaged weights as a
StableDiffusionPipeline directory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_bank import MAP_SHAPE
from common import Log, family_of, load_state, prompt_grid, save_state, step_generator, when_ended
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from text_model import TEXT_LENGTH, WIDTH, build_text_model, kept_tokenizer
from transformers import CLIPTokenizer
from variants import caption

from difftuning_control.families.older_form import write_older_form

UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (3, 6),  # the numbers of heads, of 32 channels each
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
MIN_SNR_GAMMA = 5.0
LEAST_WEIGHT = 0.25  # at the noisiest levels, where min-SNR leaves next to nothing and what is drawn is decided
UNCHANGED = 0.35  # share of the rows that are base pictures as they are


class Model(torch.nn.Module):
    """Text model and denoiser, and what reads maps of the picture out of the denoiser's middle; only trained with."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.unet = build_text_model(tokenizer), UNet2DConditionModel(**UNET)
        width, channels = UNET["block_out_channels"][-1], MAP_SHAPE[0]
        self.reader = torch.nn.Sequential(
            torch.nn.Conv2d(width, 2 * width, 1), torch.nn.SiLU(), torch.nn.Conv2d(2 * width, channels, 1)
        )
        self.unet.mid_block.register_forward_hook(lambda module, args, output: setattr(self, "middle", output))


class Bank:
    """Latents (records, variants, C, H, W) float16 and the parts of their captions."""

    def __init__(self, work: Path):
        self.latents = torch.from_numpy(np.load(work / "latents.npy"))
        self.maps = torch.from_numpy(np.load(work / "maps.npy"))
        self.parts = json.loads((work / "bank.json").read_text())

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Latents, maps and captions of a batch."""
        records, count = self.latents.shape[:2]
        rows = torch.randint(records, (size,), generator=generator)
        columns = torch.randint(1, count, (size,), generator=generator)
        columns[torch.rand(size, generator=generator) < UNCHANGED] = 0
        texts = []
        for row, column, chance in zip(rows, columns, torch.rand(size, generator=generator).tolist()):
            texts.append("" if chance < 0.1 else caption(self.parts[row][column], with_style=chance > 0.35))
        return self.latents[rows, columns].float(), self.maps[rows, columns].float(), texts


def learning_rate(step: int, args: argparse.Namespace) -> float:
    return args.learning_rate * min(1.0, (step + 1) / 500, (args.steps - step) / (args.decay * args.steps))


def targets(scheduler: DDIMScheduler, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple:
    """What the denoiser should predict, and each row's weight: min-SNR's, at least LEAST_WEIGHT."""
    signal_power = scheduler.alphas_cumprod.to(latents.device)[t]
    snr = signal_power / (1 - signal_power)
    if scheduler.config.prediction_type == "epsilon":
        return noise, snr.clamp(max=MIN_SNR_GAMMA) / snr
    weights = (snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)).clamp(min=LEAST_WEIGHT)
    return scheduler.get_velocity(latents, noise, t), weights


class Training:
    """Model, optimizer and average, as they stand after `step` steps."""

    def __init__(self, args: argparse.Namespace, model: Model, ema: EMAModel, tokenizer: CLIPTokenizer):
        self.args, self.model, self.ema, self.tokenizer = args, model.to(args.device), ema, tokenizer
        model.unet.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
        ema.to(args.device)
        self.scheduler = DDIMScheduler(**SCHEDULER, prediction_type=args.prediction)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
        )
        self.bank, self.step, self.totals = Bank(args.work), 0, []
        if state := load_state(args.work / "unet.ckpt"):
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.totals = state["step"], list(state["totals"])

    def save(self) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        states = {name: part.state_dict() for name, part in parts.items()}
        save_state(self.args.work / "unet.ckpt", step=self.step, totals=self.totals, **states)

    def take_step(self) -> None:
        args, device = self.args, self.args.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args)
        generator = step_generator(args.seed, self.step)
        latents, maps, texts = self.bank.draw(args.batch_size, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        strata = torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=generator)
        t = (strata / args.batch_size * 1000).long().clamp(max=999).to(device)
        latents = latents.to(device)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        noisy_latents = self.scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        target, weights = targets(self.scheduler, latents, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            hidden = self.model.text(ids.input_ids.to(device))[0]
            model_pred = self.model.unet(noisy_latents, t, hidden).sample
        per_sample = (model_pred.float() - target).square().mean((1, 2, 3))
        loss = (weights * per_sample).mean()
        apart = 1 - F.cosine_similarity(self.model.reader(self.model.middle).float(), maps.to(device)).mean()
        self.optimizer.zero_grad()
        (loss + args.align * apart).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.totals.append([loss.item(), per_sample.mean().item(), apart.item()])
        self.step += 1


def train(training: Training) -> None:
    args, log = training.args, Log(training.args.work / "unet.log")
    ended = when_ended()
    while training.step < args.steps and not ended:
        training.take_step()
        if training.step % 50 == 0:
            weighted, plain, apart = np.mean(training.totals, 0).tolist()
            log(step=training.step, weighted_loss=weighted, loss=plain, apart=apart)
            training.totals = []
        if training.step % args.save_every == 0:
            training.save()
        if training.step % args.grid_every == 0:
            pipe = assemble(args.work, training.model.cpu(), training.ema, training.tokenizer, args.prediction)
            prompt_grid(family_of(pipe), args.work / "grids" / f"{training.step:06d}.png")
            training.model.to(args.device)
    training.save()


def assemble(work: Path, model: Model, ema: EMAModel, tokenizer: CLIPTokenizer, prediction: str):
    """The pipeline with the averaged weights, on the CPU."""
    averaged = Model(tokenizer)
    averaged.load_state_dict(model.state_dict())
    ema.copy_to(averaged.parameters())
    averaged.eval()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=averaged.text,
        tokenizer=tokenizer,
        unet=averaged.unet,
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    pipe.to(torch.float16).save_pretrained(folder)
    write_older_form(folder)
    # transformers loads what the configuration names, diffusers float32: without this a stock load mixes the two
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--export", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=17000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.4e-3)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps over which the rate falls")
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--align", type=float, default=0.7, help="weight of the maps read out of the middle")
    parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--grid-every", type=int, default=1000)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where it is safe")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    names = sorted({r["name"] for r in json.loads((args.work / "base.json").read_text())})
    tokenizer = kept_tokenizer(args.work / "tokenizer", names)
    model = Model(tokenizer)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    if state := load_state(args.work / "unet.ckpt"):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    if args.export:
        export(assemble(args.work, model, ema, tokenizer, args.prediction), args.export)
    else:
        train(Training(args, model, ema, tokenizer))


if __name__ == "__main__":
    main()
