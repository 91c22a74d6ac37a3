"""Prompt embeddings on disk, keyed by the prompts and by the text encoders' weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftuning_control.data.latents import SHARD, Advance
from difftuning_control.families.prompts import PromptEmbeddings
from difftuning_control.system.digests import digest_of
from difftuning_control.system.processes import ALONE, Share, files_together

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def cached_embeddings(
    family: Family,
    prompts: list[str],
    folder: Path,
    advance: Advance,
    share: Share = ALONE,
) -> PromptEmbeddings:
    """Embeddings of the different prompts and of the empty one, from the cache where it has them.

    Tokens instead, and no cache, where the family encodes them in the step.
    """
    unique = ["", *dict.fromkeys(p for p in prompts if p)]
    if family.encodes_in_step:
        advance(len(unique))
        return PromptEmbeddings({p: i for i, p in enumerate(unique)}, family.tokenize(unique))
    parts = [unique[start : start + SHARD] for start in range(0, len(unique), SHARD)]
    keys = [digest_of([part, family.conditioning_fingerprint]) for part in parts]
    files = files_together(
        [folder / f"prompts-{key}.safetensors" for key in keys],
        lambda i: _encode_prompts(family, parts[i], advance),
        share,
        lambda i: advance(len(parts[i])),
    )
    tensors = {name: files.rows(name) for name in files.names}
    embeddings = PromptEmbeddings({p: i for i, p in enumerate(unique)}, tensors)
    family.remember(embeddings)
    return embeddings


def _encode_prompts(family: Family, prompts: list[str], advance: Advance) -> dict[str, Tensor]:
    parts, batch_size = [], family.prompts_at_once
    with family.encoding():
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            parts.append({k: v.cpu() for k, v in family.encode_prompts(chunk).items()})
            advance(len(chunk))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
