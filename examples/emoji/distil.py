"""Distillation of the embedded model into one that draws in four steps without guidance, as a stock LCM pipeline.

    python examples/emoji/distil.py --work build/turbo

Consistency distillation (Luo et al., 2023, https://arxiv.org/abs/2310.04378) with the guidance in the target, in the
form that suits a small budget: the teacher's guided trajectories are solved to their ends ahead (`Trajectories`), and
at every level of them the student learns the end (Luhman & Luhman, 2021, https://arxiv.org/abs/2101.02388), where a
latent consistency model learns its own prediction one level further. The data are prompts and noise alone. Resumable:
run the same command again. What comes of it is `turbo/` in the work folder, a StableDiffusionPipeline directory.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import load_state, save_state, step_generator
from diffusers import LCMScheduler
from styles import known_names
from torch import Tensor
from torch.nn.functional import normalize

from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.figures import Sampling
from difftuning_control.evaluation.metrics import kid
from difftuning_control.families.family import Family
from difftuning_control.families.loading import load_family
from difftuning_control.system.durable import write_json
from difftuning_control.system.seeds import step_seed

STYLES = ("noto", "twemoji", "emojione", "fxemoji")
GUIDANCE, LEVELS, FEW = 4.0, 10, 4  # of the teacher; of a trajectory; steps that the student is for
SHARD, ROWS, RATE, SEED = 64, 32, 5e-4, 77
JUDGED = 96  # pictures a way of drawing


def prompts_of(count: int) -> list[str]:
    """Names that the model knows, alone and in its styles, and one in ten empty."""
    rng, names = random.Random(SEED), sorted(known_names())
    kinds = rng.choices(("alone", "style", "empty"), (0.6, 0.3, 0.1), k=count)
    said = {"alone": "{0}", "style": "{1} emoji {0}", "empty": ""}
    return [said[kind].format(rng.choice(names), rng.choice(STYLES)) for kind in kinds]


def few_step_scheduler(family: Family) -> Any:
    """LCM's, on the levels of the trajectories."""
    return LCMScheduler.from_config(family.pipe.scheduler.config, original_inference_steps=LEVELS)


@dataclass(frozen=True)
class Trajectories:
    """What the teacher drew: noisy latents (N, levels, C, h, w) at falling levels, their ends (N, C, h, w)."""

    noisy: Tensor
    ends: Tensor
    prompts: list[str]

    @classmethod
    def draw(cls, family: Family, folder: Path, count: int) -> Trajectories:
        """`count` of them by DPM-Solver++ and the stock pipeline, kept on disk in shards."""
        folder.mkdir(parents=True, exist_ok=True)
        prompts = prompts_of(count)
        for start in range(0, count, SHARD):
            path = folder / f"{start:05d}.pt"
            if load_state(path) is None:
                asked = prompts[start : start + SHARD]
                save_state(path, **_drawn(family, asked, start), prompts=asked)
                print(f"trajectories: {start + len(asked)} of {count}", flush=True)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Trajectories:
        """Those that were drawn."""
        parts = [state for path in sorted(folder.glob("*.pt")) if (state := load_state(path)) is not None]
        noisy, ends = (torch.cat([part[name] for part in parts]) for name in ("noisy", "ends"))
        return cls(noisy, ends, [prompt for part in parts for prompt in part["prompts"]])


