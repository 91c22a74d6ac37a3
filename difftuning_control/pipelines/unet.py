"""What the drop-ins with a UNet have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ControlNetModel, StableDiffusionPipeline

from difftuning_control.errors import UserError
from difftuning_control.families.sd import check_controlnet
from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling, like
from difftuning_control.pipelines.prompts import NegativePrompts


class UNetSampling(NegativePrompts, TunedSampling):
    """`TunedSampling` of a Stable Diffusion or SDXL pipeline."""

    component: ClassVar[str] = "unet"
    source_keys: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "block_out_channels",
        "layers_per_block",
    )

    def _check_guidance(self, scale: float) -> None:
        super()._check_guidance(scale)
        if scale > 1 and self.denoiser.config.time_cond_proj_dim is not None:
            raise UserError(
                f"domain_guidance does nothing at guidance_scale {scale:g} on this model, which is told its guidance "
                "and has no unconditional rows; set_extras(domain_guidance=False)."
            )

    @like(StableDiffusionPipeline.enable_freeu)
    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class, for the source UNet as well."""
        parent: Any = super()
        parent.enable_freeu(*args, **kwargs)
        if self.source is not None:
            self.source.enable_freeu(*args, **kwargs)

    @like(StableDiffusionPipeline.disable_freeu)
    def disable_freeu(self) -> None:
        """As in the stock class, for the source UNet as well."""
        parent: Any = super()
        parent.disable_freeu()
        if self.source is not None:
            self.source.disable_freeu()


class ControlledUNet(ControlledSampling, UNetSampling):
    """`ControlledSampling` of a Stable Diffusion or SDXL pipeline."""

    controlnet_class: ClassVar[Any] = ControlNetModel
    control_argument: ClassVar[str] = "image"
    condition_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    conditions_by_row: ClassVar[bool] = True

    @classmethod
    def check_controlnet(cls, pipe: Any, controlnet: Any, name: str) -> None:
        check_controlnet(pipe.unet, pipe.vae_scale_factor, controlnet, name)
