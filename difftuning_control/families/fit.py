"""Settings of training that fit a family, by method: learning rate, optimizer steps, batch size, schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from difftuning_control.recipe.training import ScheduleConfig


@dataclass(frozen=True)
class Fit:
    """What a family is trained with where a recipe says nothing, by the recipe's method; what is not named is usual.

    Args:
        learning_rate: of AdamW.
        max_steps: optimizer steps, for some tens of pictures; a ControlNet needs many more.
        batch_size: rows of a step, which fit 24 GB with gradient checkpointing.
        gradient_checkpointing: methods that need it for that, on a GPU.
        schedule: ψ and ξ; the recipe's own default of a method that is not named. A LoRA, and all weights, learn and
            retain at every noise level alike, ψ = ξ = 1, which over eight styles, and two, came nearer to these than
            ψ = u^0.3; a ControlNet, taught at high noise, ψ = u, follows its condition sooner (docs/results.md).
    """

    learning_rate: dict[str, float] = field(
        default_factory=lambda: {"lora": 1e-4, "full": 1e-5, "controlnet": 1e-5, "controlnet_lora": 1e-4}
    )
    max_steps: dict[str, int] = field(default_factory=lambda: {"lora": 800, "full": 800, "controlnet": 20000})
    batch_size: int = 5
    gradient_checkpointing: tuple[str, ...] = ("lora", "full", "controlnet")
    schedule: dict[str, ScheduleConfig] = field(
        default_factory=lambda: {
            "lora": ScheduleConfig("constant", xi=1.0),
            "full": ScheduleConfig("constant", xi=1.0),
            "controlnet": ScheduleConfig("power", tau=1.0),
        }
    )


EMBEDDED = Fit(
    {"lora": 1e-3, "full": 3e-4, "controlnet": 1e-3, "controlnet_lora": 1e-3},
    {"lora": 300, "full": 300, "controlnet": 300},
    32,
    gradient_checkpointing=(),
)
