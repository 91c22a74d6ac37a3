"""Qwen-Image: flow matching, Qwen2.5-VL as text encoder, latents packed 2×2 of an autoencoder that is made for video.

Of the pipeline's template the text encoder reads all, and the transformer what comes after its first 34 tokens.

References:
    Qwen-Image Technical Report (Wu et al., 2025), https://arxiv.org/abs/2508.02324
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs, filled_controlnet
from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer, padded, ragged
from difftuning_control.families.packed import PackedTransformer, pack
from difftuning_control.families.transformer import FlowTransformer
from difftuning_control.system.tensors import whole_tensors

COPIED_BLOCKS = 5  # that a new ControlNet copies, as many as the class has by default


class QwenImage(PackedTransformer, MaskedTransformer):
    """A `QwenImagePipeline`. Conditioning: `prompt_embeds` and `prompt_attention_mask`.

    Where there is guidance, the stock pipeline gives each token of the guided prediction the norm of the conditional
    one, and a ControlNet reads the prompt alone, never the empty one.
    """

    name = "qwen_image"
    fit = Fit(batch_size=2)
    prompts_at_once = 4
    base_density = "logit_normal"
    text_length = 512
    is_video = True
    lora_targets: tuple[str, ...] = FlowTransformer.lora_targets
    controlnet_class = getattr(diffusers, "QwenImageControlNetModel", None)  # which diffusers has since 0.36
    control_pipeline_class = getattr(diffusers, "QwenImageControlNetPipeline", None)
    controlnet_whole = ("controlnet_x_embedder", "controlnet_blocks")

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer")
        config = self.pipe.transformer.config
        self.check_channels(config.in_channels // 4)
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise UserError(
                    f"the model's {key} is true, as of a Qwen-Image that edits pictures or paints layers; give a plain "
                    "text-to-image model."
                )

    # --- latents ----------------------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.z_dim

    @property
    def latent_shift(self) -> Tensor:
        return torch.tensor(self.pipe.vae.config.latents_mean).view(-1, 1, 1)

    @property
    def latent_factor(self) -> Tensor:
        return 1 / torch.tensor(self.pipe.vae.config.latents_std).view(-1, 1, 1)

    # --- prompts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipe.encode_prompt(list(prompts), self.device, max_sequence_length=self.text_length)
        return padded(list(embeds) if mask is None else ragged(embeds, mask), self.text_length)

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the template after its beginning too."""
        tokens, most = super().prompt_tokens(self.pipe.prompt_template_encode.format(prompt))
        return tokens - self.pipe.prompt_template_encode_start_idx, most

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        told = self._embedded(prompts, "") if self.offload else {"prompt": list(prompts)}
        return told | {"max_sequence_length": self.text_length}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """Away from the empty prompt, which the pipeline does not do by itself."""
        told: dict[str, Any] = {"true_cfg_scale": scale}
        if scale > 1:
            told |= self._embedded([""] * rows, "negative_") if self.offload else {"negative_prompt": [""] * rows}
        return told

    def _embedded(self, prompts: list[str], role: str) -> dict[str, Tensor]:
        rows = self.embedding_arguments(prompts)
        embeds, mask = told_of(rows["prompt_embeds"], rows["prompt_attention_mask"])
        return {f"{role}prompt_embeds": embeds} | ({} if mask is None else {f"{role}prompt_embeds_mask": mask})

    # --- the model --------------------------------------------------------------------------------------------------

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        rows, _, height, width = noisy_model_input.shape
        embeds, mask = told_of(conditioning["prompt_embeds"], conditioning["prompt_attention_mask"])
        return {
            "hidden_states": pack(noisy_model_input),
            "timestep": timesteps,
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, height // 2, width // 2)]] * rows,
        }

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        """What leads to the prompt's stream after the last block, and a ControlNet's blocks that nobody reads."""
        its = module.config.num_layers
        read = its if module is self.denoiser else min(its, self._blocks_read(its))
        rest = [f"{part}.{i}." for i in range(read, its) for part in ("transformer_blocks", "controlnet_blocks")]
        ends = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
        return (*rest, *(f"transformer_blocks.{read - 1}.{end}" for end in ends))

    def _blocks_read(self, blocks: int) -> int:
        """How many of a ControlNet's blocks the transformer reads: it gives each to as many of its own, rounded up."""
        layers = self.denoiser.config.num_layers
        return -(-layers // -(-layers // blocks))

    # --- control ----------------------------------------------------------------------------------------------------

    def encode_control(self, control: Tensor) -> Tensor:
        return pack(super().encode_control(control))

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"controlnet_block_samples": controlnet(**inputs, controlnet_cond=control)}

    def _new_controlnet(self) -> Any:
        """The first blocks of the transformer, as many of `COPIED_BLOCKS` as it reads."""
        blocks = self._blocks_read(min(COPIED_BLOCKS, self.denoiser.config.num_layers))
        own = {"num_layers": blocks, "extra_condition_channels": 0}
        return self.copied_controlnet(own, ("time_text_embed", "txt_norm", "img_in", "txt_in", "transformer_blocks"))

    def controlnet_of_file(self, path: Path) -> Any:
        """One of InstantX's, as for ComfyUI: its names are diffusers' own. A Union one has no modes, it is told the
        picture alone."""
        state = whole_tensors(path, "the ControlNet ")
        embedder = state.get("controlnet_x_embedder.weight")
        count = len({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")})
        if embedder is None or not count:
            raise UserError(
                f"the file {path} holds no ControlNet of Qwen-Image that diffusers has a class for (no "
                "controlnet_x_embedder or no transformer_blocks are in it; Fun and blockwise ones are other "
                "architectures); give one by InstantX, as a file or a directory."
            )
        more = embedder.shape[1] - self.denoiser.config.in_channels
        own = {"num_layers": count, "extra_condition_channels": max(more, 0)}
        return filled_controlnet(self.controlnet_of_this_size(own), state, path)

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        widths = ("num_attention_heads", "attention_head_dim", "joint_attention_dim")
        compare_configs(self.denoiser, controlnet, name, ("in_channels", *widths))
        if more := controlnet.config.extra_condition_channels:
            raise UserError(
                f"the ControlNet {name} takes {more} channels beside the condition's (a mask); give one that takes "
                "pictures."
            )


def told_of(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings and their mask up to the longest prompt's end; no mask where it masks nothing. Padding is at prompts'
    ends, so that one read of the device tells both."""
    lengths = mask.sum(1).tolist()
    longest = max(lengths)
    return embeds[:, :longest], None if min(lengths) == longest else mask[:, :longest]
