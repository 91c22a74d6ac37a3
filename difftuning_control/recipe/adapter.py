"""The section of a recipe that says which adapter trains."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from difftuning_control.errors import UserError, need
from difftuning_control.recipe.adapter_kinds import KINDS, Kind

DEFAULT_RANK = 16


@dataclass
class AdapterConfig:
    """What is trained with method lora, or with method controlnet where `on` is controlnet.

    Args:
        kind: what trains: lora, dora, tlora (a LoRA whose rank falls as the noise rises), loha, lokr, oft, boft, ia3,
            or difffit (biases, norms and scale factors).
        on: what it trains on: denoiser, or controlnet (kind lora).
        rank: rank r of the update; when empty 16 for lora, dora, tlora and loha, while the second factor of lokr trains
            whole. [≥ 1]
        min_rank: rank of tlora at pure noise, at most rank; half of rank when empty. [≥ 1]
        alpha: the update is scaled by alpha / rank; equal to rank when empty. [> 0]
        targets: modules that are tuned: auto (the attention projections), or their names separated by commas.
        dropout: probability of dropout on the adapter's input, of lora and dora. [share, ≥ 0 and < 1]
        rslora: scale by alpha / √rank instead, of lora and dora.
        init: how lora and tlora start: gaussian, pissa (lora only: the weight's largest singular vectors) or orthogonal
            (an even rank); when empty gaussian of lora, orthogonal of tlora.
        factor: side of the first Kronecker factor of lokr at most; as square as can be when empty. [≥ 2]
        block_size: side of the rotations; when empty 32 of oft and 4 of boft. [≥ 2]
        text_encoder: also train a LoRA on the text encoder, of lora and dora (Stable Diffusion 1.x and 2.x).
        text_encoder_learning_rate: learning rate of the text encoder; that of the denoiser when empty. [> 0]
    """

    kind: Kind = "lora"
    on: Literal["denoiser", "controlnet"] = "denoiser"
    rank: int | None = None
    min_rank: int | None = None
    alpha: float | None = None
    targets: str = "auto"
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["gaussian", "pissa", "orthogonal"] | None = None
    factor: int | None = None
    block_size: int | None = None
    text_encoder: bool = False
    text_encoder_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        need(self.rank is None or self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        need(self.alpha is None or 0 < self.alpha < math.inf, "adapter.alpha", self.alpha, "a finite number above 0")
        need(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "at least 0 and below 1")
        need(self.factor is None or self.factor >= 2, "adapter.factor", self.factor, "at least 2")
        need(self.block_size is None or self.block_size >= 2, "adapter.block_size", self.block_size, "at least 2")
        rate = self.text_encoder_learning_rate
        need(rate is None or 0 < rate < math.inf, "adapter.text_encoder_learning_rate", rate, "a number above 0")
        if self.kind == "tlora":
            need(1 <= self.lowest_rank <= self.full_rank, "adapter.min_rank", self.lowest_rank, "1 to adapter.rank")
        if self.kind == "lokr" and self.alpha is not None and self.rank is None:
            raise UserError(
                "adapter.alpha is given, but a lokr without adapter.rank is not scaled; give both or neither."
            )
        if self.init == "pissa" and self.kind == "tlora":
            raise UserError("adapter.init is pissa, but a tlora starts gaussian or orthogonal; leave it out.")
        if self.init == "pissa" and self.dropout > 0:
            raise UserError("adapter.dropout is given, but a lora with init pissa starts away from 0; leave one out.")
        if self.init == "orthogonal" and self.kind == "lora":
            need(self.full_rank % 2 == 0, "adapter.rank", self.full_rank, "an even number for init orthogonal")
        if rate is not None and not self.text_encoder:
            raise UserError("adapter.text_encoder_learning_rate is given, but adapter.text_encoder is false.")
        if self.on == "controlnet" and (self.kind != "lora" or self.text_encoder):
            given = "adapter.text_encoder" if self.kind == "lora" else f"adapter.kind {self.kind}"
            raise UserError(f"{given} is given for a ControlNet, which trains whole or by a lora alone; leave it out.")

    def _check_options(self) -> None:
        """Refuse options that this kind has no use for."""
        for entry in dataclasses.fields(self):
            if entry.name in ("kind", "on") or getattr(self, entry.name) == entry.default:
                continue
            takes = KINDS[self.kind].options
            if entry.name not in takes:
                said = f"takes only {', '.join(takes)}" if takes else "has no settings"
                raise UserError(f"adapter.{entry.name} is given, but kind {self.kind} {said}; leave it out.")

    @property
    def full_rank(self) -> int:
        """The rank where one is needed."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def lowest_rank(self) -> int:
        """The rank of a tlora at pure noise."""
        return max(1, self.full_rank // 2) if self.min_rank is None else self.min_rank
