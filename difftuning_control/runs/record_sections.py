"""The sections of a run's record: its inputs, its changes, and what was measured on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from difftuning_control.system.sections import Section, dict_of

KEPT, ANEW = "kept", "anew"  # what became of the optimizer's state


@dataclass(kw_only=True)
class Change(Section):
    """A change of length or learning rate, made when a run was resumed.

    Args:
        step: after which it holds.
        identity: of the run before it.
        keys: what changed, by the recipe's dotted key with both values.
        optimizer: whether its state was kept, or began anew.
    """

    step: int = 0
    identity: str = ""
    keys: dict[str, list[Any]] = field(default_factory=dict)
    optimizer: str = KEPT


@dataclass(kw_only=True)
class Fingerprints(Section):
    """Digests of what decides the weights beside the recipe.

    Args:
        base: of each component of the pretrained model.
        control: how conditions are made.
        controlnet: the ControlNet that training started from.
        data: the pictures and captions to tune on.
        held_out: those that were held out.
        probe: the conditions that fidelity is measured on, where they decide when the run ends.
        bank: the knowledge bank; None without one.
        begin: the weights that training began from.
    """

    SOMETIMES: ClassVar = ("control", "controlnet", "probe", "begin")

    base: dict[str, str] = field(default_factory=dict)
    control: str | None = None
    controlnet: str | None = None
    data: str | None = None
    held_out: str | None = None
    probe: str | None = None
    bank: str | None = None
    begin: str | None = None


@dataclass(kw_only=True)
class DataRecord(Section):
    """The pictures of a run.

    Args:
        pictures: how many were tuned on; `streamed` of a stream.
        held_out: how many were held out; None in earlier records.
        skipped: pictures that could not be used, with the reason.
        ignored_files: how many files beside them are none.
        resolution: side of a square, or of the area that a bucket has, in pixels.
        buckets: how pictures of other shapes were framed, as `buckets.describe` gives it; None where all are squares.
        local: places, as the recipe names them, that were folders; earlier records: none.
        notes: what was said of a stream.
    """

    SOMETIMES: ClassVar = ("notes",)

    pictures: int | str = 0
    held_out: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    ignored_files: int = 0
    resolution: int = 0
    buckets: dict[str, Any] | None = None
    local: list[str] = field(default_factory=list)
    notes: list[str] | None = None


@dataclass(kw_only=True)
class BankRecord(Section):
    """The knowledge bank of a run.

    Args:
        items: how many samples are trained on.
        size: how many it has, with those that only validation sees; None in earlier records, and of real pictures.
        folder: where it lies.
        pictures: whether it is a folder of real pictures; earlier versions had none of these.
    """

    items: int = 0
    size: int | None = None
    folder: str = ""
    pictures: bool = False


@dataclass(kw_only=True)
class ControlRecord(Section):
    """What a ControlNet was taught.

    Args:
        classes: diffusers' names of the ControlNet and of its pipeline.
        argument: of the pipeline's call, that takes the condition.
        spec: how conditions are made, as a `ControlSpec` is saved.
        blank: names of pictures on which the annotator found nothing.
    """

    classes: list[str] = field(default_factory=list)
    argument: str = "image"
    spec: dict[str, Any] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)

    @property
    def annotator(self) -> str | None:
        return self.spec.get("annotator")


@dataclass(kw_only=True)
class Source(Section):
    """Files that were read of a model, of a schedule, or of weights to begin from.

    Args:
        id: the place, or the name on the Hub.
        revision: the commit of a model of the Hub.
        files: the SHA-256 of each, by name; None where they could not be found.
    """

    id: str = ""
    revision: str | None = None
    files: dict[str, str] | None = None


@dataclass(kw_only=True)
class BudgetRecord(Section):
    """How a forgetting budget was kept, by noise band, on bank samples that were held out.

    Args:
        u: centres of the bands.
        allowed: the rise of the loss that was allowed.
        rise: the rise that was measured.
        kept: whether it is within the budget.
        multipliers: of the bank rows, at the end.
    """

    u: list[float] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)
    rise: list[float] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class Frozen(Section):
    """Digests of the denoiser before and after a ControlNet was trained beside it, which are one."""

    denoiser_before: str = ""
    denoiser_after: str = ""


@dataclass(kw_only=True)
class PhaseCost(Section):
    """What one phase of a run took.

    Args:
        seconds: without those of phases within it.
        forwards: rows that went through the denoiser.
    """

    seconds: float = 0.0
    forwards: int = 0


PhaseCosts: TypeAlias = dict[str, PhaseCost]  # by phase, in the order of `training/phases.py`

read_phases = dict_of(PhaseCost)  # of what a JSON file holds


@dataclass(kw_only=True)
class Timings(Section):
    """Seconds of all sessions: of the phases load, encode, bank and analysis, and of all others; None where a record
    does not say."""

    preparation: float | None = None
    training: float | None = None
