"""The memory of a model's weights and of what trains of it, from the headers of its files; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from difftuning_control.adapters.files import metadata_and_shapes
from difftuning_control.families.loading import base_dtype, family_class
from difftuning_control.pipelines.guiding import BY_CLASS
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.manifest import place_of
from difftuning_control.system.untrusted import from_json, read_text

QUANTISED = {"float8": 1.0, "int8": 1.0, "nf4": 0.5}  # bytes of a weight
STATE = {"adamw": 8, "adamw8bit": 2}  # bytes of the optimizer's state of a weight
OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "image_encoder")
SECOND = "unconditional_transformer"  # of Ideogram 4
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes, but for activations.

    Args:
        denoiser: its weights.
        others: of text encoders and autoencoder; under `model.offload` the encoders are in main memory.
        trained: how many weights train; None of a kind whose size only the loaded model tells.
        training: of these weights, their gradients and the optimizer.
    """

    denoiser: int
    others: int
    trained: int | None
    training: int

    @property
    def total(self) -> int:
        return self.denoiser + self.others + self.training


def memory_of(recipe: Recipe, pipeline: str) -> Memory | None:
    """What a run needs beside its activations; None where the model's files are not at hand.

    Args:
        pipeline: the class of the model's.
    """
    place = place_of(recipe.model.id)
    component = BY_CLASS[pipeline].component
    if place is None:
        return None
    shapes = _shapes(place / component, recipe.model.variant)
    if not shapes:
        return None
    width = base_dtype(recipe).itemsize
    count = _numbers(shapes.values())
    targets = family_class(recipe.model.id).lora_targets_by(from_json(read_text(place / component / "config.json")))
    trained = _trained(recipe, shapes, count, targets)
    kind = recipe.model.quantization
    of_denoiser = QUANTISED[kind] if kind is not None else width
    counts = {name: _numbers(_shapes(place / name, recipe.model.variant).values()) for name in (*OTHERS, SECOND)}
    return Memory(
        int(count * of_denoiser),
        width * sum(counts[name] for name in OTHERS) + int(of_denoiser * counts[SECOND]),
        trained,
        _training(recipe, trained or 0),
    )


def _training(recipe: Recipe, trained: int) -> int:
    """Weights in float32, gradients, and the optimizer's state; of all weights the first are the denoiser's own."""
    own = 0 if recipe.method == "full" else 4
    return trained * (own + 4 + STATE.get(recipe.training.optimizer, 8))


def _trained(recipe: Recipe, shapes: Shapes, count: int, targets: tuple[str, ...]) -> int | None:
    """How many weights train of a denoiser with tensors of these shapes."""
    if recipe.method == "full":
        return count
    adapter = recipe.adapter
    if recipe.method != "lora" or adapter.kind not in ("lora", "dora", "tlora") or adapter.text_encoder:
        return None
    named = [name.strip() for name in adapter.targets.split(",") if name.strip()]
    if adapter.targets == "auto":
        named = list(targets)
    trained = 0
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) > 1 and layer != name and any(layer == t or layer.endswith(f".{t}") for t in named):
            out, into = shape[0], math.prod(shape[1:])
            trained += adapter.full_rank * (out + into) + (out if adapter.kind == "dora" else 0)
    return trained


# --- files ----------------------------------------------------------------------------------------------------------


def _shapes(folder: Path, variant: str | None) -> Shapes:
    """The tensors of a component, by name."""
    files = sorted(folder.glob("*.safetensors"))
    named = [f for f in files if variant is not None and f".{variant}" in f.name]
    plain = [f for f in files if not any(f".{kind}" in f.name for kind in ("fp16", "bf16", "non_ema"))]
    shapes: Shapes = {}
    for file in named or plain or files:
        shapes |= metadata_and_shapes(file)[1]
    return shapes


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
