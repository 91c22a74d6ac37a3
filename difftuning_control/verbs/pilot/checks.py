"""The checks of a pilot before anything is loaded: settings that do not go together, each in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from difftuning_control.errors import UserError
from difftuning_control.evaluation.figures import LEAST_PICTURES
from difftuning_control.evaluation.forgetting import LEAST_ROWS
from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.training.setup import check_bank_rows
from difftuning_control.verbs.pilot.side_tuning import BUDGET, MEASURED, TAUGHT, side_bank, side_tuning


def check_pilot(recipe: Recipe, config: PilotConfig) -> None:
    """Refuse a pilot that cannot be run, or whose sides could not be told apart.

    Raises:
        UserError: naming the setting, and what to do.
    """
    if recipe.tuning.retention_ratio == 0:
        raise UserError(
            "the recipe's tuning.retention_ratio and retention_weight are 0, so every side would be plain "
            "fine-tuning; set both above 0 (a pilot leaves them out of plain by itself)."
        )
    if recipe.method == "controlnet" and BUDGET in config.sides:
        raise UserError(f"{BUDGET} bounds what a denoiser forgets, and a ControlNet's stays the same; omit it.")
    _check_drawing(recipe, config)
    _check_sides(recipe, config.sides)
    if recipe.training.stop_when is not None:
        raise UserError("a pilot compares runs of equal length; leave out training.stop_when.")
    _check_lengths(recipe, config)


def check_analysis(recipe: Recipe, config: PilotConfig, pictures: int) -> bool:
    """Whether there are pictures enough for the analysis of where this model must learn.

    Raises:
        UserError: if there are not, and a side has the schedule that it finds.
    """
    if pictures >= LEAST_ROWS:
        return True
    found = recipe.tuning.schedule.kind == "auto"
    named = [side for side in config.sides if side == MEASURED or (found and side in TAUGHT)]
    if named:
        raise UserError(
            f"the schedule of {named[0]} is measured on at least {LEAST_ROWS} pictures, and there are {pictures}; "
            "leave that side out of pilot.sides, or add pictures."
        )
    return False


def _check_drawing(recipe: Recipe, config: PilotConfig) -> None:
    """Guidance, and prompts outside the new domain."""
    if config.guidance_scales and recipe.method == "controlnet":
        raise UserError(
            "pilot.guidance_scales try Domain Guidance, but a ControlNet's denoiser is the pretrained one; leave "
            "them out."
        )
    if config.unconditional_strength is not None:
        what = "all weights are" if recipe.method != "lora" else f"a {recipe.adapter.kind}, which has none, is"
        if recipe.method != "lora" or not KINDS[recipe.adapter.kind].is_scalable:
            raise UserError(
                f"pilot.unconditional_strength takes a part of an adapter's strength, and here {what} tuned; leave it "
                "out."
            )
    if config.outside and (recipe.method == "controlnet" or recipe.tuning.label_space == "new"):
        reason = "new classes replace the old ones"
        if recipe.method == "controlnet":
            reason = "the denoiser beside a ControlNet is the pretrained one"
        raise UserError(f"pilot.outside asks what tuned models still draw, but {reason}; leave it out.")


def _check_sides(recipe: Recipe, sides: list[str]) -> None:
    """Refuse a bank that is too small to judge by, and what does not go with a teacher, before anything is drawn."""
    if recipe.bank.size != "auto" and recipe.bank.size < LEAST_PICTURES:
        raise UserError(
            f"bank.size is {recipe.bank.size}, but its samples are also what a pilot tells the old domain by; give at "
            f"least {LEAST_PICTURES}, or auto."
        )
    training = replace(recipe.training, validation_prompts=recipe.measured_prompts)
    for side in sides:
        tuning, bank = side_tuning(side, recipe.tuning, Path("schedule.json")), side_bank(side, recipe.bank, Path())
        check_bank_rows(replace(recipe, tuning=tuning, bank=bank, training=training), 1)


def lengths_of(recipe: Recipe, config: PilotConfig) -> list[int]:
    """Steps at which every run is judged, rising."""
    return sorted(config.lengths or [recipe.training.max_steps])


def _check_lengths(recipe: Recipe, config: PilotConfig) -> None:
    training, lengths = recipe.training, lengths_of(recipe, config)
    if len(lengths) > 1 and training.lr_scheduler in ("cosine", "linear"):
        raise UserError(
            f"pilot.lengths are read off one run, but training.lr_scheduler {training.lr_scheduler} ends with it; "
            "use constant with an ema_decay, or one length."
        )
    if lengths[-1] != training.max_steps:
        raise UserError(
            f"pilot.lengths ends with {lengths[-1]}, training.max_steps is {training.max_steps}; make them equal."
        )
