"""How diffusers' pipelines do guidance: for each known class, which rows a forward of its denoiser has.

    rows                   a step's forwards
    unconditional first    one of a batch, whose first half is unconditional; of conditional rows alone where it is off
    conditional first      the same, in the other order
    in turns               the conditional one; where guidance is on, the unconditional one after it
    negative prompt        the same, on where the call has a negative prompt
    none                   the conditional one; the model is told its guidance
    beside                 the conditional one; a second transformer, which is not tuned, has the unconditional rows

A class that is not in the table is refused: a pipeline with third rows (perturbed attention, InstructPix2Pix) would be
answered by the wrong weights without anybody noticing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.pipelines.guidance import AtForward, Branch

Rows = Literal["unconditional first", "conditional first", "in turns", "negative prompt", "none", "beside"]
Time = Literal["scheduler", "sigma", "clean", "scaled"]


@dataclass(frozen=True)
class Guiding:
    """What some pipeline classes have in common.

    Args:
        classes: their names in diffusers.
        rows: which rows a forward has.
        component: the denoiser's name in the pipeline.
        scale: the call's argument that is w; None where there is none.
        neutral: the scale that leaves the conditional prediction alone.
        above: the scale up to which the pipeline has no unconditional rows; None of classes where diffusers changed it.
        time: what the denoiser is told: the scheduler's timestep, σ, 1 − σ, or the timestep by its configuration's
            factor.
        encoders: how `encode_prompt` gives negative embeddings: after each positive one, or in the call's second run;
            None where that is not known.
        alone: whether the same rows are answered twice where the call has no negative prompt.
        lists: whether the denoiser takes a list of rows.
    """

    classes: tuple[str, ...]
    rows: Rows
    component: str = "transformer"
    scale: str | None = "guidance_scale"
    neutral: float = 1.0
    above: float | None = 1.0
    time: Time = "scheduler"
    encoders: Literal["alternate", "second run"] | None = None
    alone: bool = False
    lists: bool = False

    def process(self, process: NoiseProcess, denoiser: Any) -> NoiseProcess:
        """A scheduler's process, with the timesteps that the denoiser is told."""
        if self.time == "scaled":
            return replace(process, timesteps=process.timesteps * denoiser.config.timestep_scale)
        if process.prediction != "flow" or self.time == "scheduler":
            return process
        return replace(process, timesteps=process.sigmas if self.time == "sigma" else 1 - process.sigmas)

    def threshold(self, pipe: Any) -> float:
        """The scale up to which a pipeline has no unconditional rows, as it says itself where `above` does not."""
        if self.above is not None:
            return self.above
        has_rows = type(pipe).do_classifier_free_guidance.fget(SimpleNamespace(_guidance_scale=self.neutral + 0.5))
        return self.neutral if has_rows else 1.0

    def branch(self, pipe: Any, call: dict[str, Any]) -> AtForward:
        """The rows of each forward of a guided call.

        Raises:
            UserError: if the call has a negative prompt nowhere, and the class needs one.
        """
        if self.rows == "conditional first":
            return _either(pipe, "conditional first")
        if self.rows == "unconditional first":
            return _either(pipe, "unconditional first")
        if self.rows == "negative prompt" and not has_negative(call):
            if self.alone:
                return lambda inputs, timestep: "both"
            raise UserError(
                f"domain_guidance of a {type(pipe).__name__} acts on the negative prompt, and there is none; give a "
                'negative_prompt, " " for an empty one.'
            )
        return _turns()


def _either(pipe: Any, halves: Branch) -> AtForward:
    """Guidance may end early, in a callback of diffusers' own or at Z-Image's truncation; and skip-layer guidance (SD3)
    runs the denoiser once more a step, without unconditional rows."""

    def branch(inputs: dict[str, Any], timestep: Tensor) -> Branch:
        end = getattr(pipe, "_cfg_truncation", None)
        if end is not None and float(timestep.reshape(-1)[0]) > end:
            return "tuned"
        is_guided = getattr(pipe, "do_classifier_free_guidance", True) and inputs.get("skip_layers") is None
        return halves if is_guided else "tuned"

    return branch


def _turns() -> AtForward:
    """The first forward at a timestep is conditional, the next one at it not: Lumina 2 ends guidance by itself."""
    seen: list[float] = []

    def branch(inputs: dict[str, Any], timestep: Tensor) -> Branch:
        now = float(timestep.reshape(-1)[0])
        if seen and seen[-1] == now:
            seen.clear()  # a scheduler of second order comes back to the same timestep
            return "unconditional"
        seen[:] = [now]
        return "tuned"

    return branch


