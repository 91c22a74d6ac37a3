"""The control contract: how a picture becomes the condition that a ControlNet was taught, saved beside its weights.

    picture → frame (cover and crop) → annotate → condition (H, W, 3) uint8 → tensor in the family's range

Training, validation, evaluation, sampling and the pipelines all come through `Conditioner`, so that what is asked in
use is what was taught. A condition that the user supplies passes through the same frame as its picture.

References:
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023), https://arxiv.org/abs/2302.05543
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from difftuning_control.data.annotators import Annotator, annotator, load_annotator
from difftuning_control.data.images import frame, to_rgb
from difftuning_control.errors import UserError
from difftuning_control.system.digests import digest_of, digest_of_file
from difftuning_control.system.durable import write_json
from difftuning_control.system.functions import named_function
from difftuning_control.system.untrusted import from_json, read_text

SUPPLIED = "supplied"
SPEC_FILE = "control_spec.json"
FORMAT = 1
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
Annotate = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ControlSpec:
    """How conditions are made.

    Args:
        annotator: a name of controlnet_aux (`annotators.ANNOTATORS`), `package.module:function` for a function from
            pictures (H, W, 3) uint8 RGB to conditions (H, W) or (H, W, 3), or `supplied`.
        params: of the annotator.
        weights: the annotator's, a directory or Hub id; its default place when None.
        resolution: side in pixels of the pictures that the ControlNet was trained on.
        value_range: of the tensor that the ControlNet is given.
        channel_order: what the ControlNet itself turns the RGB that it is given into.
        resize: lanczos, box or nearest: how a supplied condition is resized. Pictures to annotate are resized by
            lanczos.
        crop: centre: what lies outside of the frame is cut off evenly, as in validation and use.
    """

    annotator: str = "canny"
    params: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    resolution: int = 512
    value_range: tuple[float, float] = (0.0, 1.0)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    resize: Literal["lanczos", "box", "nearest"] = "lanczos"
    crop: Literal["centre"] = "centre"

    def __post_init__(self) -> None:
        for name, known in (("resize", RESAMPLING), ("channel_order", ("rgb", "bgr")), ("crop", ("centre",))):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise UserError(f"the control's {name} is {value!r}; expected one of {', '.join(known)}.")
        if self.resolution < 8:
            raise UserError(f"the control's resolution is {self.resolution}; expected at least 8 pixels.")
        low, high = self.value_range
        if not low < high:
            raise UserError(f"the control's value range is {low} to {high}; expected a rising one, such as 0 to 1.")
        row = self.row  # an unknown name is told here
        if row is None and not self.is_function and (self.params or self.weights):
            raise UserError("a supplied condition has no annotator; leave out its params and weights.")
        if self.is_function and self.weights is not None:
            raise UserError(f"{self.annotator} is a function, which takes params only; leave out control.weights.")

    @property
    def is_function(self) -> bool:
        """Whether the annotator is a function of the user's, `package.module:function`."""
        return ":" in self.annotator

    @property
    def row(self) -> Annotator | None:
        """What is known of an annotator of controlnet_aux; None for a function and for supplied conditions.

        Raises:
            UserError: for a name that controlnet_aux does not have.
        """
        return None if self.annotator == SUPPLIED or self.is_function else annotator(self.annotator)

    @property
    def kind(self) -> str:
        """What conditions are compared as: edges, depth, normals, masks, or similarity for all others."""
        kind = self.row.kind if self.row is not None else None
        return kind if kind in ("edges", "depth", "normals", "masks") else "similarity"

    def check_range(self, expected: tuple[float, float]) -> None:
        """Refuse a spec whose values are in another range than a pipeline gives.

        Raises:
            UserError: with the two ranges.
        """
        if self.value_range != expected:
            its, ours = (" to ".join(f"{v:g}" for v in pair) for pair in (self.value_range, expected))
            raise UserError(f"the control spec's values are in {its}, the pipeline gives {ours}; mend {SPEC_FILE}.")

    def save(self, folder: str | Path) -> None:
        """Write `control_spec.json` beside the weights in `folder`, with the digest of these."""
        folder = Path(folder)
        values = {"format": FORMAT, **dataclasses.asdict(self), "weights_files": _weights(folder)}
        write_json(folder / SPEC_FILE, values)

    @classmethod
    def load(cls, folder: str | Path) -> ControlSpec:
        """The spec beside the weights in `folder`.

        Raises:
            UserError: if there is none, it is not readable, or it was written for other weights.
        """
        path = Path(folder) / SPEC_FILE
        try:
            values = from_json(read_text(path))
            if not isinstance(beside := values.pop("weights_files"), dict):
                raise ValueError("weights_files is no table")
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            values["value_range"] = tuple(values["value_range"])
            spec = cls(**values)
        except OSError:
            raise UserError(
                f"{folder} has no {SPEC_FILE}, so nothing says how its conditions are made; prepare them yourself, or "
                "write one: ControlSpec(annotator=…).save(folder)."
            ) from None
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy the one that was saved with the weights.") from None
        order = _channel_order(Path(folder))
        if order not in (None, spec.channel_order):
            raise UserError(
                f"{path} says that channels are in the order {spec.channel_order}, the ControlNet beside it {order}; "
                "copy the spec that belongs to it."
            )
        weights = _weights(Path(folder))  # of several variants, one may have been downloaded
        if any(beside.get(n) != digest for n, digest in weights.items()) or (beside and not weights):
            differing = sorted(n for n in weights.keys() | beside.keys() if weights.get(n) != beside.get(n))
            raise UserError(
                f"{path} was written for other weights ({', '.join(differing)} differ); copy the one that belongs to "
                "these, or write it anew with ControlSpec.save."
            )
        return spec


