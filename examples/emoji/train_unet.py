"""Train the embedded model's denoiser and its small text model, jointly, on the autoencoder's latents.

    python examples/emoji/train_unet.py --work build/emoji --steps 10000
    python examples/emoji/train_unet.py --work build/emoji --export difftuning_control/assets/embedded

ε-prediction on Stable Diffusion's noise schedule with min-SNR weights (arXiv:2303.09556). Captions are
"<style> emoji <name>", one in five the name alone, one in ten empty. The learning rate is constant after a warm-up and
falls to nothing over the last fifth, so a run can be exported or lengthened at any point.
Resumable: run the same command again. `--export` writes the averaged weights as a StableDiffusionPipeline directory.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path

import torch
from common import Log, load_base, load_state, save_state, step_generator, to_unit
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from difftuning_control.families.older_form import write_older_form

TEXT_LENGTH = 32
UNET = {
    "sample_size": 8,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (80, 160),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": (5, 5),
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


def train_tokenizer(captions: list[str], vocabulary: int = 2048) -> CLIPTokenizer:
    """A CLIP tokenizer with a byte-level BPE vocabulary of its own."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 514, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([re.sub(r"\s+", " ", caption.lower()) for caption in captions], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def captions_of(records: list[dict], chance: torch.Tensor) -> list[str]:
    texts = []
    for record, p in zip(records, chance.tolist()):
        full = f"{record['style']} emoji {record['name']}"
        texts.append("" if p < 0.1 else record["name"] if p < 0.3 else full)
    return texts


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    posteriors = [vae.encode(to_unit(part)).latent_dist for part in images.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


class Model(torch.nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.unet = build_text_model(tokenizer), UNet2DConditionModel(**UNET)


def learning_rate(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 300, (steps - step) / (0.2 * steps))


def train(args: argparse.Namespace, model: Model, ema: EMAModel, tokenizer: CLIPTokenizer) -> None:
    log, checkpoint = Log(args.work / "unet.log"), args.work / "unet.ckpt"
    images, records = load_base(args.work)
    mean, std = latent_moments(AutoencoderKL.from_pretrained(args.work / "vae").eval(), images)
    scheduler = DDIMScheduler(**SCHEDULER)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=1e-3, fused=True)
    first = 0
    if state := load_state(checkpoint):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    total = []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        generator = step_generator(args.seed, step)
        rows = torch.randint(len(records), (args.batch_size,), generator=generator)
        texts = captions_of([records[i] for i in rows], torch.rand(args.batch_size, generator=generator))
        latents = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        strata = (torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=generator)) / args.batch_size
        timesteps = (strata * 1000).long().clamp(max=999)
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        hidden = model.text(ids.input_ids)[0]
        model_pred = model.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        per_sample = (model_pred - noise).square().mean((1, 2, 3))
        loss = (weights[timesteps] * per_sample).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        total.append(torch.stack([loss.detach(), per_sample.mean().detach()]))
        if (step + 1) % 50 == 0:
            weighted, plain = torch.stack(total).mean(0).tolist()
            log(step=step + 1, weighted_loss=weighted, loss=plain)
            total = []
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(
                checkpoint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                ema=ema.state_dict(),
                step=step + 1,
            )


def export(work: Path, model: Model, ema: EMAModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged.parameters())
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=averaged.text,
        tokenizer=tokenizer,
        unet=averaged.unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    write_older_form(folder)
    # transformers loads what the configuration names, diffusers float32: without this a stock load mixes the two
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--export", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    _, records = load_base(args.work)
    _, held_out = load_base(args.work, held_out=True)
    names = sorted({r["name"] for r in records + held_out})
    styles = ["noto emoji", "twemoji emoji", "emojione emoji", "fxemoji emoji"]
    tokenizer = train_tokenizer(names + styles * 20 + ["line icon", "flat icon", "black and white", "a photo of the"])
    model = Model(tokenizer)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    if state := load_state(args.work / "unet.ckpt"):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    if args.export:
        export(args.work, model, ema, tokenizer, args.export)
    else:
        train(args, model, ema, tokenizer)


if __name__ == "__main__":
    main()
