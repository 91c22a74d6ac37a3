"""Stable Diffusion 1.x and 2.x: ε- and v-prediction, one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from difftuning_control.fingerprint import digest_of, digest_of_module
from difftuning_control.noise import NoiseProcess


class StableDiffusion:
    """What training, bank and analysis need of a `StableDiffusionPipeline`.

    The pipeline's modules are used as they are: a denoiser that is tuned here is tuned in `pipe` too.
    """

    name = "sd"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any):
        self.pipe = pipe  # Any: diffusers' annotations leave out most of its modules' methods
        self.process = NoiseProcess.from_scheduler(pipe.scheduler)
        for module in (pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.vae.dtype

    def to(self, device: torch.device | str) -> StableDiffusion:
        self.pipe.to(device)
        return self

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @property
    def resolution_step(self) -> int:
        """Sides must be multiples of this many pixels."""
        levels = len(self.pipe.unet.config.block_out_channels) - 1
        return math.lcm(8, self.pipe.vae_scale_factor * 2**levels)  # the pipeline itself asks for multiples of 8

    # --- identity -------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each component's weights as loaded, taken on first use: read it before anything is tuned."""
        modules = {"denoiser": self.pipe.unet, "vae": self.pipe.vae, "text_encoder": self.pipe.text_encoder}
        found = {name: digest_of_module(module) for name, module in modules.items()}
        vocabulary = {"vocabulary": self.pipe.tokenizer.get_vocab(), "length": self.pipe.tokenizer.model_max_length}
        return found | {"tokenizer": digest_of(vocabulary)}

    @property
    def fingerprint(self) -> str:
        return digest_of(self.fingerprints)

    def sampler_settings(self) -> dict[str, Any]:
        """The scheduler that `sample` uses, by class and configuration."""
        config = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        return {"class": type(self.pipe.scheduler).__name__, **config}

    # --- pictures and latents -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, unscaled float32, (B, C, h, w).

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
        """
        posterior = self.pipe.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def scale_latents(self, latents: Tensor) -> Tensor:
        """VAE latents to the denoiser's scale."""
        return (latents - (self.pipe.vae.config.shift_factor or 0.0)) * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of the denoiser's latents."""
        latents = latents.to(self.device, self.dtype) / self.pipe.vae.config.scaling_factor
        return self.pipe.vae.decode(latents + (self.pipe.vae.config.shift_factor or 0.0)).sample.float().clamp(-1, 1)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has, and how many the text encoder takes; both count the two end marks."""
        ids = self.pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return len(ids), self.pipe.tokenizer.model_max_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D), as the stock pipeline makes them."""
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    # --- the model --------------------------------------------------------------------------------------------------

    def predict(
        self, denoiser: nn.Module, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w). `denoiser` may be a wrapped form of `self.denoiser`."""
        return denoiser(noisy_model_input, timesteps, conditioning["prompt_embeds"], return_dict=False)[0]

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
        resolution: int,
    ) -> Tensor:
        """Latents (B, C, h, w) in the denoiser's scale, drawn with the stock pipeline and its own scheduler.

        Row i depends on its prompt and generator alone.
        """
        training = self.pipe.unet.training
        self.pipe.unet.eval()
        self.pipe.set_progress_bar_config(disable=True)
        try:
            return self.pipe(
                prompts, height=resolution, width=resolution, num_inference_steps=steps, guidance_scale=guidance_scale,
                generator=generators, output_type="latent",
            ).images.float()  # fmt: skip
        finally:
            self.pipe.unet.train(training)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """`pytorch_lora_weights.safetensors`; its metadata keep the scale right for any alpha."""
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, safe_serialization=True
        )

    def save_pipeline(self, folder: Path) -> None:
        """A pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.pipe.save_pretrained(folder, safe_serialization=True)
