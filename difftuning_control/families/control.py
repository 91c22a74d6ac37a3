"""A model under a ControlNet: one forward of both, how conditions are read, how a ControlNet is made and checked."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.components import Components
from difftuning_control.families.hub import quiet_loading


class ControlledDenoiser(nn.Module):
    """A denoiser that adds a ControlNet's residuals to its own; without a condition it is the denoiser alone.

    Args:
        residuals: from the ControlNet, the condition and the denoiser's arguments to the further arguments that hold
            the residuals.

    forward: the denoiser's keyword arguments, and `control`, or None; gives a tuple with the prediction, as the
    denoiser does.
    """

    def __init__(self, denoiser: Any, controlnet: Any, residuals: Callable[[Any, Tensor, dict[str, Any]], dict]):
        super().__init__()
        self.denoiser, self.controlnet, self.residuals = denoiser, controlnet, residuals

    def forward(self, control: Tensor | None = None, **inputs: Any) -> tuple[Tensor]:
        added = {} if control is None else self.residuals(self.controlnet, control, inputs)
        return self.denoiser(**inputs, **added)


def compare_configs(denoiser: Any, controlnet: Any, name: str, keys: tuple[str, ...]) -> None:
    """Refuse a ControlNet whose configuration differs from the denoiser's in one of `keys`.

    Raises:
        UserError: with the two values that differ.
    """
    for key in keys:
        mine, theirs = (
            list(v) if isinstance(v, (list, tuple)) else v for v in (denoiser.config[key], controlnet.config[key])
        )
        if mine != theirs:
            raise UserError(
                f"the ControlNet {name} does not fit this model: its {key} is {theirs}, the model's {mine}; give one "
                "that was made for this model, or start from the denoiser."
            )


def to_tensor(conditions: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """uint8 conditions (…) as float32 in the given range; 0 to 1 as diffusers' own preprocessing gives it."""
    low, high = value_range
    return conditions.float() / 255 * (high - low) + low


class Controlled(Components):
    """The ControlNet of a family; `controlnet` is None until somebody sets it."""

    controlnet_class: ClassVar[Any] = None  # None where diffusers has no ControlNet
    control_pipeline_class: ClassVar[Any] = None
    control_argument: ClassVar[str] = "image"  # of that pipeline's call
    condition_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # what that pipeline makes of a picture
    encodes_control: ClassVar[bool] = False  # whether a ControlNet reads latents, and not pictures
    controlnet_whole: ClassVar[tuple[str, ...]] = ()  # the parts, by name, that train whole beside a LoRA of a
    # ControlNet: its input, its zeros

    def encode_control(self, control: Tensor) -> Tensor:
        """Conditions (B, 3, H, W) uint8 as the ControlNet takes them: pictures in `condition_range`."""
        return to_tensor(control, self.condition_range)

    @property
    def control_fingerprint(self) -> str:
        """Changes when what `encode_control` gives does, where it encodes."""
        raise NotImplementedError

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's further arguments that a ControlNet gives for a condition and the denoiser's own arguments."""
        raise NotImplementedError

    def control_pipeline(self) -> Any:
        """The stock ControlNet pipeline around the same modules."""
        return self.control_pipeline_class(**self.pipe.components, controlnet=self.controlnet)

    @property
    def channel_order(self) -> str:
        """What the ControlNet itself turns the RGB that it is given into."""
        config = self.controlnet.config if self.controlnet is not None else {}
        return config.get("controlnet_conditioning_channel_order", "rgb")

    def need_controlnet(self) -> None:
        """Refuse a family that has no ControlNets.

        Raises:
            UserError: naming the pipeline.
        """
        if self.controlnet_class is None:
            raise UserError(
                f"there is no ControlNet for a {type(self.pipe).__name__} here; train a LoRA or all weights instead."
            )

    def new_controlnet(self, seed: int) -> Any:
        """A ControlNet that starts as a copy of the denoiser's first layers and adds nothing yet, float32.

        `seed` draws whatever has no counterpart in the denoiser.

        Raises:
            UserError: if the family has none.
        """
        self.need_controlnet()
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            controlnet = self._new_controlnet()
        return controlnet.float().to(self.device)

    def _new_controlnet(self) -> Any:
        raise NotImplementedError

    def controlnet_of_file(self, path: Path) -> Any:
        """A ControlNet from a single safetensors file, as its authors publish it.

        Raises:
            UserError: if the family's lie in directories only, or the file holds no such ControlNet.
        """
        raise UserError(
            f"the ControlNet {path} is a file; for a {type(self.pipe).__name__} give a directory with config.json and "
            "safetensors weights, or a Hub id."
        )

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        """Refuse a ControlNet that was made for another model.

        Raises:
            UserError: with the two numbers that differ.
        """
        raise NotImplementedError

    def save_controlnet(self, folder: Path, controlnet: Any) -> None:
        """A directory for the ControlNet class's `from_pretrained`."""
        controlnet.save_pretrained(folder, safe_serialization=True)


def filled_controlnet(controlnet: Any, state: dict[str, Tensor], path: Path) -> Any:
    """A ControlNet with the tensors of a file.

    Raises:
        UserError: if these are not the ControlNet's own, or not all of them.
    """
    try:
        controlnet.load_state_dict(state)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise UserError(f"the ControlNet {path} does not fit this model ({reason}); give another.") from None
    return controlnet
