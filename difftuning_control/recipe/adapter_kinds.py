"""The table of adapter kinds: what each is called, which settings it takes, and what it can do.

A new kind is its word and its row here, and how it is put on a model in `adapters/kinds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["lora", "dora", "tlora", "loha", "lokr", "oft", "boft", "ia3", "difffit"]


@dataclass(frozen=True)
class KindFacts:
    """What is true of one kind of adapter.

    Args:
        title: its name in sentences.
        options: the keys of the recipe's section `adapter` that it takes.
        peft: the name of peft's configuration class without `Config`; None for a kind that is not peft's.
        is_lora: whether it is saved as a LoRA file in diffusers' format.
        loads_in_diffusers: whether `load_lora_weights` loads it as it was trained.
        on_quantised: whether it trains on a quantised base.
        is_scalable: whether it can be had at a strength other than 1.
        unfusable: why no weights can hold it, as a verb phrase; None for kinds that can be fused.
        block_size: the side of its rotations where the recipe gives none; 0 for kinds without rotations.
    """

    title: str
    options: tuple[str, ...]
    peft: str | None = "Lora"
    is_lora: bool = False
    loads_in_diffusers: bool = False
    on_quantised: bool = False
    is_scalable: bool = True
    unfusable: str | None = None
    block_size: int = 0


_LORA = ("rank", "alpha", "targets", "dropout", "rslora")
_TEXT = ("text_encoder", "text_encoder_learning_rate")
KINDS: dict[Kind, KindFacts] = {
    "lora": KindFacts("LoRA", (*_LORA, "init", *_TEXT), is_lora=True, loads_in_diffusers=True, on_quantised=True),
    "dora": KindFacts("DoRA", (*_LORA, *_TEXT), is_lora=True, loads_in_diffusers=True, is_scalable=False),
    "tlora": KindFacts(
        "T-LoRA",
        ("rank", "min_rank", "alpha", "targets", "init"),
        is_lora=True,
        on_quantised=True,
        unfusable="acts by the noise level",
    ),
    "loha": KindFacts("LoHa", ("rank", "alpha", "targets"), "LoHa"),
    "lokr": KindFacts("LoKr", ("rank", "alpha", "targets", "factor"), "LoKr"),
    "oft": KindFacts("OFT", ("block_size", "targets"), "OFT", is_scalable=False, block_size=32),
    "boft": KindFacts("BOFT", ("block_size", "targets"), "BOFT", is_scalable=False, block_size=4),
    "ia3": KindFacts("IA3", ("targets",), "IA3", is_scalable=False),
    "difffit": KindFacts("DiffFit", (), None, unfusable="scales outputs, not weights"),
}
LORA_KINDS = tuple(kind for kind, facts in KINDS.items() if facts.is_lora)
assert tuple(KINDS) == get_args(Kind), "a kind without a row, or a row without its word"


def kind_of_peft(peft_type: str) -> Kind:
    """The kind that peft's `peft_type` stands for, the first in the table of those that share it."""
    return next(kind for kind, facts in KINDS.items() if (facts.peft or "").upper() == peft_type)
