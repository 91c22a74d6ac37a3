"""Stable Diffusion 1.x and 2.x: ε- and v-prediction, one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from difftuning_control.control import to_tensor
from difftuning_control.errors import UserError
from difftuning_control.fingerprint import digest_of, digest_of_module
from difftuning_control.noise import NoiseProcess

EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the layers that bring a condition down to the latents' size


class ControlledUNet(nn.Module):
    """A UNet that adds a ControlNet's residuals to its own; without a condition it is the UNet alone.

    forward: noisy_model_input (B, C, h, w), timesteps (B,), prompt_embeds (B, L, D), control (B, 3, H, W) in [0, 1]
    or None; gives a tuple with the prediction, as the UNet does.
    """

    def __init__(self, unet: Any, controlnet: Any):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(
        self,
        noisy_model_input: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        control: Tensor | None = None,
        return_dict: Literal[False] = False,
    ) -> tuple[Tensor]:
        inputs = (noisy_model_input, timesteps, prompt_embeds)
        if control is None:
            return self.unet(*inputs, return_dict=False)
        down, mid = self.controlnet(*inputs, controlnet_cond=control, return_dict=False)
        return self.unet(
            *inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )  # fmt: skip


class EncodedUNet(nn.Module):
    """A UNet that is given tokens and encodes them in the same forward, so that the text encoder trains.

    forward: noisy_model_input (B, C, h, w), timesteps (B,), prompt_ids (B, L) long; gives a tuple with the prediction.
    """

    def __init__(self, unet: Any, text_encoder: Any):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy_model_input: Tensor, timesteps: Tensor, prompt_ids: Tensor, return_dict: Literal[False] = False
    ) -> tuple[Tensor]:
        prompt_embeds = self.text_encoder(prompt_ids)[0].to(noisy_model_input.dtype)
        return self.unet(noisy_model_input, timesteps, prompt_embeds, return_dict=False)


class StableDiffusion:
    """What training, bank and analysis need of a `StableDiffusionPipeline`.

    The pipeline's modules are used as they are: a denoiser that is tuned here is tuned in `pipe` too. `controlnet` is
    the one that `sample` and `model` use where a condition is given; None until somebody sets it. With
    `encodes_in_step` prompts are rows of tokens, and `model` encodes them: for a text encoder that trains or trained.
    """

    name = "sd"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    controlnet_class: Any = ControlNetModel
    condition_range = (0.0, 1.0)  # what the stock pipeline makes of a picture

    def __init__(self, pipe: Any):
        self.pipe = pipe  # Any: diffusers' annotations leave out most of its modules' methods
        self.process = NoiseProcess.from_scheduler(pipe.scheduler)
        self.controlnet: Any = None
        self.encodes_in_step = False
        for module in (pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet

    @property
    def model(self) -> Any:
        """What `predict` is given: the denoiser, with its ControlNet or its text encoder where they take part."""
        if self.encodes_in_step:
            return EncodedUNet(self.denoiser, self.pipe.text_encoder)
        return self.denoiser if self.controlnet is None else ControlledUNet(self.denoiser, self.controlnet)

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

    def tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_ids` (B, L), as the stock pipeline gives them to the text encoder."""
        tokenizer = self.pipe.tokenizer
        settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        return {"prompt_ids": tokenizer(prompts, return_tensors="pt", **settings).input_ids}

    # --- the model --------------------------------------------------------------------------------------------------

    def predict(
        self, denoiser: nn.Module, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w). `denoiser` may be a wrapped form of `self.model`.

        Where `conditioning` has a `control` (B, 3, H, W) uint8, the model must have a ControlNet; where it has
        `prompt_ids`, the model must encode them.
        """
        prompts = conditioning["prompt_ids" if "prompt_ids" in conditioning else "prompt_embeds"]
        inputs = [noisy_model_input, timesteps, prompts]
        if "control" in conditioning:
            inputs.append(to_tensor(conditioning["control"], self.condition_range).to(noisy_model_input.dtype))
        return denoiser(*inputs, return_dict=False)[0]

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
        resolution: int,
        control: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) in the denoiser's scale, drawn with the stock pipeline and its own scheduler.

        Row i depends on its prompt, generator and condition alone.

        Args:
            control: conditions (B, 3, H, W) uint8 for the ControlNet; without it the model alone draws.
        """
        pipe, options = self.pipe, {}
        if control is not None:
            pipe = self.control_pipeline()
            dtype = self.controlnet.dtype
            options = {"image": to_tensor(control, self.condition_range).to(self.device, dtype)}
        modules = [m for m in (self.pipe.unet, self.controlnet, self.pipe.text_encoder) if m is not None]
        training = [module.training for module in modules]
        for module in modules:
            module.eval()
        pipe.set_progress_bar_config(disable=True)
        try:
            return pipe(
                prompts, height=resolution, width=resolution, num_inference_steps=steps, guidance_scale=guidance_scale,
                generator=generators, output_type="latent", **options,
            ).images.float()  # fmt: skip
        finally:
            for module, before in zip(modules, training):
                module.train(before)

    # --- control ----------------------------------------------------------------------------------------------------

    def control_pipeline(self) -> Any:
        """The stock ControlNet pipeline around the same modules."""
        return StableDiffusionControlNetPipeline(
            **self.pipe.components, controlnet=self.controlnet, requires_safety_checker=False
        )  # fmt: skip

    def new_controlnet(self, seed: int) -> Any:
        """A ControlNet that starts as a copy of the UNet's encoder and adds nothing yet, float32.

        Its condition embedding brings pictures down by the autoencoder's factor; `seed` draws that embedding's weights.
        """
        halvings = int(math.log2(self.pipe.vae_scale_factor))
        channels = [EMBEDDING_CHANNELS[min(i, 3)] for i in range(halvings)] + [EMBEDDING_CHANNELS[-1]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self.controlnet_class.from_unet(self.pipe.unet, conditioning_embedding_out_channels=tuple(channels))
        return found.float().to(self.device)

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        """Refuse a ControlNet that was made for another model.

        Raises:
            UserError: with the two numbers that differ.
        """
        check_controlnet(self.pipe.unet, self.pipe.vae_scale_factor, controlnet, name)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_lora(
        self,
        folder: Path,
        layers: dict[str, Tensor],
        metadata: dict[str, Any],
        text_encoder_layers: dict[str, Tensor] | None = None,
        text_encoder_metadata: dict[str, Any] | None = None,
    ) -> None:
        """`pytorch_lora_weights.safetensors`; its metadata keep the scale right for any alpha."""
        text: dict[str, Any] = {"text_encoder_lora_layers": text_encoder_layers}
        text["text_encoder_lora_adapter_metadata"] = text_encoder_metadata
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, safe_serialization=True, **text
        )

    def save_controlnet(self, folder: Path, controlnet: Any) -> None:
        """A directory for `ControlNetModel.from_pretrained`."""
        controlnet.save_pretrained(folder, safe_serialization=True)

    def save_pipeline(self, folder: Path) -> None:
        """A pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.pipe.save_pretrained(folder, safe_serialization=True)


def check_controlnet(unet: Any, vae_scale_factor: int, controlnet: Any, name: str) -> None:
    """Refuse a ControlNet that was made for another UNet or autoencoder.

    Raises:
        UserError: with the two numbers that differ.
    """
    ours, its = unet.config, controlnet.config
    for key in ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type",
                "projection_class_embeddings_input_dim"):  # fmt: skip
        mine, theirs = (list(v) if isinstance(v, (list, tuple)) else v for v in (ours[key], its[key]))
        if mine != theirs:
            raise UserError(
                f"the ControlNet {name} does not fit this model: its {key} is {theirs}, the model's {mine}; give "
                "one that was made for this model, or start from the denoiser."
            )
    if its.conditioning_channels != 3:
        raise UserError(
            f"the ControlNet {name} takes conditions of {its.conditioning_channels} channels, and pictures have 3; "
            "give one that takes pictures."
        )
    factor = 2 ** (len(its.conditioning_embedding_out_channels) - 1)
    if factor != vae_scale_factor:
        raise UserError(
            f"the ControlNet {name} does not fit this model: it brings conditions down by {factor}, the "
            f"autoencoder pictures by {vae_scale_factor}; give one whose "
            "conditioning_embedding_out_channels match."
        )
