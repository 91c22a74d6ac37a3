"""Diff-Tuning inside a training loop of your own: the lines marked `# +` are all that is added.

The loop is written the way diffusers' `train_text_to_image.py` is. What the lines mean, and how they fit other models:
docs/hook.md; lines for diffusers' own scripts: examples/hooks. It runs on the embedded model:

    python examples/hook_into_your_loop.py --steps 50
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline

from difftuning_control import BankRequest, DiffTuningObjective, KnowledgeBank, embedded_model, family_of  # +
from difftuning_control.data.images import fit_square
from difftuning_control.data.sources import load_images

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--bank", default="runs/hook-bank")
args = parser.parse_args()

torch.manual_seed(0)
pipe = StableDiffusionPipeline.from_pretrained(embedded_model())
noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
vae, unet, tokenizer, text_encoder = pipe.vae, pipe.unet, pipe.tokenizer, pipe.text_encoder
vae.requires_grad_(False)
text_encoder.requires_grad_(False)

examples = load_images("embedded/icons").examples
pixel_values = torch.stack([torch.from_numpy(fit_square(e.load(), 64)) for e in examples])
captions = [e.caption for e in examples]
input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

request = BankRequest(captions, size=64, steps=10, resolution=64)  # +
bank = KnowledgeBank.build(family_of(pipe), args.bank, request)  # +
objective = DiffTuningObjective.from_scheduler(noise_scheduler, preset="paper")  # +
empty = text_encoder(tokenizer([""], padding="max_length", return_tensors="pt").input_ids)[0]  # +

optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
for step in range(args.steps):
    rows = torch.randint(len(pixel_values), (12,))
    with torch.no_grad():
        latents = vae.encode(pixel_values[rows]).latent_dist.sample() * vae.config.scaling_factor
        encoder_hidden_states = text_encoder(input_ids[rows])[0]
    latents, encoder_hidden_states, is_retention = objective.mix(latents, encoder_hidden_states, bank, empty)  # +
    noise = torch.randn_like(latents)
    timesteps = objective.sample_timesteps(is_retention)  # + instead of torch.randint(0, 1000, (batch_size,))
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    is_epsilon = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else noise_scheduler.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    loss = objective.reduce(loss, timesteps, is_retention)  # + instead of loss.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 10 == 0:
        print(f"step {step + 1}: loss {loss.item():.4f}")
