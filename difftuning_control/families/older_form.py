"""Saved pipelines in the form that every transformers reads: vocabularies of CLIP tokenizers, names of CLIP weights,
and the precision that a text encoder is loaded in.

Transformers 5 reads both forms and saves its own alone. Transformers 4 does not find the vocabulary in that, and loads
nothing of a text encoder: it begins with random weights, and only logs that.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from difftuning_control.errors import UserError
from difftuning_control.system.tensors import write_tensors

CLIP = "CLIPTextModel"  # and not the one with a projection, whose names are the same everywhere
INSIDE = "text_model."  # in which transformers 4 has all of its weights


def write_older_form(pipeline: Path) -> None:
    """Make the CLIP tokenizers and text encoders of a saved pipeline readable by every transformers.

    Without a dtype, diffusers loads in float32 and transformers 5 in what the configuration names: a pipeline that was
    saved in half precision would come in two, and not draw. So the configurations name float32.
    """
    for config in sorted(pipeline.glob("text_encoder*/config.json")):
        values = _json(config)
        named = {key: "float32" for key in ("dtype", "torch_dtype") if key in values}
        config.write_text(json.dumps(values | named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in sorted(pipeline.glob("tokenizer*/tokenizer.json")):
        if _json(file.parent / "tokenizer_config.json").get("tokenizer_class") == "CLIPTokenizer":
            _write_vocabulary(file)
    for config in sorted(pipeline.glob("text_encoder*/config.json")):
        if _json(config).get("architectures") == [CLIP]:
            for file in sorted(config.parent.glob("*.safetensors")):
                _rename(file)


def refuse_newer_form(pipe: Any, model: str) -> None:
    """Refuse a pipeline of which the transformers that is installed has not loaded a text encoder.

    Raises:
        UserError: naming the version that it needs.
    """
    for name, part in pipe.components.items():
        if type(part).__name__ != CLIP or not any(key.startswith(INSIDE) for key in part.state_dict()):
            continue
        for file in Path(part.name_or_path).glob("*.safetensors"):
            if not any(key.startswith(INSIDE) for key in _names(file)):
                raise UserError(
                    f"the {name} of {model} was saved by transformers 5, and transformers {version('transformers')} "
                    "cannot load it; install transformers 5 or newer, or export the model again with this package."
                )


def _write_vocabulary(file: Path) -> None:
    """`vocab.json` and `merges.txt` beside a `tokenizer.json`."""
    model = _json(file)["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (file.parent / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _rename(file: Path) -> None:
    """Put the tensors of a file into the module that transformers 4 has them in."""
    names = _names(file)
    if any(name.startswith(INSIDE) for name in names):
        return
    with safe_open(file, "pt") as tensors:
        metadata, renamed = tensors.metadata(), {f"{INSIDE}{name}": tensors.get_tensor(name) for name in names}
    write_tensors(file, renamed, metadata)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