def _weights(folder: Path) -> dict[str, str]:
    return {p.name: digest_of_file(p) for p in sorted(folder.glob("*.safetensors"))}


def _channel_order(folder: Path) -> str | None:
    """What the ControlNet's own configuration says, where it says something."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("controlnet_conditioning_channel_order")


class Conditioner:
    """Makes conditions by a spec; the annotator is loaded on first use.

    Args:
        device: where an annotator with weights runs.
    """

    def __init__(self, spec: ControlSpec, device: torch.device | str = "cpu"):
        self.spec, self.device = spec, device
        self._annotate: Annotate | None = None

    def load(self) -> Annotate:
        """The annotator: (H, W, 3) uint8 RGB to what it finds.

        Raises:
            UserError: if it cannot be loaded.
        """
        if self._annotate is None:
            if self.spec.annotator == SUPPLIED:
                raise UserError("the condition is one that the user supplies; no annotator could make it.")
            if self.spec.is_function:
                self._annotate = _call(self.spec)
            else:
                self._annotate = load_annotator(self.spec.annotator, self.spec.params, self.spec.weights, self.device)
        return self._annotate

    @property
    def default_workers(self) -> int | None:
        """How many threads may annotate: one where a network does, else as many as there are cores (None)."""
        row = self.spec.row
        return None if row is None or row.weights is None else 1

    def condition(self, picture: np.ndarray) -> np.ndarray:
        """The condition of a framed picture, (H, W, 3) uint8 RGB of the same size.

        Args:
            picture: (H, W, 3) uint8 RGB.

        Raises:
            UserError: if the annotator gives something else than a picture of that size in 0…255 or 0…1.
        """
        annotate = self.load()
        with torch.autocast(torch.device(self.device).type, enabled=False):  # as in use, whatever a run trains in
            drawn = annotate(picture.copy())
        return _as_picture(np.asarray(drawn), picture.shape, self.spec.annotator)

    def frame_condition(self, condition: Image.Image, height: int, width: int, crop: Any = (0.5, 0.5)) -> np.ndarray:
        """A supplied condition (RGB) in the frame of its picture, (height, width, 3) uint8."""
        return frame(condition, height, width, crop, RESAMPLING[self.spec.resize])

    def prepare(
        self, image: Image.Image, height: int | None = None, width: int | None = None, ready: bool = False
    ) -> Image.Image:
        """From a photo of any size to the condition as the stock pipelines take it, an RGB picture.

        Args:
            height: of the picture to be drawn, in pixels; the resolution of training when None.
            width: likewise.
            ready: `image` is a condition already and is only framed; so is every one of a supplied condition.
        """
        height, width = height or self.spec.resolution, width or self.spec.resolution
        image = to_rgb(image)
        if ready or self.spec.annotator == SUPPLIED:
            return Image.fromarray(self.frame_condition(image, height, width))
        return Image.fromarray(self.condition(frame(image, height, width)))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the spec, the function behind it, or the libraries that annotate do."""
        values: list[Any] = [{**dataclasses.asdict(self.spec), "value_range": None}]  # what is stored is uint8
        folder = Path(self.spec.weights) if self.spec.weights is not None else None
        if folder is not None and folder.is_dir():  # what the files say, not where they lie
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            values[0]["weights"] = {p.relative_to(folder).as_posix(): digest_of_file(p) for p in files}
        if self.spec.is_function:
            values.append(_source(self.spec.annotator))
        elif self.spec.row is not None:
            values += [version("controlnet_aux"), _opencv()]
        return digest_of(values)


