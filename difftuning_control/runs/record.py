"""The record of a run, `run.json`, as a dataclass with sections: the one place that knows its keys.

Records of earlier versions lack some of them. What such a record is taken to say is the default of the field, or said
by a property here. Keys of newer versions are kept where a record is written again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from difftuning_control.data.label_space import LabelSpace
from difftuning_control.evaluation.band_losses import LossChanges, read_losses
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.recipe.measured_schedule import MeasuredSchedule
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.gate_results import GateResults
from difftuning_control.runs.record_sections import (
    BankRecord,
    BudgetRecord,
    Change,
    ControlRecord,
    DataRecord,
    Fingerprints,
    Frozen,
    PhaseCosts,
    Source,
    Timings,
    read_phases,
)
from difftuning_control.system.durable import write_json
from difftuning_control.system.sections import Section, dict_of, list_of
from difftuning_control.system.untrusted import from_json, read_text

RECORD = "run.json"
COMPLETE, RUNNING, FAILED = "complete", "running", "failed"
DTYPES = (None, "torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")
RESULT = ("losses", "steps_per_second", "steps", "timings")  # of every complete run
OF_THE_END = ("gates", "budget", "timings", "phases", "steps_per_second", "discarded")  # of the final weights alone


@dataclass(kw_only=True)
class RunRecord(Section):
    """What a run was made of and what came of it.

    Args:
        status: running (or broken off), failed, or complete.
        identity: a digest of what decides the weights.
        changes: of length or learning rate on its way, the newest last.
        recipe_values: the recipe as the user wrote it; `recipe` reads it.
        places: the absolute place of everything local, by `places.KEYS`, and of the run itself; earlier records: none.
        family: the model family.
        base_path: where the base was loaded from.
        fingerprints: digests of the inputs.
        dtype: of the base while it was tuned, `torch.float32`; None in earlier records.
        loads_lora: see `stock_loads_lora`.
        few_steps: what the stock pipeline's call is given where the base was distilled to few steps.
        data: the pictures.
        bank: the knowledge bank; None without one.
        classes: which number each class has; None of a model that takes prompts.
        control: what a ControlNet was taught; None of another run.
        prompts: of its sample grids.
        versions: of this package and of those that decide the result.
        device: that it was trained on, in words.
        processes: that shared the work.
        rows_per_step: of an optimizer step, over all processes; None in earlier records.
        seed: of the training.
        schedule: ψ and ξ by u, where they were measured.
        sources: the files that were read beside data and bank; None in earlier records.
        inputs: the SHA-256 of `inputs.jsonl`; None in earlier records.
        error: why it failed.
        losses: by role (target, bank) those of the base and of the tuned weights, each by noise band:
            `losses["bank"].tuned.losses`.
        steps_per_second: None where no step was left to do.
        budget: how a forgetting budget was kept.
        steps: that were done; 0 of a run that is not complete.
        fidelity: of a ControlNet, the curve over its steps.
        frozen: the denoiser beside a ControlNet.
        timings: how long it took.
        phases: what each phase took; None in earlier records.
        outputs: the SHA-256 of each file of the result.
        files: the SHA-256 of all else in the folder; None in earlier records.
        gates: what came of judging it; None where the run was not judged.
        discarded: outputs that a pilot took away once they were judged.
    """

    SOMETIMES: ClassVar = (
        "changes",
        "few_steps",
        "sources",
        "inputs",
        "error",
        "losses",
        "steps_per_second",
        "budget",
        "steps",
        "fidelity",
        "frozen",
        "timings",
        "phases",
        "outputs",
        "files",
        "gates",
        "discarded",
    )
    READERS: ClassVar = {
        "changes": list_of(Change),
        "fingerprints": Fingerprints.from_dict,
        "data": DataRecord.from_dict,
        "bank": BankRecord.from_dict,
        "classes": LabelSpace.from_dict,
        "control": ControlRecord.from_dict,
        "schedule": MeasuredSchedule.from_dict,
        "sources": dict_of(Source),
        "losses": read_losses,
        "budget": BudgetRecord.from_dict,
        "fidelity": FidelityRecord.from_dict,
        "frozen": Frozen.from_dict,
        "timings": Timings.from_dict,
        "phases": read_phases,
        "gates": GateResults.from_dict,
    }
    KEYS: ClassVar = {"recipe_values": "recipe"}

    status: str = ""
    identity: str = ""
    changes: list[Change] = field(default_factory=list)
    recipe_values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    family: str = ""
    base_path: str = ""
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    dtype: str | None = None
    loads_lora: bool | None = None
    few_steps: dict[str, Any] = field(default_factory=dict)
    data: DataRecord = field(default_factory=DataRecord)
    bank: BankRecord | None = None
    classes: LabelSpace | None = None
    control: ControlRecord | None = None
    prompts: list[str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    processes: int = 1
    rows_per_step: int | None = None
    seed: int = 0
    schedule: MeasuredSchedule | None = None
    sources: dict[str, Source] | None = None
    inputs: str | None = None
    error: str | None = None
    losses: LossChanges = field(default_factory=dict)
    steps_per_second: float | None = None
    budget: BudgetRecord | None = None
    steps: int = 0
    fidelity: FidelityRecord | None = None
    frozen: Frozen | None = None
    timings: Timings | None = None
    phases: PhaseCosts | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] | None = None
    gates: GateResults | None = None
    discarded: list[str] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(filter(None, DTYPES))}")

    def is_always_written(self, name: str) -> bool:
        return super().is_always_written(name) or (self.is_complete and name in RESULT)

    @property
    def is_complete(self) -> bool:
        return self.status == COMPLETE

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was made with; what earlier records lack of it has its default."""
        return Recipe.from_record(self.recipe_values)

    @property
    def method(self) -> str:
        return str(self.recipe_values["method"])

    @property
    def model_id(self) -> str:
        return str(self.recipe_values["model"]["id"])

    @property
    def adapter_kind(self) -> str:
        return str(self.recipe_values["adapter"]["kind"])

    @property
    def dtype_name(self) -> str:
        """The name in torch of the precision that the base was tuned in; earlier versions tuned in float32."""
        return (self.dtype or "torch.float32").removeprefix("torch.")

    def may_have_dtype(self, dtype: Any) -> bool:
        """Whether the base may have been tuned in a precision, which earlier records do not say."""
        return self.dtype in (None, str(dtype))

    @property
    def stock_loads_lora(self) -> bool:
        """Whether diffusers' pipeline has `load_lora_weights`; by earlier records those do that take prompts."""
        return self.classes is None if self.loads_lora is None else self.loads_lora

    @property
    def has_hashes(self) -> bool:
        """Whether it holds the hashes of all files, as it does not in earlier records."""
        return self.files is not None

    def after(
        self,
        step: int,
        identity: str,
        losses: LossChanges,
        outputs: dict[str, str],
        fidelity: FidelityRecord | None,
    ) -> RunRecord:
        """The record as if the run had ended after a step that it kept, without what is of the final weights alone."""
        return replace(
            self,
            original={k: v for k, v in (self.original or {}).items() if k not in OF_THE_END},
            status=COMPLETE,
            steps=step,
            identity=identity,
            losses=losses,
            outputs=outputs,
            fidelity=fidelity,
            gates=None,
            budget=None,
            timings=None,
            phases=None,
            steps_per_second=None,
            discarded=None,
        )

    def write(self, output: Path) -> None:
        """Write `run.json` in the run's folder, whole or not at all."""
        write_json(output / RECORD, self.to_dict())


def read_run(output: str | Path) -> RunRecord | None:
    """The record in an output folder; None where there is none that can be read."""
    try:
        return need_run(output)
    except (OSError, ValueError):
        return None


def need_run(output: str | Path) -> RunRecord:
    """The record in an output folder.

    Raises:
        OSError: if it is not there.
        ValueError: if it cannot be read, saying why.
    """
    try:
        return record_from(from_json(read_text(Path(output) / RECORD)))
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None


def record_from(values: Any) -> RunRecord:
    """What a `run.json` says.

    Raises:
        TypeError: if a value is of another kind than it should be.
        ValueError: if it has no status.
    """
    record = RunRecord.from_dict(values)
    if not record.status:
        raise ValueError("it has no status")
    return record
