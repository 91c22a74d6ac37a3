"""What a pipeline adds to its stock class: the settings of drop-ins and of `attach`, checked, and as they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.pipelines.control_strength import ControlUse
from difftuning_control.pipelines.strength import Strength, as_strength, check_u, stored

UNCHANGED: Any = object()


@dataclass(frozen=True)
class Extras:
    """What a pipeline adds to its stock class.

    Args:
        domain_guidance: the unconditional branch of guidance comes from the pretrained model.
        unconditional_strength: in [0, 1]; the tuned adapters' strength in that branch, 0 for the pretrained model and 1
            for ordinary guidance.
        tuned_adapters: names of the adapters that were tuned, in the pipeline; the only one that acts when None.
        adapter_schedule: strength of these adapters over u.
        hand_over: u₀ in [0, 1]; at u ≤ u₀ the pretrained model goes on.
        control_schedule: strength over u of each ControlNet, on top of the call's scales; None for full strength.

    Raises:
        UserError: for a value of another kind or out of its range.
    """

    domain_guidance: bool = False
    unconditional_strength: float = 0.0
    tuned_adapters: tuple[str, ...] | None = None
    adapter_schedule: Strength | None = None
    hand_over: float | None = None
    control_schedule: tuple[Strength | None, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.domain_guidance, bool):
            raise UserError(f"domain_guidance is {self.domain_guidance!r}; expected True or False.")
        check_u(self.unconditional_strength, "unconditional_strength")
        if self.unconditional_strength > 0 and not self.domain_guidance:
            raise UserError(
                "unconditional_strength says how much of the adapter acts in the unconditional branch under "
                "domain_guidance, which is False; give domain_guidance=True, or unconditional_strength=None."
            )
        if self.hand_over is not None:
            check_u(self.hand_over, "hand_over")
        if self.tuned_adapters is not None and not (
            self.tuned_adapters and all(isinstance(n, str) and n for n in self.tuned_adapters)
        ):
            raise UserError(f"tuned_adapters is {self.tuned_adapters!r}; expected names of adapters, or None.")

    @property
    def acts_on_weights(self) -> bool:
        """Whether the denoiser runs with other weights than it has."""
        return self.domain_guidance or self.adapter_schedule is not None or self.hand_over is not None

    @property
    def changes_by_step(self) -> bool:
        """Whether it runs with others at one step than at another."""
        return self.adapter_schedule is not None or self.hand_over is not None

    @property
    def step_setting(self) -> str:
        """The setting by which it does, for sentences."""
        return "adapter_schedule" if self.hand_over is None else "hand_over"

    @property
    def is_active(self) -> bool:
        return self.acts_on_weights or self.control_schedule is not None

    @property
    def strengths(self) -> list[Strength]:
        """Every schedule."""
        return [s for s in (self.adapter_schedule, *(self.control_schedule or ())) if s is not None]

    def changed(self, nets: int = 0, **given: Any) -> Extras:
        """Other settings, with those that are given, as users write them; `UNCHANGED` ones are left.

        Args:
            nets: how many ControlNets the pipeline has.

        Raises:
            UserError: for a value of another kind or out of its range.
        """
        changes = {name: value for name, value in given.items() if value is not UNCHANGED}
        if changes.get("domain_guidance", UNCHANGED) is None:
            del changes["domain_guidance"]
        if (strength := changes.get("unconditional_strength", UNCHANGED)) is None:
            changes["unconditional_strength"] = 0.0
        elif strength is not UNCHANGED:
            changes.setdefault("domain_guidance", True)  # who names its strength wants it
        elif changes.get("domain_guidance") is False:
            changes["unconditional_strength"] = 0.0
        if "tuned_adapters" in changes:
            names = changes["tuned_adapters"]
            listed = [names] if isinstance(names, str) else names
            if not isinstance(listed, (list, tuple, type(None))):
                raise UserError(f"tuned_adapters is {names!r}; expected names of adapters, or None.")
            changes["tuned_adapters"] = None if listed is None else tuple(listed)
        if changes.get("adapter_schedule") is not None:
            changes["adapter_schedule"] = as_strength(changes["adapter_schedule"])
        if "control_schedule" in changes:
            changes["control_schedule"] = _of_controls(changes["control_schedule"], nets)
        return replace(self, **changes)

    def stored(self) -> dict[str, Any]:
        """What a configuration keeps; a function is in none."""
        names, controls = self.tuned_adapters, self.control_schedule
        return {
            "domain_guidance": self.domain_guidance,
            "unconditional_strength": self.unconditional_strength or None,
            "tuned_adapters": None if names is None else list(names),
            "adapter_schedule": stored(self.adapter_schedule),
            "hand_over": self.hand_over,
            "control_schedule": None if controls is None else [stored(s) for s in controls],
        }


@dataclass
class Attachment:
    """What the class of an attached pipeline holds: its settings, and the pretrained denoiser where there is one."""

    extras: Extras
    source: Any
    control_use: list[ControlUse] = field(default_factory=list)


def attachment_of(pipe: Any) -> Attachment | None:
    """The settings of an attached pipeline."""
    return vars(type(pipe)).get("attachment")


def extras_of(pipe: Any) -> Extras:
    """The settings of a drop-in or an attached pipeline; those of a stock one have no effect."""
    attachment = attachment_of(pipe)
    return getattr(pipe, "extras", Extras()) if attachment is None else attachment.extras


NAMES = tuple(setting.name for setting in fields(Extras))


def _of_controls(given: Any, nets: int) -> tuple[Strength | None, ...] | None:
    """The schedule of each ControlNet, from one for all or a list."""
    if given is None:
        return None
    if nets == 0:
        raise UserError("control_schedule acts on ControlNets, and the pipeline has none; leave it out.")
    each: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given] * nets
    if len(each) != nets:
        raise UserError(f"control_schedule has {len(each)} entries; expected one for each of {nets} ControlNets.")
    strengths = tuple(None if s is None else as_strength(s) for s in each)
    return strengths if any(s is not None for s in strengths) else None
