"""Whether an adapter to begin from fits what is to train: compared by its layers and ranks, with nothing attached."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from difftuning_control.adapters.attached import denoiser_of
from difftuning_control.adapters.difffit import DiffFit
from difftuning_control.adapters.files import (
    DIFFFIT_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    metadata_and_shapes,
    read_header,
)
from difftuning_control.adapters.kinds import peft_config, target_layers, target_names
from difftuning_control.data.examples import listed
from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter_kinds import LORA_KINDS
from difftuning_control.system.untrusted import from_json, read_text

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.adapter import AdapterConfig
    from difftuning_control.runs.start import Start

COMPARED = ("peft_type", "r", "alpha", "lora_alpha", "use_dora", "oft_block_size", "boft_block_size")
PART = re.compile(r"(?P<layer>.+)\.(?:hada|lokr|oft|boft|ia3)_[^.]*(?:\..+)?")
ENCODER = "text_model."  # a text encoder's layers are named with and without it
Loras = Mapping[str, tuple[dict[str, Tensor], float]]  # by component: tensors, and their scale
Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B by layer


def check_fit(start: Start, lora: Loras, family: Family, config: AdapterConfig) -> None:
    """Refuse an adapter that is not of what trains.

    Args:
        start: where it lies.
        lora: what was read of it as a LoRA; empty where it is none.
        config: of what is to train, which is not attached yet.

    Raises:
        UserError: with all that is to be given to begin from it, or why nothing would do.
    """
    weights = start.weights
    if config.kind in LORA_KINDS:
        _check_kind(weights, lora, config)
        _check_lora(start, {name: _pairs(weights, own) for name, (own, _) in lora.items()}, family, config)
    elif config.kind == "difffit":
        given = metadata_and_shapes(weights)[1] if weights.name == DIFFFIT_FILE else {}
        check_shapes(weights, given, DiffFit.shapes(denoiser_of(family.pipe)[1]))
    else:
        _check_peft(weights, family, config)


def check_shapes(weights: Path, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of other names or shapes than those that train.

    Raises:
        UserError: naming the file.
    """
    if given != expected:
        raise UserError(f"{weights} does not fit what trains; give an adapter of the same kind, targets and size.")


# --- LoRAs ----------------------------------------------------------------------------------------------------------


def _check_kind(weights: Path, lora: Loras, config: AdapterConfig) -> None:
    """Refuse a LoRA of another kind."""
    if not lora:
        raise UserError(f"{weights} is no LoRA, and adapter.kind is {config.kind}; give the kind that it is.")
    there = "lora" if weights.is_dir() else read_header(weights).get("kind", "lora")
    keys = [key for own, _ in lora.values() for key in own]
    if there == "lora" and any("lora_magnitude" in key for key in keys):
        there = "dora"
    if there != config.kind:
        raise UserError(f"adapter.kind is {config.kind}, and {weights} is a {there}; give --adapter.kind {there}.")
    layers = {key.rpartition(".lora_")[0] for key in keys}
    if there == "dora" and (bare := sorted(n for n in layers if f"{n}.lora_magnitude_vector" not in keys)):
        raise UserError(f"{weights} is not whole: the magnitudes of {bare[0]} are missing; give a whole file.")
    if any(key.endswith("lora_B.bias") for key in keys):
        raise UserError(f"{weights} has biases beside A and B, which do not train here; give a LoRA without them.")


