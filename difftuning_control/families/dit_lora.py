"""LoRA on a DiT: diffusers has no methods for it on this model and no `load_lora_weights` on its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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
    """diffusers' DiT with the methods for adapters that its other transformers have.

    `others` are the class embeddings that do not act at the moment, of a model that was given new classes: without its
    adapter it is the pretrained model, with the embeddings that it had before.
    """

    others: list[Tensor] | None = None
    is_pretrained = False
    labels_before: dict[str, int] | None = None  # of the pipeline, while a LoRA with classes of its own is on

    def disable_adapters(self) -> None:
        super().disable_adapters()
        self._exchange(True)

    def enable_adapters(self) -> None:
        super().enable_adapters()
        self._exchange(False)

    def _exchange(self, pretrained: bool) -> None:
        if self.others is not None and pretrained != self.is_pretrained:
            for table, rows in zip(tables_of(self), self.others):
                table.weight.data, rows.data = rows.data, table.weight.data
            self.is_pretrained = pretrained


TunableDiT.__name__ = DiTTransformer2DModel.__name__  # which is what `save_pretrained` writes down


def tables_of(transformer: Any) -> list[nn.Embedding]:
    """The class embeddings, one table a block: a row a class, the last one for none."""
    return [m.embedding_table for m in transformer.modules() if isinstance(m, LabelEmbedding)]


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
    parameters = dict(transformer.named_parameters())
    transformer.others = [table.weight.detach().clone() for table in tables_of(transformer)]
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
    transformer = pipe.transformer
    if transformer.others is not None:
        transformer.disable_adapters()  # which puts the pretrained class embeddings back
        pipe.labels = transformer.labels_before
        transformer.others, transformer.is_pretrained, transformer.labels_before = None, False, None
    transformer.unload_lora()
