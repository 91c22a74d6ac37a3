"""LoRA on a DiT: diffusers has no methods for it on this model and no `load_lora_weights` on its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import LabelEmbedding
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.fingerprint import read_tensors, write_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
NAMES = "id2label"  # in the header of a LoRA with classes of its own, and in a pipeline's model_index.json


class TunableDiT(DiTTransformer2DModel, PeftAdapterMixin):
    """diffusers' DiT with the methods for adapters that its other transformers have."""

    labels_before: dict[str, int] | None = None  # of the pipeline, while a LoRA with classes of its own is on


TunableDiT.__name__ = DiTTransformer2DModel.__name__  # which is what `save_pretrained` writes down


class ClassTable(nn.Embedding):
    """Class embeddings that were made anew beside an adapter: where the adapter is off, the pretrained ones act."""

    pretrained: Tensor
    beside: tuple[Any]  # one of the adapter's layers; in a tuple, so that it does not count as a part of this one

    def forward(self, labels: Tensor) -> Tensor:
        (layer,) = self.beside
        acts = not layer.disable_adapters and any(name in layer.lora_A for name in layer.active_adapters)
        return F.embedding(labels, self.weight if acts else self.pretrained.to(self.weight.dtype))


def tables_of(transformer: Any) -> list[nn.Embedding]:
    """The class embeddings, one table a block: a row a class, the last one for none."""
    return [m.embedding_table for m in transformer.modules() if isinstance(m, LabelEmbedding)]


def follow_adapter(transformer: Any) -> list[ClassTable]:
    """Let the tables go on and off with the adapter on this transformer; what they hold now is the pretrained state."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next(m for m in transformer.modules() if isinstance(m, BaseTunerLayer))
    found: list[Any] = tables_of(transformer)
    for table in found:
        table.__class__ = ClassTable
        table.register_buffer("pretrained", table.weight.detach().clone(), persistent=False)
        table.beside = (layer,)
    return found


def _table_names(transformer: Any) -> list[str]:
    return [n for n, _ in transformer.named_parameters() if n.endswith("class_embedder.embedding_table.weight")]


def save_lora(pipe: Any, folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any], names: list[str]) -> None:
    """A file under diffusers' names, with the embeddings of new classes `names` in order, the null class last."""
    tensors = {PREFIX + name: tensor for name, tensor in layers.items()}
    settings = {PREFIX + name: value for name, value in metadata.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    if names:
        parameters = dict(pipe.transformer.named_parameters())
        for name in _table_names(pipe.transformer):
            table = parameters[name].data
            tensors[PREFIX + name] = torch.cat([table[: len(names)], table[-1:]]).float()
        header[NAMES] = json.dumps(names)
    write_tensors(folder / LORA_FILE, tensors, header)


def load_lora(pipe: Any, path: str | Path) -> None:
    """Put the LoRA of a finished run on a stock `DiTPipeline`, with its classes if it was given new ones.

    Args:
        path: the folder of the run, or its file.

    Raises:
        UserError: if there is no whole file, or it does not fit the model; the pipeline is then as it was.
    """
    place = Path(path)
    place = place / LORA_FILE if place.is_dir() else place
    tensors = read_tensors(place)
    if tensors is None:
        raise UserError(f"{path} holds no LoRA; expected a folder with {LORA_FILE}, whole, or the file itself.")
    if getattr(pipe.transformer, "peft_config", None):
        raise UserError(f"the pipeline has an adapter already, beside which {path} cannot be put; unload it first.")
    header = _header(place)
    transformer, metadata = pipe.transformer, json.loads(header.get("lora_adapter_metadata", "{}"))
    shapes = {n: p.shape for n, p in transformer.named_parameters()}
    rows = {n: tensors.pop(PREFIX + n) for n in _table_names(transformer) if PREFIX + n in tensors}
    names = json.loads(header[NAMES]) if NAMES in header else []
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        side = 1 if part.startswith("A") else 0
        if f"{layer}.weight" not in shapes or tensor.shape[side] != shapes[f"{layer}.weight"][side]:
            raise UserError(f"the LoRA {path} does not fit this model: {key} belongs to no layer of its size here.")
    fitting = [n for n, r in rows.items() if len(r) == len(names) + 1 <= shapes[n][0] and r.shape[1] == shapes[n][1]]
    if names and len(fitting) != len(tables_of(transformer)):
        raise UserError(f"the LoRA {path} does not fit this model: its {len(names)} classes have no place here.")
    transformer.__class__ = TunableDiT
    transformer.load_lora_adapter(tensors, prefix="transformer", metadata=metadata)
    if not names:
        return
    follow_adapter(transformer)
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, values in rows.items():
            parameters[name][: len(names)] = values[:-1].to(parameters[name])
            parameters[name][-1] = values[-1].to(parameters[name])
    transformer.labels_before, pipe.labels = pipe.labels, dict(sorted((name, i) for i, name in enumerate(names)))


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        raise UserError(f"{path} is damaged or no safetensors file; give a whole one.") from None


def unload_lora(pipe: Any) -> None:
    """Take the LoRA off again: weights, class embeddings and names are what they were."""
    tables: list[Any] = tables_of(pipe.transformer)
    for table in tables:
        if isinstance(table, ClassTable):
            table.weight.data = table.pretrained.to(table.weight.dtype)
            del table.pretrained, table.beside
            table.__class__ = nn.Embedding  # type: ignore[assignment]
    if pipe.transformer.labels_before is not None:
        pipe.labels, pipe.transformer.labels_before = pipe.transformer.labels_before, None
    pipe.transformer.unload_lora()
