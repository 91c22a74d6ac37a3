"""Why a model could not be loaded, in one sentence: a pickle, a variant that is not named, tensors that are missing."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from difftuning_control.errors import UserError
from difftuning_control.families.hub import why_not
from difftuning_control.system.installed import at_least
from difftuning_control.system.untrusted import refuse_pickle

EXPECTED = "`embedded`, a diffusers directory with safetensors weights"
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
VARIANT = re.compile(r"[^./'\"]+\.([A-Za-z0-9_]+)(?:-\d{5}-of-\d{5})?\.safetensors")


def model_not_loaded(
    model: str, path: str, error: Exception, parts: Iterable[str], variant: str | None = None
) -> UserError:
    """What to say of a model that could not be loaded.

    Args:
        model: as it was asked for.
        path: its directory, or its name on the Hub.
        parts: of the pipeline, that are loaded.
        variant: that was asked for.

    Raises:
        UserError: where a part has its weights as a pickle.
    """
    parts = tuple(parts)
    refuse_pickle(f"the model {model}", path, "model", parts)
    found = _by_variant(model, Path(path), parts, variant) if Path(path).is_dir() else _on_hub(model, error)
    return found or not_loaded(f"the model {model}", path, error, EXPECTED)


def not_loaded(what: str, path: str, error: Exception, expected: str) -> UserError:
    """What to say of anything that could not be loaded, by the error that it ended with."""
    if any(type(e).__name__ == "GatedRepoError" for e in (error, error.__cause__, error.__context__)):
        return UserError(
            f"{what} is gated: accept its licence at https://huggingface.co/{path}, and log in with `hf auth login`."
        )
    said = " ".join(map(str, (error, error.__cause__, error.__context__))).lower()
    is_told = ("tokenization" in said and "placeholder" in said) or "sentencepiece" in said or "tiktoken" in said
    if is_told and not all(at_least(package, "0") for package in ("sentencepiece", "protobuf")):
        return UserError(f"{what} has a tokenizer that needs more packages; `pip install sentencepiece protobuf`.")
    if not Path(path).is_dir():
        return UserError(
            f"{what} is no directory here and could not be downloaded ({why_not(error)}); give {expected}, or a Hub "
            "id that this machine can reach."
        )
    reason = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(". ") or type(error).__name__
    return UserError(f"{what} could not be loaded ({reason}); expected {expected}, or a Hub id.")


def missing_of(module: nn.Module) -> list[str]:
    """The parameters that diffusers has left without a value, by name."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def refuse_missing(model: str, components: dict[str, Any]) -> None:
    """Refuse a pipeline of which diffusers has left parameters without a value, which it only logs.

    What a text encoder lacks is not seen: transformers draws it at random, and only logs that.

    Raises:
        UserError: naming the part, the number of its parameters that are missing, and one of them.
    """
    for name, part in components.items():
        if not isinstance(part, nn.Module):
            continue
        if absent := missing_of(part):
            more = f"{len(absent)} tensors, such as" if len(absent) > 1 else "the tensor"
            raise UserError(
                f"the {name} of {model} lacks {more} {absent[0]}: its file is not whole, or not in diffusers' form; "
                "give a pipeline that diffusers' save_pretrained has written."
            )


# --- variants -------------------------------------------------------------------------------------------------------


def _by_variant(model: str, folder: Path, parts: Iterable[str], variant: str | None) -> UserError | None:
    """What to say where the files of some part have another variant's name; None where that is not so."""
    files = {part: sorted(p.name for p in (folder / part).glob("*")) for part in parts if (folder / part).is_dir()}
    if variant is not None and (odd := [f"{part}/{n}" for part, names in files.items() for n in names if "." not in n]):
        return UserError(
            f"the model {model} has a file without an ending, {odd[0]}, by which diffusers cannot tell whether there "
            "are weights of model.variant; move it out of the folder."
        )
    weights = {part: [n for n in names if n.endswith(".safetensors")] for part, names in files.items()}
    there = {part: {_variant_of(name) for name in names} for part, names in weights.items() if names}
    if all(variants & {None, variant} for variants in there.values()):
        if variant is None or any(variant in variants for variants in there.values()):
            return None
        return UserError(f"the model {model} has no weights of model.variant {variant}; leave it out.")
    known = {v for variants in there.values() for v in variants if v is not None}
    whole = sorted((v for v in known if all(x & {None, v} for x in there.values())), key=lambda v: (v != "fp16", v))
    lacking = next(part for part, variants in there.items() if not variants & {None, variant})
    if not whole:
        return None
    return UserError(
        f"the model {model} has weights of the variant {whole[0]} alone, such as {lacking}/{weights[lacking][0]}; give "
        f"--model.variant {whole[0]}."
    )


def _variant_of(name: str) -> str | None:
    found = VARIANT.fullmatch(name)
    return None if found is None else found[1]


def _on_hub(model: str, error: Exception) -> UserError | None:
    """The same of a model on the Hub, of whose files only diffusers' own sentence tells."""
    said = str(error)
    if "(variant=None)" not in said:
        return None
    known = sorted(set(VARIANT.findall(said)), key=lambda v: (v != "fp16", v))
    if not known:
        return None
    return UserError(
        f"the model {model} has weights of the variant {known[0]} alone in some part; give --model.variant {known[0]}."
    )