def _pairs(weights: Path, tensors: dict[str, Tensor]) -> Pairs:
    """A and B of each layer, by its name without `text_model`."""
    pairs: Pairs = {}
    for layer in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
        a, b = (tensors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            raise UserError(f"{weights} is not whole: A or B of {layer} is missing; give a whole file.")
        pairs[layer.removeprefix(ENCODER)] = a, b
    return pairs


def _check_lora(start: Start, there: dict[str, Pairs], family: Family, config: AdapterConfig) -> None:
    """Refuse other layers or another rank than those that train, with all that differs and all that is to be given."""
    weights, (component, denoiser) = start.weights, denoiser_of(family.pipe)
    _check_encoders(weights, there, family, config, component)
    given, layers = there[component], target_layers(denoiser, config, family.lora_targets)[1]
    rank = _only_rank(weights, there)
    found, changes = [], _ranks(start, rank, config)
    if changes:
        of_start = ", a half of it that of its start" if "rank" not in changes else ""
        found.append(f"adapter.rank is {config.full_rank}, and the LoRA {weights} has the rank {rank}{of_start}")
    if given.keys() != layers.keys():
        names = target_names(denoiser, set(given))
        if names is None:
            raise UserError(
                f"training cannot begin from {weights}: adapter.targets has no names for its layers alone "
                f"({listed(sorted(given))}); give a LoRA of all layers of a name."
            )
        more, absent = sorted(given.keys() - layers.keys()), sorted(layers.keys() - given.keys())
        said = [*([f"has {more[0]} too"] if more else []), *([f"has no {absent[0]}"] if absent else [])]
        found.append(f"adapter.targets is {config.targets}, and the LoRA {weights} {' and '.join(said)}")
        changes["targets"] = "auto" if set(names) == set(family.lora_targets) else ",".join(names)
    if ("text_encoder" in there) != config.text_encoder:
        said_of = "has none for it" if config.text_encoder else "also has weights for the text encoder"
        found.append(f"adapter.text_encoder is {_spelled(config.text_encoder)}, and the LoRA {weights} {said_of}")
        changes["text_encoder"] = not config.text_encoder
    if found:
        _check_advice(weights, denoiser, family, config, changes)
        give = " ".join(f"--adapter.{name} {_spelled(value)}" for name, value in changes.items())
        raise UserError(f"{'; '.join(found)}; give {give}.")
    _check_sizes(weights, given, layers)
    if config.text_encoder:
        _check_sizes(weights, there["text_encoder"], _encoder_layers(family, config))


def _spelled(value: Any) -> str:
    """A setting as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _ranks(start: Start, rank: int, config: AdapterConfig) -> dict[str, Any]:
    """The settings that a LoRA of this rank asks for where the recipe has others.

    One that started away from zero has its start as the second half of its rank.
    """
    starts = config.init == "pissa" or (config.kind == "tlora" and config.init != "gaussian")
    own = None if start.weights.is_dir() else read_header(start.weights).get("rank")  # of a T-LoRA
    if own is None and start.record is not None:
        own = start.record.recipe.adapter.full_rank
    if own is not None and rank == 2 * own:
        changes = {} if config.full_rank == own else {"rank": own}
        return changes if starts else changes | {"init": "orthogonal" if config.kind == "tlora" else "pissa"}
    if rank == config.full_rank or (starts and own is None and rank == 2 * config.full_rank):
        return {}
    return {"rank": rank, "init": "gaussian"} if starts else {"rank": rank}


def _check_encoders(
    weights: Path,
    there: dict[str, Pairs],
    family: Family,
    config: AdapterConfig,
    component: str,
) -> None:
    """Refuse what no setting trains: other modules than the denoiser and the first text encoder, or layers of this
    beside its projections."""
    has_encoder = family.text_lora_targets and getattr(family.pipe, "text_encoder", None) is not None
    trained = {component, "text_encoder"} if has_encoder else {component}
    if strange := sorted(there.keys() - trained):
        raise UserError(f"{weights} also has weights for the {strange[0]}, which do not train here; give another.")
    if not there.get(component):
        raise UserError(f"{weights} has no weights for the {component}, which trains here; give another.")
    if "text_encoder" not in there:
        return
    takes = list(family.text_lora_targets)
    layers, given = _encoder_layers(family, config), there["text_encoder"]
    if more := sorted({name.rpartition(".")[2] for name in given.keys() - layers.keys()}):
        raise UserError(
            f"training cannot begin from {weights}: it also has weights for {', '.join(more)} of the text encoder, of "
            f"which {', '.join(takes)} train and nothing else; give a LoRA of these alone, or of the denoiser alone."
        )
    if absent := sorted(layers.keys() - given.keys()):
        raise UserError(
            f"training cannot begin from {weights}: of the text encoder {', '.join(takes)} train together, and it has "
            f"no {absent[0]}; give a LoRA of all of these, or of the denoiser alone."
        )


def _encoder_layers(family: Family, config: AdapterConfig) -> dict[str, Any]:
    """The layers of the text encoder that can train, by name without `text_model`; whatever rank the recipe has."""
    smallest = replace(config, targets="auto", rank=1, init=None, min_rank=None)
    layers = target_layers(family.pipe.text_encoder, smallest, family.text_lora_targets)[1]
    return {name.removeprefix(ENCODER): layer for name, layer in layers.items()}


def _only_rank(weights: Path, there: dict[str, Pairs]) -> int:
    """The rank that all layers have."""
    ranks: dict[int, str] = {}
    for component, pairs in there.items():
        for name, (a, _) in pairs.items():
            ranks.setdefault(len(a), f"{component}.{name}")
    if len(ranks) > 1:
        each = listed(f"{rank} in {ranks[rank]}" for rank in sorted(ranks))
        raise UserError(
            f"training cannot begin from {weights}: its ranks differ between layers ({each}), and one adapter.rank "
            "holds for all that trains; give a LoRA of one rank."
        )
    return next(iter(ranks))


def _check_advice(weights: Path, denoiser: Any, family: Family, config: AdapterConfig, changes: dict[str, Any]) -> None:
    """Refuse a file for which the settings that it asks for would be refused themselves."""
    try:
        target_layers(denoiser, replace(config, **changes), family.lora_targets)
    except UserError as error:
        raise UserError(f"training cannot begin from {weights}, as it would have to train so: {error}") from None


def _check_sizes(weights: Path, given: Pairs, layers: dict[str, Any]) -> None:
    for name, (a, b) in given.items():
        layer = layers[name]
        is_linear = isinstance(layer, nn.Linear)  # the weight of a quantised one is packed
        out, *into = (layer.out_features, layer.in_features) if is_linear else layer.weight.shape
        if (len(b), *a.shape[1:]) != (out, *into):
            theirs, ours = (" × ".join(map(str, sizes)) for sizes in ((len(b), *a.shape[1:]), (out, *into)))
            raise UserError(f"{weights} was made for another base: its {name} is {theirs}, here it is {ours}.")


# --- other kinds ----------------------------------------------------------------------------------------------------


def _check_peft(folder: Path, family: Family, config: AdapterConfig) -> None:
    """Refuse a peft directory of another kind or size, or of other layers; shapes are compared when it is read."""
    if not (folder / PEFT_CONFIG).is_file():
        raise UserError(f"{folder} is no peft directory; give an adapter of the kind that trains.")
    denoiser = denoiser_of(family.pipe)[1]
    names, layers = target_layers(denoiser, config, family.lora_targets)
    theirs = from_json(read_text(folder / PEFT_CONFIG))
    ours = json.loads(json.dumps(peft_config(config, names).to_dict(), default=str))
    pairs = {k: (theirs[k], ours[k]) for k in COMPARED if k in theirs and k in ours}
    differing = [f"{k} is {a} there and {str(b).split('.')[-1]} here" for k, (a, b) in pairs.items() if a != b]
    if differing:
        raise UserError(f"training cannot begin from {folder}: {'; '.join(differing)}; give the same.")
    keys = [key.removeprefix(PEFT_PREFIX) for key in metadata_and_shapes(folder / PEFT_FILE)[1]]
    given = {found["layer"] for key in keys if (found := PART.fullmatch(key)) is not None}
    if given == layers.keys():
        return
    wanted = target_names(denoiser, given)
    say = f"--adapter.targets {','.join(wanted)}" if wanted else "an adapter of the layers that train"
    raise UserError(f"adapter.targets is {config.targets}, and {folder} has other layers; give {say}.")
