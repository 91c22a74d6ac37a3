"""Z-Image, base and Turbo: flow matching with time reversed, Qwen3 as text encoder, rows as lists.

It is told 1 − σ, 0 for noise and 1 for a picture, and predicts latents − noise. Turbo is the same class, distilled to
few steps without guidance.

References:
    Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer (Z-Image Team,
    2025), https://arxiv.org/abs/2511.22699
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs, filled_controlnet
from difftuning_control.families.few_steps import Configs, FewSteps
from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer, padded, ragged
from difftuning_control.families.quantised import plain_state
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.system.tensors import whole_tensors

TURBO_SHIFT = 3.0  # of the scheduler; the base's is 6
SIDE = 1024  # that the pipeline draws at unless told otherwise
CONTROL_EVERY = 5  # of the transformer's layers one that a new ControlNet copies, as in the first published one
LENT = (
    *("t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner"),
    *("x_pad_token", "cap_pad_token", "t_scale"),
)
SHARED = (
    "all_patch_size",
    "all_f_patch_size",
    "dim",
    "n_refiner_layers",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "qk_norm",
)

ControlNet: Any = getattr(diffusers, "ZImageControlNetModel", None)  # which diffusers has since 0.37
if ControlNet is not None and not hasattr(ControlNet, "gradient_checkpointing"):
    ControlNet.gradient_checkpointing = False  # its forward asks for it, and nothing there sets it


class ZImage(MaskedTransformer):
    """A `ZImagePipeline`. Conditioning: `prompt_embeds` and `prompt_attention_mask`, which become lists of rows.

    Its ControlNet has control layers only: what comes before them is the transformer's own, and lent to it.
    """

    name = "z_image"
    fit = Fit(batch_size=3)
    prompts_at_once = 4
    distilled_steps = 8
    base_density = "logit_normal"
    text_length = 512
    call_settings: ClassVar[dict[str, Any]] = {}
    controlnet_class = ControlNet
    control_pipeline_class = getattr(diffusers, "ZImageControlNetPipeline", None)
    controlnet_whole = ("control_all_x_embedder", "before_proj", "after_proj")

    def _check_variant(self) -> None:
        super()._check_variant()
        if self.pipe.transformer.config.get("siglip_feat_dim") is not None:
            raise UserError("the model is a Z-Image that edits pictures (Omni); give a plain text-to-image model.")

    @property
    def native_resolution(self) -> int:
        return SIDE

    @property
    def resolution_step(self) -> int:
        return self.vae_scale_factor * self.pipe.transformer.config.all_patch_size[0]

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=1 - process.sigmas)

    @classmethod
    def few_steps_by(cls, configs: Configs) -> FewSteps | None:
        if configs.scheduler.get("shift") == TURBO_SHIFT:
            return FewSteps(cls.distilled_steps, 1.0, f"its scheduler, whose shift is {TURBO_SHIFT:g}")
        return super().few_steps_by(configs)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        rows, _ = self.pipe.encode_prompt(list(prompts), self.device, False, max_sequence_length=self.text_length)
        return padded(rows, self.text_length)

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the chat around it too."""
        message = [{"role": "user", "content": prompt}]
        chat = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return super().prompt_tokens(self.pipe.tokenizer.apply_chat_template(message, **chat))

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        told: dict[str, Any] = {"prompt": list(prompts)}  # a copy, since the pipeline writes into it
        if self.offload:
            rows = self.embedding_arguments(prompts)
            told = {
                f"{role}prompt_embeds": ragged(rows[f"{role}prompt_embeds"], rows[f"{role}prompt_attention_mask"])
                for role in ("", "negative_")
            }
        return told | {"max_sequence_length": self.text_length}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """The pipeline's scale is one less: c + s (c − u)."""
        return {"guidance_scale": max(scale - 1, 0.0)}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        return {
            "x": list(noisy_model_input.unsqueeze(2).unbind()),
            "t": timesteps,
            "cap_feats": ragged(conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]),
        }

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        """noise − latents, as every other model of flow matching."""
        return -torch.stack(output).squeeze(2)

    # --- control ----------------------------------------------------------------------------------------------------

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Beside conditions there may be channels for a mask and a picture to fill in, which are zeros here."""
        lend(self.denoiser, controlnet)
        more = controlnet.config.control_in_dim - control.shape[1]
        given = torch.cat([control, control.new_zeros(len(control), more, *control.shape[2:])], 1)
        told = {name: inputs[name] for name in ("x", "t", "cap_feats")}
        return {"controlnet_block_samples": controlnet(**told, control_context=list(given.unsqueeze(2).unbind()))}

    def control_pipeline(self) -> Any:
        pipe = super().control_pipeline()
        lend(self.denoiser, self.controlnet)  # again: the pipeline makes the transformer's parts the ControlNet's own
        return pipe

    def _new_controlnet(self) -> Any:
        """Every fifth layer of the transformer, and for conditions what embeds and refines noisy latents."""
        its = self.denoiser.config
        places = list(range(0, its.n_layers, CONTROL_EVERY))
        controlnet = self.controlnet_class(
            control_layers_places=places,
            control_in_dim=its.in_channels,
            **{key: its[key] for key in SHARED},
        )
        copies = [(self.denoiser.layers[p], part) for p, part in zip(places, controlnet.control_layers)]
        copies += [(self.denoiser.all_x_embedder, controlnet.control_all_x_embedder)]
        copies += [(self.denoiser.noise_refiner, controlnet.control_noise_refiner)]
        for source, part in copies:
            part.load_state_dict(part.state_dict() | plain_state(source))
        return controlnet

    def controlnet_of_file(self, path: Path) -> Any:
        """The published Union ones, 1.0 to 2.1, whose names are diffusers' own; which one it is, its tensors tell."""
        state, its = whole_tensors(path, "the ControlNet "), self.denoiser.config
        embedder = state.get(f"control_all_x_embedder.{its.all_patch_size[0]}-{its.all_f_patch_size[0]}.weight")
        count = len({name.split(".")[1] for name in state if name.startswith("control_layers.")})
        if embedder is None or not 0 < count <= its.n_layers:
            raise UserError(
                f"the file {path} holds no ControlNet of Z-Image (no control_all_x_embedder or no control_layers are "
                "in it); give another, or a directory."
            )
        refined = [name for name in state if name.startswith("control_noise_refiner.")]
        before = state.get("control_noise_refiner.0.before_proj.weight")
        refiner = "control_noise_refiner" if before is not None else None  # 2.1, and 1.0, which only embeds conditions
        if not refined or (before is not None and not before.any()):  # 2.0: the layers refine too
            refiner, state = "control_layers", {n: t for n, t in state.items() if n not in refined}
        controlnet = self.controlnet_class(
            control_layers_places=list(range(0, its.n_layers, its.n_layers // count))[:count],
            control_refiner_layers_places=None if refiner is None else list(range(its.n_refiner_layers)),
            control_in_dim=embedder.shape[1] // (its.all_patch_size[0] ** 2 * its.all_f_patch_size[0]),
            add_control_noise_refiner=refiner,
            **{key: its[key] for key in SHARED},
        )
        return filled_controlnet(controlnet, state, path)

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        compare_configs(self.denoiser, controlnet, name, ("dim", "n_heads", "n_kv_heads", "qk_norm", "all_patch_size"))
        its, layers, given = controlnet.config, self.denoiser.config.n_layers, self.denoiser.config.in_channels
        if its.control_in_dim < given:
            raise UserError(
                f"the ControlNet {name} does not fit this model: its control_in_dim is {its.control_in_dim}, and "
                f"conditions have {given} channels; give one that was made for this model."
            )
        if (last := max(its.control_layers_places)) >= layers:
            raise UserError(
                f"the ControlNet {name} does not fit this model: it adds to layer {last}, and the model has {layers}; "
                "give one that was made for this model."
            )


def lend(transformer: Any, controlnet: Any) -> None:
    """Let a ControlNet use parts of the transformer that are not saved, moved or trained as parts of it."""
    for name in LENT:
        controlnet._modules.pop(name, None)
        controlnet._parameters.pop(name, None)
        vars(controlnet)[name] = getattr(transformer, name)
