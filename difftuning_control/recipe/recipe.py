"""A recipe: everything a run needs, as dataclasses that check their ranges; YAML and the command line mirror them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from difftuning_control.errors import UserError, need
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.inputs import (
    MOST_SAMPLES,
    MOST_UNMEASURED,
    BankConfig,
    ControlConfig,
    DataConfig,
    FidelityConfig,
    ModelConfig,
)
from difftuning_control.recipe.reading import build, keys_of, read_recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.system.annotations import check_fields
from difftuning_control.system.home import expand_paths

BY_MODEL = (  # whose default no single value tells
    "training.learning_rate",
    "training.max_steps",
    "training.batch_size",
    "training.mixed_precision",
    "training.gradient_checkpointing",
    "tuning.schedule.kind",
)
OF_TRIGGER = ("bank.prompts", "tuning.retention_prompts", "tuning.retention_weight")  # fit together, or not at all
FITTED = (  # what fits the model where a recipe names none
    *BY_MODEL,
    "tuning.retention_ratio",
    *OF_TRIGGER,
    "bank.steps",
    "bank.guidance_scale",
    "training.sample_steps",
    "training.sample_guidance_scale",
    "control.fidelity.steps",
    "control.fidelity.guidance_scale",
    "gates.steps",
    "gates.guidance_scale",
)


@dataclass
class Recipe:
    """A training run.

    Args:
        method: what trains: lora (an adapter of any kind), full (all weights of the denoiser), or controlnet (a
            ControlNet; the denoiser stays as it is).
        model: the pretrained model.
        data: the pictures to tune on.
        tuning: the objective.
        bank: the pretrained model's own samples.
        adapter: what is trained with method lora, or of a ControlNet.
        control: what a ControlNet is taught.
        training: the loop.
        output: folder of the results.
        gates: limits that the finished run is judged by.
    """

    method: Literal["lora", "full", "controlnet"] = "lora"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: str = "runs/difftuning"
    gates: GatesConfig = field(default_factory=GatesConfig)

    def __post_init__(self) -> None:
        self.left_open: tuple[str, ...] = ()  # those of `FITTED` that its text does not name; it is no setting
        expand_paths(self, "output")
        if self.method == "full" and self.adapter != AdapterConfig():
            raise UserError("adapter settings are given, but method full trains no adapter; leave them out.")
        self._check_quantization()
        if self.adapter.text_encoder and self.model.offload:
            raise UserError(
                "adapter.text_encoder trains the text encoder in every step, and model.offload keeps it in main "
                "memory; leave one of them out."
            )
        if self.training.shard:
            self._check_shard()
        if self.data.stream:
            self._check_stream()
        self._check_control()
        self._check_gates()
        if self.tuning.forgetting_budget is not None and self.measured_prompts != self.tuning.retention_prompts:
            raise UserError(
                f"training.validation_prompts is {self.training.validation_prompts}, but a forgetting budget is kept "
                f"on the prompts of tuning.retention_prompts, {self.tuning.retention_prompts}; say retained."
            )

    @property
    def folders_apart(self) -> list[str]:
        """Folders of pictures that are none to tune on or to hold out, which may lie among these."""
        masks = self.data.masking.folder if self.data.masking is not None else None
        return [p for p in (masks, self.control.path, self.control.validation_path) if p is not None]

    def _check_stream(self) -> None:
        """What must know all pictures before the first step."""
        needs = {
            "method controlnet": self.method == "controlnet",
            "data.limit": self.data.limit is not None,
            "data.classes": self.data.classes is not None,
            "data.buckets": self.data.buckets,
            "data.masks": self.data.masks is not None,
            "tuning.label_space new": self.tuning.label_space == "new",
            "tuning.schedule.kind auto": self.tuning.schedule.kind == "auto",
            "model.offload": self.model.offload,
            "tuning.retention_rows pictures": self.tuning.retention_rows == "pictures",
        }
        if (name := next((n for n, given in needs.items() if given), None)) is not None:
            raise UserError(
                f"data.stream is true and {name} is given, for which all pictures must be encoded before training; "
                "leave one of them out."
            )
        if self.gates.draws:
            raise UserError(
                f"data.stream is true and gates.{self.gates.of_pictures[0]} is given, which is judged on all pictures "
                "after training; leave one of them out."
            )

    def _check_shard(self) -> None:
        """What cannot be spread over processes."""
        training = self.training
        if self.method != "full":
            raise UserError(
                f"training.shard spreads all weights of a denoiser that trains, and method is {self.method}, whose "
                "weights that train are few; leave it out."
            )
        if training.optimizer != "adamw" or training.mixed_precision == "fp16":
            given = "mixed_precision fp16" if training.optimizer == "adamw" else f"optimizer {training.optimizer}"
            raise UserError(
                f"training.shard is true and training.{given}, which does not know sharded weights; use adamw, and "
                "bf16 or no."
            )
        if self.tuning.retention == "teacher":
            raise UserError(
                "training.shard spreads the weights over processes, and tuning.retention teacher needs a second model "
                "whole on each; say --tuning.retention samples."
            )
        if self.data.buckets and self.uses_bank:
            raise UserError(
                "training.shard is true and data.buckets, where bank rows take a forward of their own that some "
                "processes lack, while sharded weights are gathered in every forward by all; leave one of them out."
            )

    def _check_quantization(self) -> None:
        """What a quantised base cannot do."""
        kind = self.model.quantization
        if kind is None:
            return
        if self.method == "full":
            raise UserError(
                f"model.quantization {kind} is for weights that do not train, and method full trains them all."
            )
        fits = [name for name, facts in KINDS.items() if facts.on_quantised]
        refused = ("pissa",) if self.adapter.kind == "tlora" else ("pissa", "orthogonal")  # peft makes it in their type
        if self.method == "lora" and (self.adapter.kind not in fits or self.adapter.init in refused):
            init = f" with init {self.adapter.init}" if self.adapter.init in refused else ""
            raise UserError(
                f"model.quantization is {kind} and adapter.kind {self.adapter.kind}{init}, which do not go together; "
                f"use {' or '.join(fits)}, or leave model.quantization out."
            )

    def _check_control(self) -> None:
        """What belongs to ControlNets, and to them only."""
        control, training = self.control, self.training
        if self.method != "controlnet":
            if control != ControlConfig() or self.adapter.on == "controlnet" or training.stop_when is not None:
                raise UserError(
                    f"control, adapter.on controlnet or training.stop_when is given, but method is {self.method}; say "
                    "--method controlnet, or leave them out."
                )
            return
        if self.adapter != AdapterConfig() and self.adapter.on == "denoiser":
            raise UserError(
                "adapter settings are given for the denoiser, which method controlnet leaves as it is; say adapter.on: "
                "controlnet, or leave them out to train the whole ControlNet."
            )
        if self.tuning.forgetting_budget is not None:
            raise UserError(
                "a forgetting budget bounds what the denoiser forgets, and beside a ControlNet it stays as it is; "
                "leave out tuning.forgetting_budget."
            )
        if self.tuning.retention == "teacher":
            self._check_controlled_teacher()
        if training.sample_prompts:
            raise UserError("a ControlNet's sample grids show held-out pictures; leave out training.sample_prompts.")
        if training.stop_when is not None and control.fidelity.every == 0:
            raise UserError("training.stop_when needs a fidelity curve; set control.fidelity.every above 0.")
        if control.annotator == "supplied" and control.bank_condition == "own" and (self.uses_bank or self.bank.path):
            raise UserError(
                "the bank's samples have no supplied condition of their own; say --control.bank_condition blank, or "
                "name an annotator that makes conditions."
            )
        if control.path is not None and (control.validation_path is None) != (self.data.validation_path is None):
            raise UserError("give data.validation_path and control.validation_path together, or neither.")

    def _check_controlled_teacher(self) -> None:
        """What a ControlNet can be taught by the model that it started beside."""
        if self.tuning.retention_rows == "pictures":
            raise UserError(
                "tuning.retention_rows is pictures, whose conditions a ControlNet is to follow and not to ignore; say "
                "bank."
            )
        if self.control.init is None and self.control.bank_condition == "own":
            raise UserError(
                "tuning.retention is teacher, and a new ControlNet's teacher sees no conditions, so bank rows with "
                "theirs would teach it to ignore them; say --control.bank_condition blank, or name a control.init."
            )

    def _check_gates(self) -> None:
        """Gates whose figure this recipe cannot give."""
        gates = self.gates
        if gates.fidelity is not None and self.method != "controlnet":
            raise UserError(f"gates.fidelity is for ControlNets, but method is {self.method}; leave it out.")
        if gates.retention_loss is not None and self.method == "controlnet":
            raise UserError(
                "gates.retention_loss limits what the denoiser forgets, and beside a ControlNet it stays as it is; "
                "leave it out."
            )
        if gates.limits and not self.uses_bank and self.bank.path is None:
            raise UserError(
                f"gates.{next(iter(gates.limits))} needs a knowledge bank, which stands for the old domain, and this "
                "recipe has none; raise tuning.retention_ratio and retention_weight, name a bank.path, or leave the "
                "gate out."
            )
        if gates.draws and self.data.holdout == 0 and self.data.validation_path is None:
            name = next(name for name in gates.limits if name != "retention_loss")
            raise UserError(
                f"gates.{name} is judged on held-out pictures, and there are none; raise data.holdout, name a "
                "data.validation_path, or leave the gate out."
            )
        least = 5 if gates.draws else 2
        if gates.limits and self.bank.path is None and self.bank.size != "auto":
            need(self.bank.size >= least, "bank.size", self.bank.size, f"at least {least} with these gates")

    @property
    def uses_bank(self) -> bool:
        return self.tuning.uses_bank

    @property
    def measured_prompts(self) -> Literal["empty", "own", "both"]:
        """What held-out samples of the bank are measured with: own, empty, or both."""
        named = self.training.validation_prompts
        return self.tuning.retention_prompts if named == "retained" else named

    def bank_size(self, rows: int) -> int:
        """How many samples the bank of this run has, with so many rows to an optimizer step on all processes."""
        from difftuning_control.objective.rows import rows_of_share  # saves torch for what is only read

        most = MOST_SAMPLES if self.method == "lora" else MOST_UNMEASURED
        return self.bank.size_for(self.training.max_steps * rows_of_share(rows, self.tuning.retention_ratio), most)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe of a YAML file, as `difftune train --config` reads it.

        Raises:
            UserError: if it cannot be read, or a key or a value is wrong.
        """
        return cls.from_dict(read_recipe(os.fspath(path), keys_of(Recipe)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from its sections as dictionaries: `{"model": {"id": "embedded"}, "training": {"max_steps": 30}}`.

        Learning rate, steps, batch size, precision and schedule that are left out fit the model and the method once the
        model is known, and so do the sampling steps and guidance of one that was distilled to few steps; the data must
        be named.

        Raises:
            UserError: if a key is unknown, or a value is of another type or out of its range.
        """
        recipe = build(Recipe, values)
        if not _names(values, "data.path"):
            recipe.data.path = ""  # which whoever reads data refuses
        recipe.left_open = tuple(key for key in FITTED if not _names(values, key))
        return recipe

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> Recipe:
        """The recipe of what `to_dict` gave, in an earlier version too, which knew fewer sections.

        Raises:
            UserError: if a value is out of its range, or it is of a newer version or was edited.
        """
        try:
            tuning = dict(values["tuning"])
            tuning["schedule"] = ScheduleConfig(**tuning["schedule"])
            control = dict(values.get("control", {}))
            if control:
                control["fidelity"] = FidelityConfig(**control["fidelity"])
            recipe = cls(
                method=values["method"],
                model=ModelConfig(**values["model"]),
                data=DataConfig(**values["data"]),
                tuning=TuningConfig(**tuning),
                bank=BankConfig(**values["bank"]),
                adapter=AdapterConfig(**values["adapter"]),
                control=ControlConfig(**control),
                training=TrainingConfig(**values["training"]),
                gates=GatesConfig(**values.get("gates", {})),
                output=values["output"],
            )
            check_fields(recipe)
            return recipe
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"a recorded recipe cannot be read ({error}); it is of a newer version of this package, or was edited."
            ) from None


def _names(values: Mapping[str, Any], key: str) -> bool:
    """Whether nested values, of dictionaries or of dataclasses, say something of a dotted key."""
    part, (*sections, name) = values, key.split(".")
    for section in sections:
        part = part.get(section, {})
        if not isinstance(part, Mapping):  # a whole one
            return True
    return name in part
