"""Rows of a batch: bank rows beside target rows in whatever a model is told, and checks that all parts agree."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Bank(Protocol):
    """Latents of the pretrained model's own samples: a `KnowledgeBank`, a tensor (N, C, h, w), or a class of yours.

    `bank[items]` gives the latents of the items (n,) long, each from 0 to len(bank) − 1, as (n, C, h, w).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, items: Tensor) -> Tensor: ...


def rows_of_share(batch_size: int, share: float) -> int:
    """A share of a batch in whole rows, rounded down: 29 of 100 for 0.29, which is a little less as a float."""
    return math.floor(round(batch_size * share, 9))


def check_roles(is_retention: Tensor) -> None:
    """Refuse what does not say of each row whether it is of the bank.

    Raises:
        ValueError: unless it is (B,) bool.
    """
    if is_retention.dtype != torch.bool or is_retention.ndim != 1:
        given = f"{tuple(is_retention.shape)} {is_retention.dtype}"
        raise ValueError(f"is_retention is {given}; expected (B,) torch.bool.")


def check_one_a_row(is_retention: Tensor, **parts: Tensor) -> None:
    """Refuse parts that do not have one number a row.

    Raises:
        ValueError: unless `is_retention` is (B,) bool and each part (B,).
    """
    check_roles(is_retention)
    for name, part in parts.items():
        if part.shape != is_retention.shape:
            hint = " of the losses of single rows: take reduction='none' and the mean over all but the first dimension"
            raise ValueError(
                f"{name} is {tuple(part.shape)}, is_retention {tuple(is_retention.shape)}; expected one number a row"
                f"{hint if 'loss' in name else ''}."
            )


def check_same_shape(**parts: Tensor) -> None:
    """Refuse tensors of different shapes, which would be broadcast to a wrong result.

    Raises:
        ValueError: with all shapes.
    """
    if len({part.shape for part in parts.values()}) > 1:
        shapes = ", ".join(f"{name} is {tuple(part.shape)}" for name, part in parts.items())
        raise ValueError(f"{shapes}; expected one shape.")


def moved(values: Tensor, like: Tensor) -> Tensor:
    """Values on the device of another tensor; nobody waits for the copy from the CPU to a GPU. Apple's would read
    memory that others have by then."""
    return values.to(like.device, non_blocking=values.device.type == "cpu" and like.device.type == "cuda")


