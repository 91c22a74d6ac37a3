"""The keys of LoRA files: which layer, by a tool's name for it, and which part of its LoRA; what is none.

<layer>.lora_A.weight            peft; .lora_A.<adapter>.weight and .lora_A too
<layer>.lora_down.weight         kohya's sd-scripts, LyCORIS, OneTrainer; .lora_mid.weight, .alpha
<layer>.lora.down.weight         diffusers before peft; <layer>_lora.down.weight too
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

NATIVE = re.compile(
    r"(?P<module>unet|transformer|text_encoder(_\d)?)\.(?P<layer>.+)"
    r"\.(lora_[AB]\.(weight|bias)|lora_magnitude_vector(\.weight)?)"
)
PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.(?!bias)\w+)?(?:\.weight)?"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<older>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
PEFT = {"A": "down", "B": "up"}
FORMS = {
    r"hada_w": "a LoHa",
    r"lokr_w": "a LoKr",
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.oft_|\.boft_": "an OFT",
    r"\.on_input": "an IA3",
    r"\.[ab][12]\.weight": "a GLoRA",
    r"\.diff(_b)?$|\.set_weight|\.[wb]_norm": "a LoRA with changes of whole weights beside it",
    r"\.(lora_B|lora_up)\.bias": "a LoRA with biases",
    r"lora_controlnet|(query|key)_norm\.scale": "a Control LoRA",
    r"_lora\d\.(down|up)\.weight": "a LoRA of XLabs",
    r"^(clip_[lg]|t5xxl|emb_params|<.*>)$": "a textual inversion",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
}
"""Other things that lie in such files, by a key that shows them."""
EXPECTED = "expected the A and B of a LoRA (lora_A and lora_B, or lora_down and lora_up) and nothing else"


class OtherFormError(ValueError):
    """A file that cannot be read as a LoRA; says why, as a verb phrase."""


def is_native(keys: Iterable[str], component: str, layers: Iterable[str]) -> bool:
    """Whether a file has diffusers' own names; with magnitudes or biases in peft's form none of other tools.

    Args:
        component: the denoiser's name in the pipeline.
        layers: the denoiser's layers.
    """
    known, given = set(layers), list(keys)
    only_native = any(re.search(r"lora_magnitude_vector|lora_B\.bias", key) for key in given)
    for key in given:
        found = NATIVE.fullmatch(key)
        if found is None:
            return False
        is_known = only_native or found["layer"] in known
        if not (is_known if found["module"] == component else found["module"].startswith("text_encoder")):
            return False
    return bool(given)


def form_of(keys: Iterable[str]) -> tuple[str, str] | None:
    """What else a file is by its keys, and the key that shows it; None where nothing is known."""
    given = list(keys)
    return next(((what, key) for form, what in FORMS.items() for key in given if re.search(form, key)), None)


def parts_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors `down`, `up`, `mid` and `alpha` of each layer, by the name that the file has for it.

    Raises:
        OtherFormError: if there are others, or A or B is missing.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = PART.fullmatch(key)
        if found is None:
            if (other := form_of([key]) or form_of(tensors)) is not None:
                raise OtherFormError(f"is {other[0]} ({other[1]}), which is not read in this form; {EXPECTED}")
            raise OtherFormError(f"has {key}, which is no part of a LoRA; {EXPECTED}")
        part = PEFT.get(found["peft"] or "") or found["kohya"] or found["older"] or "alpha"
        its = layers.setdefault(found["layer"], {})
        if part in its:
            raise OtherFormError(f"has more than one LoRA for {found['layer']}; give a file with one")
        its[part] = tensor
    for layer, its in layers.items():
        if not {"down", "up"} <= its.keys():
            raise OtherFormError(f"is not whole: A or B of {layer} is missing")
        _check_shapes(layer, its)
    if not layers:
        raise OtherFormError(f"holds no tensors; {EXPECTED}")
    return layers


def _check_shapes(layer: str, its: dict[str, Tensor]) -> None:
    down, up = its["down"], its["up"]
    if not (down.ndim in (2, 4) and up.ndim in (2, 4) and 0 < len(down) == up.shape[1]):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise OtherFormError(f"has A and B of {layer} of shapes {shapes}; expected (r, in) and (out, r)")
    if "mid" in its and (its["mid"].ndim != 4 or its["mid"].shape[:2] != (len(down), len(down))):
        raise OtherFormError(f"has a lora_mid of {layer} of shape {tuple(its['mid'].shape)}; expected (r, r, h, w)")
    if "alpha" in its and its["alpha"].numel() != 1:
        raise OtherFormError(f"has an alpha of {layer} of shape {tuple(its['alpha'].shape)}; expected one number")


def read_by_diffusers(keys: Iterable[str], layers: dict[str, Any]) -> bool:
    """Whether a transformer's file has a form that only diffusers' own reader knows: XLabs', and a LoKr.

    Args:
        layers: the transformer's, by the names that other tools may have for each.
    """
    given = list(keys)
    if any(re.search(r"\.processor\.(qkv|proj)_lora[12]\.", key) for key in given):
        return True
    lokr = [key.rpartition(".lokr_")[0] for key in given if ".lokr_" in key]
    return bool(lokr) and all(name.removeprefix("diffusion_model.") in layers for name in lokr)
