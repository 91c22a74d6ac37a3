"""A loop with the names of diffusers' DreamBooth scripts for SD3 and FLUX, for their hooks.

One prompt for all pictures, embedded before the loop (SD3) or at every step (FLUX).
"""

import diffusers
import torch
from diffusers import FluxPipeline
from tqdm import tqdm


def train(pipe, accelerator, args):
    transformer, vae = pipe.transformer, pipe.vae
    train_dataset = args.dataset
    noise_scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    is_flux = isinstance(pipe, FluxPipeline)
    text_encoders, tokenizers = [pipe.text_encoder], [pipe.tokenizer]

    def compute_text_embeddings(prompt, text_encoders, tokenizers):
        assert text_encoders
        assert tokenizers
        with torch.no_grad():
            if is_flux:
                return pipe.encode_prompt(prompt, prompt, max_sequence_length=16)
            found = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
            return found[0], found[2]

    if not is_flux:
        prompt_embeds, pooled_prompt_embeds = compute_text_embeddings(args.instance_prompt, text_encoders, tokenizers)
    # Clear the memory here
    if not is_flux:
        del text_encoders, tokenizers
    global_step = 0
    initial_global_step = args.begun_at
    progress_bar = tqdm(args.batches, initial=initial_global_step, disable=True)
    for batch in progress_bar:
        prompts = batch["prompts"]
        if is_flux:
            prompt_embeds, pooled_prompt_embeds, text_ids = compute_text_embeddings(prompts, text_encoders, tokenizers)
        # Convert images to latent space
        model_input = vae.encode(batch["pixel_values"]).latent_dist.sample()
        model_input = (model_input - vae.config.shift_factor) * vae.config.scaling_factor
        # Sample noise that we'll add to the latents
        noise = torch.randn_like(model_input)
        timesteps = noise_scheduler.timesteps[torch.randint(0, 1000, (len(model_input),))]
        # Add noise according to flow matching.
        places = [int((noise_scheduler.timesteps == t).nonzero()) for t in timesteps]
        sigmas = noise_scheduler.sigmas[places].view(-1, 1, 1, 1)
        noisy_model_input = (1 - sigmas) * model_input + sigmas * noise
        if is_flux:
            height, width = model_input.shape[2:]
            packed = FluxPipeline._pack_latents(noisy_model_input, len(model_input), 4, height, width)
            guidance = torch.tensor([3.5]).expand(len(model_input))
            ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
            told = {"guidance": guidance, "txt_ids": text_ids, "img_ids": ids}
            shown, at = packed, timesteps / 1000
        else:
            told, shown, at = {}, noisy_model_input, timesteps
        model_pred = transformer(
            hidden_states=shown,
            timestep=at,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
            **told,
        )[0]
        if is_flux:
            model_pred = FluxPipeline._unpack_latents(model_pred, 2 * height, 2 * width, 2)
        weighting = torch.ones_like(sigmas)
        target = noise - model_input
        loss = (model_pred - target).square().mean()
        accelerator.backward(loss)
        global_step += 1  # noqa: SIM113, as the scripts count
    return locals()
