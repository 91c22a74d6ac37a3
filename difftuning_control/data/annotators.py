"""Annotators of controlnet_aux: from a picture to the edges, depth, pose, … that a ControlNet is conditioned on.

    load_annotator("canny", {"low_threshold": 50})(picture)      (H, W, 3) uint8 RGB → (H, W, 3) uint8 RGB

Those of `without_weights()` work offline; the others load pretrained networks from the Hub or a local directory.

References:
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023), https://arxiv.org/abs/2302.05543
    controlnet_aux, https://github.com/huggingface/controlnet_aux
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import math
import pickle
import random
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difftuning_control.errors import UserError
from difftuning_control.system.hub import hub_or_cache


@dataclass(frozen=True)
class Annotator:
    """One row of the table.

    Args:
        class_name: in controlnet_aux.
        weights: default Hub repository; None where there are no weights.
        kind: what it finds: edges, depth, normals, masks, pose or other.
        needs: packages that controlnet_aux uses and does not install.
    """

    class_name: str
    weights: str | None
    kind: str
    needs: tuple[str, ...] = ()


_HUB = "lllyasviel/Annotators"
ANNOTATORS = {
    "canny": Annotator("CannyDetector", None, "edges"),
    "hed": Annotator("HEDdetector", _HUB, "edges"),
    "pidinet": Annotator("PidiNetDetector", _HUB, "edges"),
    "teed": Annotator("TEEDdetector", "fal-ai/teed", "edges"),
    "lineart": Annotator("LineartDetector", _HUB, "edges"),
    "lineart_anime": Annotator("LineartAnimeDetector", _HUB, "edges"),
    "lineart_standard": Annotator("LineartStandardDetector", None, "edges"),
    "mlsd": Annotator("MLSDdetector", _HUB, "edges"),
    "midas": Annotator("MidasDetector", _HUB, "depth"),
    "zoe": Annotator("ZoeDetector", _HUB, "depth"),
    "leres": Annotator("LeresDetector", _HUB, "depth"),
    "normalbae": Annotator("NormalBaeDetector", _HUB, "normals"),
    "openpose": Annotator("OpenposeDetector", _HUB, "pose"),
    "dwpose": Annotator("DWposeDetector", "wanghaofan/dw-ll_ucoco_384", "pose", ("mmcv", "mmdet", "mmpose")),
    "mediapipe_face": Annotator("MediapipeFaceDetector", None, "pose", ("mediapipe",)),
    "sam": Annotator("SamDetector", "ybelkada/segment-anything", "masks"),
    "shuffle": Annotator("ContentShuffleDetector", None, "other"),
    "anyline": Annotator("AnylineDetector", "TheMistoAI/MistoLine", "edges"),
}
# where their class knows no default, or does not look for the file before it downloads another (midas)
_FILES = {
    "teed": {"filename": "5_model.pth"},
    "anyline": {"filename": "MTEED.pth", "subfolder": "Anyline"},
    "sam": {"filename": "sam_vit_h_4b8939.pth", "subfolder": "checkpoints"},
    "midas": {"filename": "dpt_hybrid-midas-501f0c75.pt"},
}
# these draw from global random states, keep state between their layers, warn or print: one picture at a time
_ALONE = ("anyline", "dwpose", "leres", "lineart_standard", "mediapipe_face", "midas", "sam", "shuffle", "zoe")
# ours to give, deprecated, a second picture in the result (depth_and_normal), or Python files to be run (configs)
_RESERVED = (
    "self",
    "input_image",
    "output_type",
    "pretrained_model_or_path",
    "device",
    "hand_and_face",
    "depth_and_normal",
    "det_config",
    "pose_config",
)
_LOCK = threading.RLock()


def annotator(name: str) -> Annotator:
    """The row of a name.

    Raises:
        UserError: if there is none of this name; the nearest names, or all of them.
    """
    if name not in ANNOTATORS:
        raise UserError(f"the annotator {name!r} is unknown; expected {_nearest(name, ANNOTATORS)}.")
    return ANNOTATORS[name]


def without_weights() -> list[str]:
    """Names of annotators that need neither weights nor a package that controlnet_aux does not install."""
    return [name for name, row in ANNOTATORS.items() if row.weights is None and not row.needs]


def load_annotator(
    name: str, params: dict[str, Any], weights: str | None = None, device: torch.device | str = "cpu"
) -> Callable[[np.ndarray], np.ndarray]:
    """A pure function from pictures (H, W, 3) uint8 RGB to what is found on them, (H, W, 3) uint8 RGB, contiguous.

    Pictures are annotated at their own size: controlnet_aux resizes to multiples of 64, and `detect_resolution`, the
    shorter side that it resizes to, is by default that of the picture, rounded up to such a multiple (controlnet_aux
    has 512). A picture whose sides are multiples of 64 is not resampled. All others come back by area averages where
    they shrink and linearly where they grow; masks by the nearest pixel, for their colours are labels.

    The function may be called by several threads at once. It raises UserError where the annotator fails on a picture.

    Args:
        name: a key of `ANNOTATORS`.
        params: of the class's `__call__`, and of its `from_pretrained` (filename, model_type, …).
        weights: a local directory or a Hub id; the row's default repository when None.
        device: where its network runs.

    Raises:
        UserError: if a parameter is unknown or of the wrong type, a package is missing, or the weights are not here
            and cannot be downloaded, do not fit, or hold anything but tensors.
    """
    row, device = annotator(name), torch.device(device)
    if weights and row.weights is None:
        raise UserError(f"the annotator {name} has no weights, and they are given as {weights}; leave them out.")
    missing = [package for package in row.needs if find_spec(package) is None]
    if missing:
        raise _unusable(name, f"needs {' and '.join(missing)}, which controlnet_aux does not install")
    with _alone():
        made = getattr(_controlnet_aux(), row.class_name)
    called, loaded = _defaults(made.__call__), _defaults(getattr(made, "from_pretrained", made))
    for key, value in params.items():
        _check(name, key, value, {**loaded, **called})
    with _alone():
        detector = _load(name, made, {k: v for k, v in params.items() if k in loaded}, weights, device)
    options = {k: v for k, v in params.items() if k in called}
    return partial(_annotate, name, detector, options, frozenset(called))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return " or ".join(difflib.get_close_matches(name, known, 3, 0.5)) or ", ".join(known)


def _unusable(name: str, why: str) -> UserError:
    *most, last = without_weights()
    return UserError(f"the annotator {name} {why}; {', '.join(most)} and {last} work without weights.")


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The named parameters that a user may set, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in _RESERVED}


def _check(name: str, key: str, value: Any, defaults: dict[str, Any]) -> None:
    if key not in defaults:
        raise UserError(f"the annotator {name} has no parameter {key!r}; expected {_nearest(key, defaults)}.")
    kind = type(defaults[key])
    right, expected = True, ""
    if key in ("detect_resolution", "image_resolution"):
        right, expected = type(value) is int and value >= 64, "a whole number from 64"
    elif kind in (int, float):
        right, expected = type(value) in (int, float), "a number"
    elif kind in (bool, str):
        right, expected = type(value) is kind, "true or false" if kind is bool else "a name"
    if not right:
        raise UserError(f"the parameter {key} of the annotator {name} is {value!r}; expected {expected}.")


@contextmanager
def _alone(seed: bytes = b"") -> Iterator[None]:
    """One thread at a time, silent, and random by `seed`; the random states are put back."""
    with _LOCK, warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        arrays, python = np.random.get_state(), random.getstate()
        digest = np.frombuffer(hashlib.sha256(seed).digest(), np.uint32)
        np.random.seed(digest)
        random.seed(digest.tobytes())
        try:
            yield
        finally:
            np.random.set_state(arrays)
            random.setstate(python)


def _controlnet_aux() -> Any:
    """The package; it warns about ten times when it is imported, of what is not installed and what is deprecated."""
    try:
        import controlnet_aux  # saves seconds, and its warnings, where nothing is annotated

        return controlnet_aux
    except AttributeError as error:
        mediapipe, reason = sys.modules.get("mediapipe"), _reason(error)
    except Exception as error:
        mediapipe, reason = None, _reason(error)
    if mediapipe is not None:  # it has no `solutions` from 0.10.30 on; without that, not even canny can be imported
        sys.modules["mediapipe"] = None  # type: ignore[assignment]
        try:
            return _controlnet_aux()
        finally:
            sys.modules["mediapipe"] = mediapipe
    raise UserError(f"controlnet_aux cannot be imported ({reason}); run pip install controlnet-aux.")


@contextmanager
def _safe_loading() -> Iterator[list[Any]]:
    """Inside, no pickle is read but for its tensors, and no code is fetched; gives what is read.

    Every loader of controlnet_aux 0.0.10 is a torch.load without weights_only, safe by torch's default but for the
    variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD; torch.hub's downloads are unsafe by default; none is a scripted model.
    Two older kinds of midas call torch.hub.load, which runs code of GitHub. leres reads the command line, and sets
    cudnn.benchmark for the whole process.
    """
    load, hub, benchmark, arguments = torch.load, torch.hub.load, torch.backends.cudnn.benchmark, sys.argv
    read: list[Any] = []

    def load_tensors(file: Any, map_location: Any = "cpu", *rest: Any, **options: Any) -> Any:
        try:
            read.append(load(file, map_location, *rest, **{**options, "weights_only": True}))
        except pickle.UnpicklingError:
            path = getattr(file, "name", file)
            raise pickle.UnpicklingError(f"{path} is not of tensors alone, and reading it might run code") from None
        return read[-1]

    def load_local(*args: Any, source: str = "github", **options: Any) -> Any:
        if source != "local":
            raise PermissionError("it would run code from GitHub")
        return hub(*args, source=source, **options)

    torch.load, torch.hub.load = load_tensors, load_local  # type: ignore[assignment]
    sys.argv = ["", "--gpu_ids", "-1"]  # leres' second network, which has no way to another device, is on the CPU
    try:
        yield read
    finally:
        torch.load, torch.hub.load = load, hub
        torch.backends.cudnn.benchmark, sys.argv = benchmark, arguments


def _load(name: str, made: Any, options: dict[str, Any], weights: str | None, device: torch.device) -> Any:
    """The annotator with its weights, on its device."""
    source = weights or ANNOTATORS[name].weights
    if source is None:
        if name == "mediapipe_face" and sys.modules[f"{made.__module__}.mediapipe_face_common"].mp is None:
            raise _unusable(name, "needs a mediapipe older than 0.10.30, which still has its solutions")
        return made()
    try:
        with _safe_loading() as read:
            detector = _from_files(name, made, options, source, device)
        if name == "zoe":  # its loader takes whatever fits and leaves the rest random; the classifier is not used
            needed = [n for n, _ in detector.model.named_parameters() if ".head." not in n and ".fc_norm." not in n]
            absent = [n for n in needed if n not in read[-1]["model"]]
            if absent:
                raise KeyError(f"{len(absent)} tensors are missing, such as {absent[0]}")
    except Exception as error:
        raise _unusable(name, f"cannot use the weights in {source} ({_reason(error)})") from None
    if name == "sam":  # it has no `to`, and fails where it finds no mask
        detector.mask_generator.predictor.model.to(device)
        draw = detector.show_anns
        detector.show_anns = lambda masks: draw(masks) if masks else np.zeros((1, 1, 3), np.uint8)
    return detector.to(device) if hasattr(detector, "to") else detector


def _from_files(name: str, made: Any, options: dict[str, Any], source: str, device: torch.device) -> Any:
    folder, default, files = Path(source), source == ANNOTATORS[name].weights, _FILES.get(name, {})
    if name == "dwpose":  # its class knows where to download its two files
        if not default:
            raise FileNotFoundError("give its two files as the parameters det_ckpt and pose_ckpt instead")
        return made(**options, device=str(device))
    if not folder.is_dir() and not default:  # another repository has its own folders, and midas knows where
        files = {k: v for k, v in files.items() if k == "filename" and name != "midas"}
    options = {**files, **options}
    if folder.is_dir():
        below = folder / options.pop("subfolder", "")  # the files may lie in it as they do in the repository
        folder = below if below.is_dir() else folder
        if "filename" in options and not (folder / options["filename"]).is_file():
            raise FileNotFoundError(f"{folder} has no {options['filename']}")
        source = str(folder)
    with hub_or_cache(source):
        return made.from_pretrained(source, **options)


def _reason(error: Exception) -> str:
    first = " ".join(str(error).split()).split(". ")[0]
    return textwrap.shorten(f"{type(error).__name__}: {first}", 200, placeholder=" …").rstrip(".: ")


def _annotate(
    name: str, detector: Any, options: dict[str, Any], known: frozenset[str], picture: np.ndarray
) -> np.ndarray:
    """What a loaded annotator finds on (H, W, 3) uint8 RGB, in its size."""
    import cv2  # comes with controlnet_aux: saves it where nothing is annotated

    height, width = picture.shape[:2]
    side = options.get("detect_resolution", 64 * math.ceil(min(height, width) / 64))
    # image_resolution resizes what was found once more, linearly; this is the size that it has already
    sizes = {"detect_resolution": side, "image_resolution": 64 * round(side / 64)}
    options = {**{k: v for k, v in sizes.items() if k in known}, **options}
    picture = np.ascontiguousarray(picture)
    try:
        with np.errstate(all="ignore"), _alone(picture.tobytes()) if name in _ALONE else nullcontext():
            drawn = detector(picture, output_type="np", **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"the annotator {name} failed on a picture of {width}×{height} pixels with {options} ({_reason(error)}); "
            "try its default parameters, or larger pictures."
        ) from None
    if drawn.shape[:2] != (height, width):
        shrinks = height <= drawn.shape[0] and width <= drawn.shape[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        way = cv2.INTER_NEAREST_EXACT if ANNOTATORS[name].kind == "masks" else way
        drawn = cv2.resize(drawn, (width, height), interpolation=way)
    return np.ascontiguousarray(drawn, dtype=np.uint8)
