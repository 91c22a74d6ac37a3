"""Adapters on a DiT or PixArt, which diffusers has no methods for, and the embeddings of a DiT's new classes that train
beside them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import LabelEmbedding
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from difftuning_control.difffit import TrainedWhole
from difftuning_control.errors import UserError
from difftuning_control.system.tensors import read_tensors, write_tensors

WITHOUT_ADAPTERS = (DiTTransformer2DModel, PixArtTransformer2DModel)
CLASSES_FILE = "class_embeddings.safetensors"
NAMES = "id2label"  # in that file's header, and in a pipeline's model_index.json


@cache
def _tunable(kind: type) -> type:
    """A class with the methods for adapters that diffusers' other transformers have; saved under its own name."""
    return type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})


if TYPE_CHECKING:
    TunableDiT = DiTTransformer2DModel
else:
    TunableDiT = _tunable(DiTTransformer2DModel)


def make_tunable(transformer: Any) -> None:
    """Give a DiT or PixArt these methods; it stays the same object."""
    if isinstance(transformer, WITHOUT_ADAPTERS) and not isinstance(transformer, PeftAdapterMixin):
        transformer.__class__ = _tunable(type(transformer))


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


def unknown(table: Tensor, count: int) -> Tensor:
    """A table of class embeddings that does not know the first `count` classes: each of them is the null class."""
    return torch.cat([table[-1:].expand(count, -1), table[count:]])


class NewClasses(TrainedWhole):
    """The class embeddings of a pipeline that an adapter brought with it, and the pretrained ones, which do not know
    the new classes: where the pretrained model answers, as in a hand-over, it is told the null class.

    Raises:
        UserError: if they have no place in this model.
    """

    def __init__(self, pipe: Any, path: Path, name: str, strength: float):
        names, rows = _read(path)
        tables = tables_of(pipe.transformer) if isinstance(pipe.transformer, DiTTransformer2DModel) else {}
        for key in tables.keys() | rows.keys():
            if key not in tables or key not in rows or rows[key].shape[1] != tables[key].shape[1] or not (
                len(rows[key]) == len(names) + 1 <= len(tables[key])
            ):  # fmt: skip
                raise UserError(f"{path} does not fit this model: its {len(names)} classes have no place in {key}.")
        super().__init__(tables, name, {key: unknown(table.detach(), len(names)) for key, table in tables.items()})
        self.pipe, self.labels = pipe, pipe.labels
        values = {key: table.detach().clone() for key, table in tables.items()}
        for key, value in values.items():
            value[: len(names)], value[-1] = rows[key][:-1], rows[key][-1]
        self.set(values, strength)
        pipe.labels = dict(sorted((label, i) for i, label in enumerate(names)))

    def remove(self) -> None:
        """Leave embeddings and names as they were, bit for bit."""
        super().remove()
        self.pipe.labels = self.labels


def _read(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {})[NAMES])
    except (OSError, SafetensorError, KeyError, ValueError):
        raise UserError(f"{path} is damaged, or its header names no classes; give a whole one.") from None
    return names, read_tensors(path) or {}
