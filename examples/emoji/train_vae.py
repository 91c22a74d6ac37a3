"""Train the embedded model's autoencoder: 64×64 pictures to 8×8×16 latents and back.

    python examples/emoji/train_vae.py --work build/emoji
    python examples/emoji/train_vae.py --work build/emoji --initial DIR     # from another autoencoder's weights

L = |x − x̂| + |c − ĉ| + ½ |∇x − ∇x̂| + w · perceptual + 1e-5 · KL, where c is a pixel less the mean of its channels: hue
is what a small autoencoder loses first, and the other terms hardly see it. The perceptual term compares maps of an
ImageNet network at strides 2 to 16 (in the manner of LPIPS, arXiv:1801.03924), seen at 96 pixels; without it, 64×64
pictures come out soft. A hundred times the KL left four of sixteen channels empty.
Half of a batch are variants of base pictures, half the pictures that only the autoencoder sees. At the end the latents
are normalised per channel inside the 1×1 `quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1.
Resumable: run the same command again. A signal to end (TERM) saves first.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import Lite0, Log, load_base, load_state, pass_through, save_state, step_generator, to_unit, when_ended
from diffusers import AutoencoderKL
from PIL import Image

CONFIG = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}
MAPS = (0, 2, 4, 7, 10)  # blocks of lite0


class Pictures:
    """The variants of the base pictures, and the ones that only the autoencoder sees, uint8."""

    def __init__(self, work: Path):
        self.bank = np.load(work / "bank.npy", mmap_mode="r")
        self.others = np.load(work / "vae.npz")["images"]

    def draw(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """A batch with flips, shifts on the white ground, exchanged colour channels and some grey."""
        records, count = self.bank.shape[:2]
        rows = torch.randint(records, (size // 2,), generator=generator).numpy()
        columns = torch.randint(count, (size // 2,), generator=generator).numpy()
        others = torch.randint(len(self.others), (size - size // 2,), generator=generator).numpy()
        both = np.concatenate([self.bank[rows, columns], self.others[others]])
        x = torch.from_numpy(both).permute(0, 3, 1, 2)
        chance = torch.rand(3, size, 1, 1, 1, generator=generator)
        x = torch.where(chance[0] < 0.5, x.flip(3), x)
        x = torch.where(chance[1] < 0.2, x[:, torch.randperm(3, generator=generator)], x)
        grey = x.float().mean(1, keepdim=True).round().to(x.dtype).expand_as(x)
        x = torch.where(chance[2] < 0.05, grey, x)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        return to_unit(torch.roll(x, shift, (2, 3))).contiguous(memory_format=torch.channels_last)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def perceptual_distance(lite0: Lite0, decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ over the maps of the mean squared distance of unit vectors, 2 − 2 cos."""
    with torch.no_grad():
        real = lite0.maps(x, MAPS, side=96)
    return sum((a - b).square().sum(1).mean() for a, b in zip(lite0.maps(decoded, MAPS, side=96), real))


def loss_of(
    vae: AutoencoderKL, lite0: Lite0, x: torch.Tensor, generator: torch.Generator, weight: float
) -> dict[str, torch.Tensor]:
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean)
    decoded = vae.decode(latents).sample
    perceptual = perceptual_distance(lite0, decoded, x)
    l1 = (decoded - x).abs().mean()
    chroma = (decoded - decoded.mean(1, keepdim=True) - x + x.mean(1, keepdim=True)).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(x)))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + chroma + 0.5 * edges + weight * perceptual + 1e-5 * kl
    return {"loss": loss, "l1": l1, "chroma": chroma, "edges": edges, "perceptual": perceptual, "kl": kl}


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the per-channel mean μ and deviation σ of the latents into the 1×1 convolutions on both sides."""
    means = torch.cat([vae.encode(to_unit(part).to(vae.device)).latent_dist.mean for part in images.split(64)])
    mu, sigma = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mu)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= sigma.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mu) / sigma
    quant.bias[channels:] -= 2 * sigma.log()
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(1)
    post.weight *= sigma.view(1, -1, 1, 1)


@torch.no_grad()
def start_from(vae: AutoencoderKL, folder: Path) -> None:
    """Another autoencoder's weights, whose latents may have fewer channels; the decoder hardly sees the others yet."""
    other = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    old, new = other.config.latent_channels, vae.config.latent_channels
    pairs = {"encoder.conv_out": (True, False), "quant_conv": (True, True)}  # of mean and log variance: out, in
    source, state = other.state_dict(), vae.state_dict()
    for name, value in state.items():
        given, module = source[name], name.rsplit(".", 1)[0]
        if given.shape == value.shape:
            value.copy_(given)
            continue
        index = [torch.arange(n) for n in given.shape]
        for dim, doubled in enumerate(pairs.get(module, (False, False))[: value.ndim]):
            if doubled:
                index[dim] = torch.cat([torch.arange(old), new + torch.arange(old)])
        if module in ("post_quant_conv", "decoder.conv_in"):
            value.mul_(0.1)
        value[torch.meshgrid(*index, indexing="ij")] = given


@torch.no_grad()
def save_passed(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> None:
    """Pictures over what the autoencoder makes of them."""
    x = to_unit(images).to(vae.device)
    both = torch.cat([x, pass_through(vae, x)], 2)
    pixels = ((torch.cat(list(both), 2) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), Image.Resampling.NEAREST).save(path)


def train(args: argparse.Namespace, vae: AutoencoderKL) -> bool:
    """Whether the steps are done; False where a signal ended the run before."""
    log, checkpoint = Log(args.work / "vae.log"), args.work / "vae.ckpt"
    pictures, lite0 = Pictures(args.work), Lite0().to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, weight_decay=1e-4, fused=True)
    step, ended = 0, when_ended()
    if state := load_state(checkpoint):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    shown = load_base(args.work)[0][::131][:16]
    while step < args.steps and not ended:
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        generator = step_generator(args.seed, step)
        x = pictures.draw(args.batch_size, generator).to(args.device)
        parts = loss_of(vae, lite0, x, generator, args.perceptual)
        optimizer.zero_grad()
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log(step=step, **{k: v.item() for k, v in parts.items()})
        if step % args.save_every == 0 or step == args.steps or ended:
            save_state(checkpoint, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step)
        if step % args.show_every == 0 or step == args.steps:
            save_passed(vae, shown, args.work / "grids" / f"vae-{step:06d}.png")
    return not ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--initial", type=Path, default=None, help="directory of an autoencoder to start from")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--perceptual", type=float, default=0.1, help="weight of the perceptual term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--show-every", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if (args.work / "vae" / "config.json").exists():
        print(f"{args.work / 'vae'} is there; remove it to train again")
        return
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG)
    if args.initial is not None and not (args.work / "vae.ckpt").exists():
        start_from(vae, args.initial)
    vae.to(args.device, memory_format=torch.channels_last)
    if train(args, vae):
        normalise_latents(vae.eval(), load_base(args.work)[0])
        vae.cpu().save_pretrained(args.work / "vae")
    else:
        raise SystemExit("ended by a signal; the same command goes on")


if __name__ == "__main__":
    main()
