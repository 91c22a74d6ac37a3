"""Train the embedded model's autoencoder: 64×64 pictures to 8×8 latents and back.

    python examples/emoji/train_vae.py --work build/emoji

L = |x − x̂| + ½ |∇x − ∇x̂| + ½ · perceptual + 1e-3 · KL. The perceptual term compares shallow feature maps of an
ImageNet network (in the manner of LPIPS, arXiv:1801.03924); without it, 64×64 pictures come out soft. At the end the
latents are normalised per channel inside the 1×1 `quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1.
Resumable: run the same command again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import Lite0, Log, load_base, load_state, save_state, step_generator, to_unit
from diffusers import AutoencoderKL

CONFIG = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 12,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}


def pictures(work: Path) -> torch.Tensor:
    """Base pictures (held-out names left out) and the ones that only the autoencoder sees, uint8 (N, 3, 64, 64)."""
    others = torch.from_numpy(np.load(work / "vae.npz")["images"]).permute(0, 3, 1, 2)
    base, _ = load_base(work)
    return torch.cat([base, base, others])  # the base counts twice: it is what the model will draw


def draw(images: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """A batch with flips, shifts on the white ground, exchanged colour channels and some grey."""
    x = images[torch.randint(len(images), (batch_size,), generator=generator)]
    chance = torch.rand(3, batch_size, generator=generator)
    x = torch.where(chance[0].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    colours = torch.randperm(3, generator=generator)
    x = torch.where(chance[1].view(-1, 1, 1, 1) < 0.3, x[:, colours], x)
    grey = x.float().mean(1, keepdim=True).round().to(x.dtype).expand_as(x)
    x = torch.where(chance[2].view(-1, 1, 1, 1) < 0.1, grey, x)
    shift = torch.randint(-4, 5, (2,), generator=generator)
    x = torch.roll(x, (int(shift[0]), int(shift[1])), (2, 3))
    return to_unit(x).contiguous(memory_format=torch.channels_last)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae: AutoencoderKL, lite0: Lite0, x: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(latents).sample.float()
        with torch.no_grad():
            real = lite0.shallow(x)
        perceptual = sum((a.float() - b.float()).abs().mean() for a, b in zip(lite0.shallow(decoded), real))
    l1 = (decoded - x).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(x)))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"loss": l1 + 0.5 * edges + 0.5 * perceptual + 1e-3 * kl, "l1": l1, "perceptual": perceptual, "kl": kl}


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the per-channel mean μ and deviation σ of the latents into the 1×1 convolutions on both sides."""
    means = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in images.split(64)])
    mu, sigma = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mu)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= sigma.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mu) / sigma
    quant.bias[channels:] -= 2 * sigma.log()
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(1)
    post.weight *= sigma.view(1, -1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    log, checkpoint = Log(args.work / "vae.log"), args.work / "vae.ckpt"
    images, lite0 = pictures(args.work), Lite0()
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, weight_decay=1e-4, fused=True)
    first = 0
    if state := load_state(checkpoint):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, args.steps):
        rate = min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        generator = step_generator(args.seed, step)
        parts = loss_of(vae, lite0, draw(images, args.batch_size, generator), generator)
        optimizer.zero_grad()
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            log(step=step + 1, **{k: v.item() for k, v in parts.items()})
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(checkpoint, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    normalise_latents(vae.eval(), load_base(args.work)[0])
    vae.save_pretrained(args.work / "vae")


if __name__ == "__main__":
    main()
