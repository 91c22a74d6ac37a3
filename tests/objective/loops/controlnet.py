"""A loop with the names of diffusers' ControlNet script, for its hook."""

import diffusers
import torch
from tqdm import tqdm


def train(pipe, accelerator, args):
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    controlnet = args.controlnet
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    global_step = 0
    initial_global_step = args.begun_at
    progress_bar = tqdm(args.batches, initial=initial_global_step, disable=True)
    for batch in progress_bar:
        latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
        # Sample noise that we'll add to the latents
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        # Add noise to the latents by the timesteps
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        input_ids = tokenizer(batch["prompts"], padding="max_length", return_tensors="pt").input_ids
        encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
        controlnet_image = batch["conditioning_pixel_values"]
        down_block_res_samples, mid_block_res_sample = controlnet(
            noisy_latents, timesteps, encoder_hidden_states, controlnet_image, return_dict=False
        )
        model_pred = unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states,
            down_block_additional_residuals=down_block_res_samples,
            mid_block_additional_residual=mid_block_res_sample,
        ).sample
        target = noise
        loss = (model_pred - target).square().mean()
        accelerator.backward(loss)
        global_step += 1  # noqa: SIM113, as the scripts count
    return locals()
