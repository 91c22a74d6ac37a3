"""What the drop-ins with a UNet have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ControlNetModel

from difftuning_control.families.sd import check_controlnet
from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling


class UNetSampling(TunedSampling):
    """`TunedSampling` of a Stable Diffusion or SDXL pipeline."""

    component: ClassVar[str] = "unet"


class ControlledUNet(ControlledSampling, UNetSampling):
    """`ControlledSampling` of a Stable Diffusion or SDXL pipeline."""

    controlnet_class: ClassVar[Any] = ControlNetModel
    control_argument: ClassVar[str] = "image"
    condition_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    conditions_by_row: ClassVar[bool] = True

    @classmethod
    def check_controlnet(cls, pipe: Any, controlnet: Any, name: str) -> None:
        check_controlnet(pipe.unet, pipe.vae_scale_factor, controlnet, name)