def condition_rows(condition: Image.Image, count: int) -> torch.Tensor:
    """One condition for each of so many prompts, (count, 3, H, W) uint8."""
    return torch.from_numpy(np.array(condition)).permute(2, 0, 1).expand(count, -1, -1, -1)


@lru_cache(maxsize=1)
def _opencv() -> str:
    """The installed package behind `cv2`, which has several names; finding it reads the list of all packages."""
    return ", ".join(sorted(f"{n} {version(n)}" for n in set(packages_distributions().get("cv2", []))))


def _call(spec: ControlSpec) -> Annotate:
    """A user's function with the spec's parameters; what it raises becomes a sentence."""
    function = named_function(spec.annotator, "annotator")
    try:
        inspect.signature(function).bind(None, **spec.params)
    except TypeError as error:
        raise UserError(f"the annotator {spec.annotator} does not take these control.params ({error}).") from None
    except ValueError:
        pass  # compiled functions may have no signature

    def annotate(picture: np.ndarray) -> np.ndarray:
        try:
            return function(picture, **spec.params)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"the annotator {spec.annotator} failed on a picture ({reason}); mend it.") from error

    return annotate


def _source(name: str) -> str:
    """The text of the module that a function lies in: what it calls there decides conditions too."""
    named_function(name, "annotator")
    module = importlib.import_module(name.partition(":")[0])
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return f"compiled {getattr(module, '__version__', '')}"


def _as_picture(drawn: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """What an annotator gave, as (H, W, 3) uint8."""
    if drawn.ndim == 2:
        drawn = drawn[:, :, None]
    if drawn.ndim != 3 or drawn.shape[:2] != shape[:2] or drawn.shape[2] not in (1, 3):
        raise UserError(
            f"the annotator {name} gave {drawn.shape} for a picture of {shape}; expected (H, W) or (H, W, 3)."
        )
    if drawn.dtype == bool:
        drawn = drawn.astype(np.uint8) * 255
    elif drawn.dtype != np.uint8:
        low, high = (float(drawn.min()), float(drawn.max())) if drawn.size else (0.0, 0.0)
        if not (np.issubdtype(drawn.dtype, np.floating) and low >= 0 and high <= 1):
            raise UserError(
                f"the annotator {name} gave {drawn.dtype} values from {low:g} to {high:g}; expected uint8, or floats "
                "from 0 to 1."
            )
        drawn = (drawn * 255).round().astype(np.uint8)
    return np.ascontiguousarray(drawn.repeat(3, 2) if drawn.shape[2] == 1 else drawn)