def sums_by_role(values: Tensor, is_retention: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of values (B,) over target rows and over bank rows; how many there are of each is not asked."""
    banks, none = moved(is_retention, values), torch.zeros((), dtype=values.dtype, device=values.device)
    return torch.where(banks, none, values).sum(), torch.where(banks, values, none).sum()


def draw_items(bank: Bank, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Numbers of `count` items of the bank, drawn with replacement, (count,) long on the CPU.

    Raises:
        ValueError: if the bank is empty.
    """
    if len(bank) == 0:
        raise ValueError("the bank has no items; expected at least one.")
    device = generator.device if generator is not None else None
    return torch.randint(len(bank), (count,), generator=generator, device=device).cpu()


def bank_latents(bank: Bank, items: Tensor, latents: Tensor) -> Tensor:
    """The latents of the items, as the latents of the batch are: its shape after the first dimension, dtype and device.

    Raises:
        ValueError: if the bank gives another number of rows, or rows of another shape.
    """
    rows = bank[items]
    if rows.shape != (len(items), *latents.shape[1:]):
        raise ValueError(
            f"for {len(items)} items the bank gives latents {tuple(rows.shape)}, the batch's are "
            f"{tuple(latents.shape)}; expected {(len(items), *latents.shape[1:])}, so a bank drawn from the model that "
            "trains, at the batch's resolution."
        )
    return rows.to(latents)


def extend_rows(value: Any, extra: Any, is_retention: Tensor, *, pad: bool = False, name: str = "value") -> Any:
    """What a model is told of target rows, extended with what it is told of bank rows.

    Args:
        value: of the target rows, in their order: a tensor (B, …), a list with one entry a row, None, or a dict or
            tuple of such values, nested as deep as needed.
        extra: of the bank rows, built like `value`; each tensor or list has one row for all bank rows, such as the
            empty prompt's, or one a bank row.
        is_retention: whether each row of the result is of the bank, (B + n,) bool.
        pad: where tensors of `value` and `extra` differ in their second dimension, fill the shorter with zeros at its
            end. The model then needs a mask, extended in the same way; a None beside such tensors, which stands for a
            mask of ones, is refused.
        name: what errors call the value.

    Returns:
        the same structure with B + n rows; tensors have the dtype and device of `value`.

    Raises:
        ValueError: if a part does not have the rows that `is_retention` says, or the two differ in structure or shape.
    """
    check_roles(is_retention)
    if value is None and extra is None:
        return None
    if isinstance(value, dict) and isinstance(extra, dict):
        if value.keys() != extra.keys():
            raise ValueError(
                f"{name} has {', '.join(map(repr, value))}, what is added for bank rows {', '.join(map(repr, extra))}; "
                "expected the same names."
            )
        pairs = {key: (value[key], extra[key]) for key in value}
        _check_masked(list(pairs.values()), pad, name)
        return {k: extend_rows(v, e, is_retention, pad=pad, name=f"{name}[{k!r}]") for k, (v, e) in pairs.items()}
    if isinstance(value, tuple) and isinstance(extra, tuple):
        if len(value) != len(extra):
            raise ValueError(
                f"{name} has {len(value)} values, what is added for bank rows {len(extra)}; expected as many."
            )
        _check_masked(list(zip(value, extra)), pad, name)
        return tuple(
            extend_rows(v, e, is_retention, pad=pad, name=f"{name}[{i}]") for i, (v, e) in enumerate(zip(value, extra))
        )
    lists = isinstance(value, list) and isinstance(extra, list)
    if not lists and not (isinstance(value, Tensor) and isinstance(extra, Tensor)):
        kinds = f"{type(value).__name__}, what is added for bank rows a {type(extra).__name__}"
        raise ValueError(f"{name} is a {kinds}; expected two tensors, lists (an entry a row), tuples or dicts.")
    _check_counts(value, extra, is_retention, name)
    places = _places(is_retention)
    if isinstance(value, list):
        banks = int(is_retention.sum())
        joined = value + (extra * banks if len(extra) == 1 else extra[:banks])
        _check_entries(joined, name)
        return [joined[i] for i in places.tolist()]
    return _extend_tensor(value, extra, is_retention, pad, name)[places.to(value.device)]


def _check_masked(pairs: list[tuple[Any, Any]], pad: bool, name: str) -> None:
    """Refuse embeddings that would be padded where a None may stand for their mask: none of their lengths is there."""
    tensors = [(v, e) for v, e in pairs if isinstance(v, Tensor) and isinstance(e, Tensor) and min(v.ndim, e.ndim) > 1]
    padded = {(v.shape[1], e.shape[1]) for v, e in tensors if v.ndim > 2 and v.shape[1] != e.shape[1]}
    masks = {(v.shape[1], e.shape[1]) for v, e in tensors if v.ndim == 2}
    if pad and padded - masks and any(v is None or e is None for v, e in pairs):
        raise ValueError(
            f"{name} has None beside embeddings of other lengths; where None stands for a mask of ones, make it first: "
            "embeds.new_ones(embeds.shape[:2], dtype=torch.long)."
        )


def _places(is_retention: Tensor) -> Tensor:
    """Where each row of the result is among first the target rows and then the bank rows, (B + n,) long."""
    return is_retention.to(torch.uint8).argsort(stable=True).argsort()


def _check_counts(value: Any, extra: Any, is_retention: Tensor, name: str) -> None:
    banks = int(is_retention.sum())
    targets = len(is_retention) - banks
    for part, what in ((value, name), (extra, f"what is added to {name} for bank rows")):
        if isinstance(part, Tensor) and part.ndim == 0:
            raise ValueError(f"{what} is a single number; expected a tensor whose first dimension is the rows.")
    if len(value) != targets:
        grown = (
            " Where it is made before the loop and overwritten in it, it grows at every step: keep what was made under "
            "another name, and extend that."
        )
        raise ValueError(
            f"{name} has {len(value)} rows, but the batch has {targets} target rows (and {banks} of the bank); "
            f"expected one a target row.{grown if len(value) > targets else ''}"
        )
    if banks and len(extra) not in (1, banks):
        raise ValueError(
            f"what is added to {name} for bank rows has {len(extra)} rows, but the batch has {banks} bank rows; "
            f"expected 1 for all of them{f', or {banks}' if banks > 1 else ''}."
        )


def _check_entries(entries: list[Any], name: str) -> None:
    """Tensors in a list may differ in their first dimension alone, the number of tokens."""
    shapes = {tuple(entry.shape[1:]) if isinstance(entry, Tensor) else type(entry).__name__ for entry in entries}
    if len(shapes) > 1:
        given = " and ".join(str(s) for s in sorted(shapes, key=str))
        raise ValueError(f"{name} has entries of the shapes (tokens, …) {given}; expected one shape after the tokens.")


def _extend_tensor(value: Tensor, extra: Tensor, is_retention: Tensor, pad: bool, name: str) -> Tensor:
    """First the target rows, then the bank rows."""
    if extra.is_floating_point() and not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}, what is added for bank rows {extra.dtype}; expected whole numbers.")
    if pad and value.ndim > 1 and extra.ndim > 1:
        longest = max(value.shape[1], extra.shape[1])
        value, extra = (_lengthened(part, longest) for part in (value, extra))
    if value.shape[1:] != extra.shape[1:]:
        longer = value.shape[2:] == extra.shape[2:] and value.ndim == extra.ndim > 1
        advice = "pad=True fills the shorter with zeros, which a mask must cover" if longer else "expected one shape"
        raise ValueError(
            f"a row of {name} is {tuple(value.shape[1:])}, what is added for bank rows {tuple(extra.shape[1:])}; "
            f"{advice}."
        )
    banks = int(is_retention.sum())
    rows = extra.to(value)
    return torch.cat([value, rows.expand(banks, *rows.shape[1:]) if len(rows) == 1 else rows[:banks]])


def _lengthened(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1]))
