"""The embeddings of new classes of a class-conditional model, trained whole beside an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.adapters.files import read_adapter
from difftuning_control.errors import UserError
from difftuning_control.families.tunable import NAMES, tables_of, unknown
from difftuning_control.system.tensors import refuse_unreadable


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
            if (
                key not in tables
                or key not in rows
                or rows[key].shape[1] != tables[key].shape[1]
                or not (len(rows[key]) == len(names) + 1 <= len(tables[key]))
            ):
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
    refuse_unreadable(path)
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {})[NAMES])
    except (OSError, SafetensorError, KeyError, ValueError):
        raise UserError(f"{path} is damaged, or its header names no classes; give a whole one.") from None
    return names, read_adapter(path)
