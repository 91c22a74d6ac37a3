"""diffusers' models without adapter support (DiT, PixArt, ControlNets before 0.37), extended to take peft's."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders import peft as diffusers_peft
from diffusers.models.embeddings import LabelEmbedding
from safetensors import safe_open
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.system.tensors import read_tensors, write_tensors

WITHOUT_ADAPTERS = (DiTTransformer2DModel, PixArtTransformer2DModel, ControlNetModel)
CLASSES_FILE = "class_embeddings.safetensors"
NAMES = "id2label"  # in that file's header, and in a pipeline's model_index.json
scales_of: Any = diffusers_peft._SET_ADAPTER_SCALE_FN_MAPPING
for _kind in WITHOUT_ADAPTERS:  # as every transformer is there from diffusers 0.36 on: no strength of its own per block
    scales_of.setdefault(_kind.__name__, lambda model, weights: weights)


@cache
def _tunable(kind: type) -> type:
    """A class with the methods for adapters that diffusers' other transformers have; saved under its own name."""
    return type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})


if TYPE_CHECKING:
    TunableDiT = DiTTransformer2DModel
else:
    TunableDiT = _tunable(DiTTransformer2DModel)


def make_tunable(model: Any) -> None:
    """Give a model of these classes the methods; it stays the same object."""
    if isinstance(model, WITHOUT_ADAPTERS) and not isinstance(model, PeftAdapterMixin):
        model.__class__ = _tunable(type(model))


def save_transformer_lora(folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """As diffusers writes it for its other transformers; `load_adapter` puts it on a pipeline."""
    tensors = {f"transformer.{name}": tensor for name, tensor in layers.items()}
    settings = {f"transformer.{name}": value for name, value in metadata.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, header)


def tables_of(transformer: Any) -> dict[str, nn.Parameter]:
    """The class embeddings by name, one table a block: a row a class, the last one for none."""
    names = [f"{n}.embedding_table.weight" for n, m in transformer.named_modules() if isinstance(m, LabelEmbedding)]
    return {name: transformer.get_parameter(name) for name in names}


def save_classes(transformer: Any, folder: Path, names: list[str]) -> None:
    """The embeddings of new classes in order, and of the null class last, under the transformer's own names."""
    rows = {key: torch.cat([t.data[: len(names)], t.data[-1:]]).float() for key, t in tables_of(transformer).items()}
    write_tensors(folder / CLASSES_FILE, rows, {NAMES: json.dumps(names)})


@torch.no_grad()
def load_classes(transformer: Any, folder: Path, names: list[str]) -> None:
    """What `save_classes` wrote, into the embeddings of a label space of the same classes in the same order.

    Raises:
        UserError: if they are others.
    """
    path = folder / CLASSES_FILE
    rows = read_tensors(path)
    if rows is None:
        raise UserError(f"there is no whole {path}, the embeddings of the new classes to begin from; give another run.")
    with safe_open(path, "pt") as file:
        known = json.loads((file.metadata() or {}).get(NAMES, "[]"))
    if known != names:
        raise UserError(
            f"the classes of {folder} are {', '.join(known)}, and here they are {', '.join(names)}; give the same, in "
            "the same order."
        )
    for key, table in tables_of(transformer).items():
        table[: len(names)].copy_(rows[key][:-1])
        table[-1].copy_(rows[key][-1])


def unknown(table: Tensor, count: int) -> Tensor:
    """A table of class embeddings that does not know the first `count` classes: each of them is the null class."""
    return torch.cat([table[-1:].expand(count, -1), table[count:]])