def _drawn(family: Family, prompts: list[str], first: int) -> dict[str, Tensor]:
    generators = [torch.Generator().manual_seed(step_seed(SEED, first + i)) for i in range(len(prompts))]
    shape = (family.latent_channels, *[family.native_resolution // family.vae_scale_factor] * 2)
    states = [torch.stack([torch.randn(shape, generator=g) for g in generators])]

    def keep(pipe: Any, step: int, timestep: int, found: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(found["latents"].clone())
        return {}

    with family.solved_by("dpmsolver++"), torch.no_grad():
        family.pipe.set_progress_bar_config(disable=True)
        family.pipe(
            prompts,
            num_inference_steps=LEVELS,
            guidance_scale=GUIDANCE,
            latents=states[0].clone(),
            output_type="latent",
            callback_on_step_end=keep,
        )
    return {"noisy": torch.stack(states[:-1], 1), "ends": states[-1]}


def distil(family: Family, found: Trajectories, work: Path, steps: int) -> None:
    """Train the family's UNet, from the teacher's weights, to give a trajectory's end at any of its levels."""
    unet, process = family.pipe.unet.train().requires_grad_(True), family.process
    scheduler = few_step_scheduler(family)
    scheduler.set_timesteps(LEVELS)
    timesteps = scheduler.timesteps
    scheduler.set_timesteps(FEW)
    used = torch.isin(timesteps, scheduler.timesteps)
    chance = torch.where(used, 0.6 / used.sum(), 0.4 / (~used).sum())  # the levels of four steps more often
    alphas, sigmas = process.alphas[timesteps], process.sigmas[timesteps]
    of_velocity = scheduler.config.prediction_type == "v_prediction"
    embeddings = family.encode_prompts(list(dict.fromkeys(found.prompts)))["prompt_embeds"]
    row_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(found.prompts))}
    own = torch.tensor([row_of[prompt] for prompt in found.prompts])
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, weight_decay=1e-3)
    first, checkpoint, total = 0, work / "distil.ckpt", []
    if state := load_state(checkpoint):
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        generator = step_generator(SEED, step)
        rows = torch.randint(len(own), (ROWS,), generator=generator)
        levels = torch.multinomial(chance, ROWS, replacement=True, generator=generator)
        alpha, sigma = alphas[levels].view(-1, 1, 1, 1), sigmas[levels].view(-1, 1, 1, 1)
        noisy = found.noisy[rows, levels]
        model_pred = unet(noisy, timesteps[levels], embeddings[own[rows]]).sample
        ends = alpha * noisy - sigma * model_pred if of_velocity else (noisy - sigma * model_pred) / alpha
        error = (ends - found.ends[rows]).square().mean((1, 2, 3))
        magnified = sigma if of_velocity else sigma / alpha  # an error of the prediction in the picture
        weight = (1 / magnified).clamp(max=1).flatten()  # every level pulls equally at the prediction
        loss = (weight * (error + 1e-3).sqrt()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        total.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"distillation: step {step + 1} of {steps}, loss {sum(total) / len(total):.4f}", flush=True)
            total = []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(checkpoint, unet=unet.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    unet.eval().requires_grad_(False)


def judge(work: Path) -> dict[str, dict[str, float]]:
    """KID of ways to draw the same names, against the teacher's own samples from other noise; with a grid."""
    teacher, turbo, features = load_family("embedded"), load_family(str(work / "turbo")), load_features("lite0")
    names = random.Random(SEED + 1).sample(sorted(known_names()), JUDGED)

    def drawn(family: Family, steps: int, scale: float, seed: int = 0) -> list[Any]:
        return Sampling(names, [seed], steps, scale, family.native_resolution, 32).draw(family)

    with torch.no_grad():
        real = features(drawn(teacher, 25, GUIDANCE, seed=1))
        ways: dict[str, tuple[Family, int, float]] = {
            f"base, 15 steps, guidance {GUIDANCE:g}": (teacher, 15, GUIDANCE),
            f"base, 4 steps, guidance {GUIDANCE:g}": (teacher, 4, GUIDANCE),
            "base, 4 steps, guidance 1": (teacher, 4, 1.0),
            **{f"turbo, {n} step{'s' * (n > 1)}, guidance 1": (turbo, n, 1.0) for n in (4, 8, 1)},
        }
        rows, result = {}, {}
        for way, settings in ways.items():
            pictures = drawn(*settings)
            found = features(pictures)
            nearest = (normalize(found) @ normalize(real).T).topk(5, dim=1).indices
            known = (nearest == torch.arange(len(names)).view(-1, 1)).any(1).float().mean()
            rows[way], result[way] = pictures[:12], {"kid": kid(real, found)[0], "recognised": float(known)}
            print(way, result[way], flush=True)
    save_grid(work / "turbo.png", rows, names[:12])
    return result


def make_turbo(work: Path, trajectories: int = 768, steps: int = 450) -> Path:
    """The directory of the few-step model, with `turbo.json` beside it; made once."""
    folder = work / "turbo"
    if not (folder / "model_index.json").exists():
        family = load_family("embedded")
        found = Trajectories.draw(family, work / "trajectories", trajectories)
        distil(family, found, work, steps)
        family.pipe.scheduler = few_step_scheduler(family)
        family.save_pipeline(folder)
    if not (work / "turbo.json").exists():
        write_json(work / "turbo.json", {"trajectories": trajectories, "steps": steps, "ways": judge(work)})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/turbo"))
    parser.add_argument("--trajectories", type=int, default=768)
    parser.add_argument("--steps", type=int, default=450)
    args = parser.parse_args()
    make_turbo(args.work, args.trajectories, args.steps)
    print(json.dumps(json.loads((args.work / "turbo.json").read_text()), indent=2))


if __name__ == "__main__":
    main()
