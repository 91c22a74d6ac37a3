"""A few steps of training by hand, and the weights and pictures of a pipeline."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from difftuning_control.adapters.tuning import AdapterTuning, FullTuning
from difftuning_control.families.loss import compute_loss
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective


def tune(family: StableDiffusion, tuning: AdapterTuning | FullTuning, steps: int = 3, rate: float = 0.03) -> None:
    generator = torch.Generator().manual_seed(0)
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "plain")
    optimizer = torch.optim.Adam(tuning.parameters().values(), rate)  # without decay, which moves all
    conditioning = {k: v.float() for k, v in family.encode_prompts(["red 1", "blue", "", "six"]).items()}
    family.denoiser.train()
    for _ in range(steps):
        latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
        batch = LatentBatch(latents, conditioning, torch.zeros(4, dtype=torch.bool))
        levels = objective.sample_levels(batch.is_retention, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=family.dtype == torch.bfloat16):
            losses = compute_loss(family, family.denoiser, objective, batch, noise, levels)
        objective.combine(losses, levels, batch.is_retention).backward()
        optimizer.step()
        optimizer.zero_grad()
    family.denoiser.eval()


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of the pipeline, under the names they have without an adapter."""
    found = {}
    for component in ("unet", "vae", "text_encoder"):
        for name, value in getattr(pipe, component).state_dict().items():
            if ".lora_" not in name:
                found[f"{component}.{name.replace('.base_layer.', '.')}"] = value.clone()
    return found


def picture(pipe: StableDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
    return pipe("red 1", height=16, width=16, **settings).images
