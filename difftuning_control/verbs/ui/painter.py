"""Pictures for comparing: each side draws the same prompts from the same noise, with the settings of the sliders.

The pretrained model is kept between two requests, so that a moved slider does not load it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import MAX_SEED, ModelConfig
from difftuning_control.verbs.ui.places import Places

if TYPE_CHECKING:
    from PIL import Image

    from difftuning_control.families.family import Family
    from difftuning_control.runs.record import RunRecord

BASE = "base"
MOST_PICTURES = 64  # of a grid


@dataclass(frozen=True)
class Drawing:
    """What is drawn, by whom.

    Args:
        sides: base, names of runs, or of steps that they kept (runs/mine/step-000010).
        domain: draw runs with Domain Guidance, whose scale is then `guidance`. [at least 1]
        mixture: under Domain Guidance, strength of the adapter in the unconditional branch, 1 for ordinary guidance. [0
            to 1]
        strength: of the adapter of runs. [0 to 1]
        hand_over: u₀, at and below which the pretrained model finishes the picture; 0 for never. [0 to 1]
        resolution: side in pixels; the run's own, or the model's, when None.
    """

    sides: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 15
    guidance: float = 4.0
    domain: bool = False
    mixture: float = 0.0
    strength: float = 1.0
    hand_over: float = 0.0
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not self.sides:
            raise UserError("there is nothing to draw; write a prompt, and choose the base or a run.")
        if len(self.prompts) * len(self.sides) > MOST_PICTURES:
            raise UserError(
                f"{len(self.prompts)} prompts of {len(self.sides)} sides are more than {MOST_PICTURES} pictures; take "
                "fewer."
            )
        for name, value, low, high in (
            ("seed", self.seed, 0, MAX_SEED),
            ("steps", self.steps, 1, 200),
            ("guidance", self.guidance, 1 if self.domain else 0, 50),
            ("mixture", self.mixture, 0, 1),
            ("strength", self.strength, 0, 1),
            ("hand-over", self.hand_over, 0, 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} is {value:g}; expected {low} to {high}.")

    @property
    def has_extras(self) -> bool:
        """Whether a run draws otherwise than the stock pipeline would."""
        return self.domain or self.strength < 1 or self.hand_over > 0


@dataclass
class Painter:
    """Draws for one page.

    Args:
        model: that drew last, by its name.
    """

    places: Places
    model: str = ""
    _alone: threading.Lock = field(default_factory=threading.Lock)
    _kept: tuple[Any, Any] | None = None

    def draw(
        self, drawing: Drawing, advance: Callable[[int], object] = lambda count: None
    ) -> dict[str, list[Image.Image]]:
        """The pictures of each side, in the order of the prompts.

        Args:
            advance: is told how many pictures are done.

        Raises:
            UserError: if a run is not finished, is a ControlNet, or the runs are of different models.
        """
        with self._alone:
            records = {side: self._record(side) for side in drawing.sides if side != BASE}
            family, side = self._family(records), drawing.resolution
            if side is None:
                side = next((r.data.resolution for r in records.values()), family.native_resolution)
            family.check_resolution(side, "resolution")
            family.check_prompts(list(drawing.prompts))
            found = {}
            for name in drawing.sides:
                with self._as(family, name, records.get(name), drawing) as drawn:
                    found[name] = _pictures(drawn, drawing, side, advance)
            return found

    def forget(self) -> None:
        """Let the model go, unless something is being drawn."""
        if self._alone.acquire(blocking=False):
            try:
                self._kept = None
                import gc  # these for what is let go now

                import torch

                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            finally:
                self._alone.release()

    def _record(self, side: str) -> RunRecord:
        from difftuning_control.runs.finished import finished_run  # saves diffusers until something is drawn

        record = finished_run(self.places.writable(side))
        if record.method == "controlnet":
            raise UserError(
                f"{side} is a ControlNet, which draws under a condition; difftune sample --control photo.png does."
            )
        return record

    def _family(self, records: dict[str, RunRecord]) -> Family:
        """The pretrained model of these runs, or the embedded one where none is compared."""
        import torch  # saves these until something is drawn

        from difftuning_control.data.labels import begin_as
        from difftuning_control.families.hub import best_device
        from difftuning_control.families.loading import load_model

        models = {side: (record.recipe.model, record.dtype_name) for side, record in records.items()}
        (config, dtype), *others = list(models.values()) or [(ModelConfig(), "float32")]
        if any(other != (config, dtype) for other in others):
            named = ", ".join(f"{side} ({model[0].id})" for side, model in models.items())
            raise UserError(f"these runs were tuned from different models, or in different precisions: {named}.")
        spaces = {side: record.classes for side, record in records.items()}
        self.model = config.id
        key = (config, dtype, spaces if any(spaces.values()) else None)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next is loaded
            family = load_model(config, getattr(torch, dtype)).to(best_device())
            for record in records.values():
                begin_as(family, record.classes, record.seed)
            self._kept = (key, family)
        return self._kept[1]

    @contextmanager
    def _as(self, family: Family, side: str, record: RunRecord | None, drawing: Drawing) -> Iterator[Family]:
        """The model as a side draws with it."""
        if record is None:
            yield family
            return
        from difftuning_control.runs.finished import tuned_model  # as above

        with ExitStack() as stack:
            tuned = stack.enter_context(tuned_model(family, self.places.writable(side), record))
            if drawing.has_extras:
                stack.enter_context(_with_extras(family, tuned, drawing))
            yield tuned


def _with_extras(base: Family, tuned: Family, drawing: Drawing) -> AbstractContextManager[None]:
    """While open, `tuned` draws with these settings."""
    from difftuning_control.pipelines.domain_guidance import sampling_with  # saves diffusers until something is drawn

    strength = {"kind": "table", "u": [0, 1], "strength": [drawing.strength] * 2} if drawing.strength < 1 else None
    return sampling_with(
        base,
        tuned,
        "the tick of Domain Guidance",
        domain_guidance=drawing.domain,
        unconditional_strength=drawing.mixture if drawing.domain else 0.0,
        adapter_schedule=strength,
        hand_over=drawing.hand_over or None,
    )


def _pictures(family: Family, drawing: Drawing, side: int, advance: Callable[[int], object]) -> list[Image.Image]:
    from difftuning_control.evaluation.drawing import sample_pictures  # as above

    return sample_pictures(
        family,
        drawing.prompts,
        seed=drawing.seed,
        steps=drawing.steps,
        guidance_scale=drawing.guidance,
        resolution=side,
        batch_size=4,
        advance=advance,
    )
