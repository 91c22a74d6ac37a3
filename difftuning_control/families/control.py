"""The denoiser under a ControlNet: one forward of both, and the check that the two fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from difftuning_control.errors import UserError


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