def has_negative(call: dict[str, Any]) -> bool:
    """Whether a call has a negative prompt, by the stock pipelines' own rule."""
    pooled = call.get("negative_pooled_prompt_embeds", True)
    return call["negative_prompt"] is not None or (call["negative_prompt_embeds"] is not None and pooled is not None)


def _variants(name: str, *tasks: str) -> tuple[str, ...]:
    return tuple(f"{name}{task}Pipeline" for task in ("", *tasks))


GUIDINGS = (
    Guiding(
        (
            *_variants("StableDiffusion", "Img2Img", "Inpaint", "Adapter"),
            *_variants("StableDiffusionControlNet", "Img2Img", "Inpaint"),
            *_variants("StableDiffusionXL", "Img2Img", "Inpaint", "Adapter"),
            *_variants("StableDiffusionXLControlNet", "Img2Img", "Inpaint"),
            *_variants("StableDiffusionXLControlNetUnion", "Img2Img", "Inpaint"),
        ),
        "unconditional first",
        "unet",
        encoders="alternate",
    ),
    Guiding(
        _variants("StableDiffusion3", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting"),
        "unconditional first",
        encoders="alternate",
    ),
    Guiding(("DiTPipeline",), "conditional first"),
    Guiding(("PixArtAlphaPipeline", "PixArtSigmaPipeline"), "unconditional first"),
    Guiding(("SanaPipeline", "SanaControlNetPipeline"), "unconditional first", time="scaled"),
    Guiding(("Lumina2Pipeline",), "in turns", time="clean"),
    Guiding(
        (*_variants("Flux", "Img2Img", "Inpaint", "ControlNet", "Kontext", "KontextInpaint"),),
        "negative prompt",
        scale="true_cfg_scale",
        time="sigma",
        encoders="second run",
        alone=True,
    ),
    Guiding(
        (
            "FluxFillPipeline",
            *_variants("FluxControl", "Img2Img", "Inpaint"),
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "Flux2Pipeline",
        ),
        "none",
        scale=None,
        time="sigma",
    ),
    Guiding(("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"), "in turns", time="sigma"),
    Guiding(_variants("Chroma", "Img2Img", "Inpaint"), "in turns", time="sigma"),
    Guiding(("Krea2Pipeline",), "in turns", neutral=0.0, above=0.0, time="sigma"),
    Guiding(("Ideogram4Pipeline",), "beside", scale=None, time="clean"),
    Guiding(
        _variants(
            "QwenImage", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint", "Edit", "EditInpaint", "EditPlus"
        )
        + ("QwenImage21Pipeline",),
        "negative prompt",
        scale="true_cfg_scale",
        time="sigma",
        encoders="second run",
    ),
    Guiding(
        _variants("ZImage", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint"),
        "conditional first",
        neutral=0.0,
        above=None,
        time="clean",
        lists=True,
    ),
)
BY_CLASS = {name: guiding for guiding in GUIDINGS for name in guiding.classes}


def known_class(pipe: Any) -> Any:
    """The class of diffusers whose `__call__` a pipeline runs, if its way of doing guidance is known.

    Raises:
        UserError: otherwise.
    """
    for klass in type(pipe).__mro__:
        if "attachment" in vars(klass) or klass.__module__.startswith("difftuning_control."):
            continue  # ours, which run the `__call__` of the class below
        if klass.__module__.startswith("diffusers.") and klass.__name__ in BY_CLASS:
            return klass
        if "__call__" in vars(klass):
            break
    name = type(pipe).__name__
    why = "its batches have third rows" if "PAG" in name or "Pix2Pix" in name else "how it does guidance is not known"
    raise UserError(
        f"a {name} cannot take settings of Diff-Tuning: {why}; use the pipeline of diffusers without it, for "
        "Stable Diffusion, SDXL, SD3, FLUX, FLUX.2, Chroma, Qwen-Image, Z-Image, Krea 2, Ideogram 4, Lumina 2, PixArt, "
        "Sana or DiT."
    )


def guiding_of(pipe: Any) -> Guiding:
    """How a pipeline does guidance.

    Raises:
        UserError: if that is not known.
    """
    return BY_CLASS[known_class(pipe).__name__]
