"""Pictures for comparing: each side draws the same prompts from the same noise, with the settings of the sliders.

The pretrained model is kept between two requests, so that a moved slider does not load it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, read_file
from difftuning_control.verbs.ui.drawing import BASE, Drawing
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.places import Places

if TYPE_CHECKING:
    from PIL import Image

    from difftuning_control.families.family import Family
    from difftuning_control.runs.record import RunRecord

DOMAIN = "the tick of Domain Guidance"


class StoppedError(Exception):
    """Somebody does not want to wait for the rest."""


@dataclass
class Painter:
    """Draws for one page.

    Args:
        model: that drew last, by its name.
    """

    places: Places
    model: str = ""
    _alone: threading.Lock = field(default_factory=threading.Lock)
    _halt: threading.Event = field(default_factory=threading.Event)
    _kept: tuple[Any, Any] | None = None

    def draw(
        self,
        drawing: Drawing,
        advance: Callable[[int], object] = lambda count: None,
        show: Callable[[str, Image.Image], object] = lambda side, condition: None,
    ) -> dict[str, list[Image.Image]]:
        """The pictures of each side, in the order of the prompts; of what was stopped the sides that were done.

        Args:
            advance: is told how many pictures are done.
            show: is given the condition that a ControlNet draws under.

        Raises:
            UserError: if a run is not finished, a ControlNet has no photo, or the runs are of different models.
        """
        import_models()
        with self._alone:
            self._halt.clear()
            records = {side: self._record(side, drawing) for side in drawing.sides if side != BASE}
            family, side = self._family(records), drawing.resolution
            if side is None:
                side = next((r.data.resolution for r in records.values()), family.native_resolution)
            family.check_resolution(side, "resolution")
            family.check_prompts(list(drawing.prompts))
            pictures: dict[str, list[Image.Image]] = {}
            try:
                for name in drawing.sides:
                    with self._as(family, name, records.get(name)) as drawn, self._halting(drawn):
                        pictures[name] = self._pictures(
                            family, drawn, name, records.get(name), drawing, side, advance, show
                        )
            except StoppedError:
                pass
            return pictures

    @property
    def is_drawing(self) -> bool:
        return self._alone.locked()

    def stop(self) -> None:
        """End what is being drawn, at its next step."""
        self._halt.set()

    def forget(self) -> None:
        """Let the model go, unless something is being drawn."""
        if self._alone.acquire(blocking=False):
            try:
                self._kept = None
                from difftuning_control.families.hub import free_memory  # for what is let go now

                free_memory()
            finally:
                self._alone.release()

    def _record(self, side: str, drawing: Drawing) -> RunRecord:
        from difftuning_control.runs.finished import finished_run  # saves diffusers until something is drawn

        record = finished_run(self.places.run(side))
        if record.method == "controlnet" and drawing.photo is None:
            raise UserError(f"{side} is a ControlNet, which draws under a condition; add a photo to control with.")
        if record.method == "controlnet" and drawing.begin is not None:
            raise UserError(f"{side} is a ControlNet, and draws over no picture here; take the picture away.")
        return record

    def _family(self, records: dict[str, RunRecord]) -> Family:
        """The pretrained model of these runs, or the embedded one where none is compared."""
        import torch  # saves these until something is drawn

        from difftuning_control.data.labels import begin_as
        from difftuning_control.families.hub import best_device, free_memory
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
            free_memory()
            family = load_model(config, getattr(torch, dtype)).to(best_device())
            for record in records.values():
                begin_as(family, record.classes, record.seed)
            self._kept = (key, family)
        return self._kept[1]

    @contextmanager
    def _as(self, family: Family, side: str, record: RunRecord | None) -> Iterator[Family]:
        """The model as a side draws with it."""
        if record is None:
            yield family
            return
        from difftuning_control.runs.finished import tuned_model  # as above

        with tuned_model(family, self.places.run(side), record) as tuned:
            yield tuned

    @contextmanager
    def _halting(self, family: Family) -> Iterator[None]:
        """While open, the denoiser's next forward ends the drawing once it is stopped."""

        def look(module: Any, given: Any) -> None:
            if self._halt.is_set():
                raise StoppedError

        handle = family.denoiser.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def _pictures(
        self,
        base: Family,
        tuned: Family,
        side: str,
        record: RunRecord | None,
        drawing: Drawing,
        resolution: int,
        advance: Callable[[int], object],
        show: Callable[[str, Image.Image], object],
    ) -> list[Image.Image]:
        """One picture a prompt, of one side."""
        from difftuning_control.data.control_spec import condition_rows  # these save diffusers until it draws
        from difftuning_control.evaluation.drawing import sample_pictures
        from difftuning_control.evaluation.redrawing import image_pipeline, redrawn_pictures
        from difftuning_control.pipelines.domain_guidance import control_sampling_with, sampling_with

        common: dict[str, Any] = {
            "seed": drawing.seed,
            "steps": drawing.steps,
            "guidance_scale": drawing.guidance,
            "resolution": resolution,
            "batch_size": 4,
            "advance": advance,
        }
        is_control = record is not None and record.method == "controlnet"
        with ExitStack() as stack:
            pipe = image_pipeline(tuned) if drawing.begin is not None else None
            if record is not None and not is_control and drawing.has_extras:
                extras = {
                    "domain_guidance": drawing.domain,
                    "unconditional_strength": drawing.mixture if drawing.domain else 0.0,
                    "adapter_schedule": drawing.adapter_schedule,
                    "hand_over": drawing.hand_over or None,
                }
                stack.enter_context(sampling_with(base, tuned, DOMAIN, pipe, **extras))
            if drawing.begin is not None:
                begin = picture_at(drawing.begin)
                return redrawn_pictures(tuned, pipe, begin, drawing.prompts, change=drawing.change, **common)
            if not is_control:
                return sample_pictures(tuned, drawing.prompts, **common)
            condition = self._condition(tuned, side, drawing, resolution)
            show(side, condition)
            if drawing.control_schedule is not None:
                stack.enter_context(control_sampling_with(tuned, drawing.control_schedule))
            return sample_pictures(
                tuned, drawing.prompts, **common, control=condition_rows(condition, len(drawing.prompts))
            )

    def _condition(self, family: Family, side: str, drawing: Drawing, resolution: int) -> Image.Image:
        """What a ControlNet is shown of the photo."""
        from difftuning_control.data.control_spec import (
            Conditioner,
            ControlSpec,
        )  # saves it where nothing is controlled
        from difftuning_control.runs.finished import weights_of

        assert drawing.photo is not None
        spec = ControlSpec.load(weights_of(self.places.run(side), "controlnet"))
        if spec.is_function and not drawing.is_condition:
            raise UserError(
                f"the conditions of {side} are made by code ({spec.annotator}), which a page does not run; give a "
                "condition that is made already, or use difftune sample --control."
            )
        photo = picture_at(drawing.photo)
        return Conditioner(spec, family.device).prepare(photo, resolution, resolution, drawing.is_condition)


def picture_at(path: Path) -> Image.Image:
    """A picture that was uploaded, or lies in the folder.

    Raises:
        UserError: if it cannot be read.
    """
    from difftuning_control.data.images import decode_image  # saves it until something is drawn

    try:
        return decode_image(read_file(path, MAX_PIXELS * BYTES_PER_PIXEL))
    except OSError:
        raise UserError(f"the picture {path.name} cannot be read; add it again.") from None
    except UserError as error:
        raise UserError(f"the picture {path.name} {error}; add another.") from None
