"""A loop with the names of diffusers' SDXL script, for its hook."""

import diffusers
import torch
from tqdm import tqdm


def train(pipe, accelerator, args):
    unet, vae = pipe.unet, pipe.vae
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    global_step = 0
    initial_global_step = args.begun_at
    progress_bar = tqdm(args.batches, initial=initial_global_step, disable=True)
    for batch in progress_bar:
        model_input = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
        # Sample noise that we'll add to the latents
        noise = torch.randn_like(model_input)
        timesteps = torch.randint(0, 1000, (len(model_input),))
        # Add noise to the model input by the timesteps
        noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)

        def compute_time_ids(original_size, crops_coords_top_left):
            return torch.tensor([[*original_size, *crops_coords_top_left, args.resolution, args.resolution]]).float()

        add_time_ids = torch.cat([compute_time_ids((40, 30), (4, 2)) for _ in batch["prompts"]])
        # Predict the noise residual
        unet_added_conditions = {"time_ids": add_time_ids}
        prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
            batch["prompts"], do_classifier_free_guidance=False
        )
        unet_added_conditions.update({"text_embeds": pooled_prompt_embeds})
        model_pred = unet(noisy_model_input, timesteps, prompt_embeds, added_cond_kwargs=unet_added_conditions).sample
        target = noise
        loss = (model_pred - target).square().mean()
        if args.debug_loss and batch:
            pass
        accelerator.backward(loss)
        global_step += 1  # noqa: SIM113, as the scripts count
    return locals()
