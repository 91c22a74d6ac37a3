"""The weights that training begins from: another run's, read before what trains is attached and put into it after.

A LoRA keeps what it does, B A times its scale, whatever rank-for-rank form and alpha it was written with. A ControlNet
that trains by a LoRA begins from the other's weights as a whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from difftuning_control.adapters.attached import denoiser_of, unload_adapter
from difftuning_control.adapters.files import (
    DIFFFIT_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    metadata_and_shapes,
    read_adapter,
)
from difftuning_control.adapters.kinds import ADAPTER, own_parts
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.lora_keys import is_native
from difftuning_control.adapters.lora_start import Down, factors
from difftuning_control.adapters.native_names import plain_layers
from difftuning_control.adapters.snapshot import tuned_modules
from difftuning_control.adapters.tuning import AdapterTuning, ControlNetTuning, FullTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_controlnet, load_family
from difftuning_control.recipe.adapter_kinds import LORA_KINDS
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.start import Start
from difftuning_control.system.untrusted import from_json, read_text
from difftuning_control.training.begin_fit import check_fit, check_shapes
from difftuning_control.training.checkpoint import TrainingState, enter_schedule, save_checkpoint
from difftuning_control.training.phases import Phases

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.adapter import AdapterConfig

OTHERS = "begin"  # the name under which an adapter of others is read
PARTS = ("lora_A.weight", "lora_B.weight")


def check_beginning(start: Start, family: Family, adapter: AdapterConfig) -> None:
    """Refuse an adapter that training cannot begin from, before anything is encoded or drawn; the base stays as it is.

    The shapes of other kinds than LoRAs, and the classes of a DiT, are compared when they are filled in.

    Raises:
        UserError: as `Beginning`.
    """
    with torch.random.fork_rng(devices=[]):  # a peft folder is attached for a moment, for which peft draws numbers
        Beginning(start, family, adapter)


class Beginning:
    """Weights of another run, of what a run kept, or of an adapter file, for one run to begin from.

    Args:
        start: where they lie.
        family: the base, which nothing is attached to yet.
        adapter: that is to train on the denoiser; None where its weights or a ControlNet do.

    Raises:
        UserError: if they cannot be read, or are not of the adapter.
    """

    def __init__(self, start: Start, family: Family, adapter: AdapterConfig | None = None):
        self.start, self.family = start, family
        self.lora: dict[str, tuple[dict[str, Tensor], float]] = {}  # by component: tensors, and their scale
        if start.record is not None and start.record.method == "controlnet":
            controlnet = load_controlnet(family, str(start.weights))
            try:
                family.controlnet.load_state_dict(controlnet.state_dict())
            except RuntimeError:
                raise UserError(
                    f"the ControlNet of {start.weights} has other layers than the one that trains here; say the "
                    "control.init that it was trained with."
                ) from None
        elif start.weights.suffix == ".safetensors" and start.weights.name != DIFFFIT_FILE:
            self.lora = self._read_lora(start.weights)
        elif start.record is None and _is_peft_lora(start.weights):
            self.lora = self._read_others(start.weights)
        if adapter is not None:
            check_fit(start, self.lora, family, adapter)

    def fill(self, tuning: AdapterTuning | FullTuning | ControlNetTuning) -> None:
        """Put the weights into what trains.

        Raises:
            UserError: if they do not fit it.
        """
        if isinstance(tuning, ControlNetTuning):
            return
        with torch.no_grad():
            if isinstance(tuning, FullTuning):
                tuned = load_family(str(self.start.weights)).denoiser
                self.family.denoiser.load_state_dict(tuned.state_dict())
                return
            self._fill_adapter(tuning)
            if self.family.trained_whole():
                self.family.load_trained_whole(self.start.weights.parent)

    # --- LoRAs ------------------------------------------------------------------------------------------------------

    def _read_lora(self, path: Path) -> dict[str, tuple[dict[str, Tensor], float]]:
        """By component the tensors under peft's names, and the one scale of all."""
        tensors = read_adapter(path)
        header = metadata_and_shapes(path)[0]
        try:
            config = dict(from_json(header.get("lora_adapter_metadata", "{}")))
        except (TypeError, ValueError) as error:
            raise UserError(f"the header of {path} cannot be read (lora_adapter_metadata: {error}).") from None
        uneven = any(value for key, value in config.items() if key.endswith(("rank_pattern", "alpha_pattern")))
        component, denoiser = denoiser_of(self.family.pipe)
        if uneven or not is_native(tensors, component, plain_layers(denoiser)):
            return self._read_others(path)
        loras: dict[str, tuple[dict[str, Tensor], float]] = {}
        for prefix in dict.fromkeys(key.partition(".")[0] for key in tensors):
            own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
            rank, alpha = config.get(f"{prefix}.r"), config.get(f"{prefix}.lora_alpha")
            scale = 1.0
            if rank and alpha is not None:
                scale = alpha / (rank**0.5 if config.get(f"{prefix}.use_rslora") else rank)
            loras[prefix] = (own, scale)
        return loras

    def _read_others(self, path: Path) -> dict[str, tuple[dict[str, Tensor], float]]:
        """A file of another tool's, or a peft directory, as it acts; scales are made part of B."""
        pipe = self.family.pipe
        load_adapter(pipe, path, OTHERS)
        adapters = {}
        for prefix, module in tuned_modules(pipe).items():
            tensors = {}
            for name, layer in module.named_modules():
                if isinstance(layer, LoraLayer) and OTHERS in layer.lora_A:
                    if layer.use_dora.get(OTHERS, False) or layer.lora_bias.get(OTHERS, False):
                        unload_adapter(pipe, OTHERS)
                        raise UserError(
                            f"{path} has more than A and B (a DoRA's magnitudes, or biases), which training cannot "
                            "begin from in this form; give a LoRA, or the run that it is of."
                        )
                    a, b = factors(layer, OTHERS)
                    if a.dtype.itemsize == 1:  # peft gives it the type of the layer's weight
                        unload_adapter(pipe, OTHERS)
                        raise UserError(
                            f"{path} would be rounded to the 8 bits of this base, which model.quantization float8 "
                            "made; say --model.quantization int8 or nf4, or leave it out."
                        )
                    tensors[f"{name}.{PARTS[0]}"] = a.float().clone()
                    tensors[f"{name}.{PARTS[1]}"] = b.float() * layer.scaling[OTHERS]
            if tensors:
                adapters[prefix] = (tensors, 1.0)
        unload_adapter(pipe, OTHERS)
        return adapters

    def _fill_adapter(self, tuning: AdapterTuning) -> None:
        kind, weights = tuning.config.kind, self.start.weights
        component, denoiser = denoiser_of(self.family.pipe)
        if kind in LORA_KINDS:
            parts = {component: denoiser}
            if tuning.config.text_encoder:
                parts["text_encoder"] = self.family.pipe.text_encoder
            for name, module in parts.items():
                self._fill_lora(module, *self.lora.get(name, ({}, 1.0)))
        elif kind == "difffit":
            own = own_parts(denoiser)[ADAPTER].parameters
            self._copy(own, read_adapter(weights) if weights.name == DIFFFIT_FILE else {})
        else:
            self._fill_peft(denoiser, weights)

    def _fill_lora(self, module: Any, tensors: dict[str, Tensor], scale: float) -> None:
        """Put a LoRA's tensors into an attached one; a start that is taken away again is the file's second half."""
        tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
        layers = {n.removeprefix("text_model."): m for n, m in module.named_modules() if isinstance(m, LoraLayer)}
        starts = any(isinstance(layer.lora_A[ADAPTER], Down) for layer in layers.values())
        state = {} if starts else get_peft_model_state_dict(module, adapter_name=ADAPTER)
        expected = {k.removeprefix("text_model."): v for k, v in state.items()}
        for name, layer in layers.items():
            a, b = tensors[f"{name}.{PARTS[0]}"], tensors[f"{name}.{PARTS[1]}"]
            factor = scale / layer.scaling[ADAPTER]
            self._fill_layer(layer, a, b if factor == 1 else b * factor)
            for key in (k for k in expected if k.startswith(f"{name}.") and not k.endswith(PARTS)):  # DoRA's magnitudes
                expected[key].copy_(tensors[key])

    def _fill_layer(self, layer: Any, a: Tensor, b: Tensor) -> None:
        """Put A and B into a layer, whose sizes were compared before."""
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        rank = len(down.weight)
        starts = isinstance(down, Down)
        a, b = a.to(down.weight), b.to(up.weight)
        if not starts:
            down.weight.copy_(a)
            up.weight.copy_(b)
            return
        whole = len(a) == 2 * rank
        down.weight.copy_(a[:rank] if down.factor is None else a[:rank] / down.factor[:, None])
        down.start.copy_(a[rank:] if whole else torch.zeros_like(a))
        up.weight.copy_(b[:, :rank])
        up.start.copy_(b[:, rank:] if whole else torch.zeros_like(b))

    # --- other kinds ------------------------------------------------------------------------------------------------

    def _fill_peft(self, denoiser: Any, folder: Path) -> None:
        tensors = {k.removeprefix(PEFT_PREFIX): v for k, v in read_adapter(folder / PEFT_FILE).items()}
        self._copy(get_peft_model_state_dict(denoiser, adapter_name=ADAPTER), tensors)

    def _copy(self, targets: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        given, expected = ({n: tuple(t.shape) for n, t in own.items()} for own in (tensors, targets))
        check_shapes(self.start.weights, given, expected)
        for name, target in targets.items():
            target.copy_(tensors[name])


def _is_peft_lora(folder: Path) -> bool:
    """Whether a folder is peft's of a LoRA; what is wrong with its configuration, loading tells."""
    if not (folder / PEFT_CONFIG).is_file():
        return False
    return '"LORA"' in read_text(folder / PEFT_CONFIG)


def reopen(output: Path, record: RunRecord, state: TrainingState, main: bool) -> None:
    """Make of a finished run one that broke off at its end: a checkpoint of its result, with a fresh optimizer.

    Args:
        state: filled from the result.
        main: whether this process writes.
    """
    if (output / f"checkpoint-{record.steps}" / "state.json").exists():  # it was reopened before, and killed
        return
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    state.logged = len(lines)
    enter_schedule(state.lr_scheduler, record.steps)
    if state.budget is not None and record.budget is not None:
        multipliers = record.budget.multipliers
        state.budget.load_state_dict(state.budget.state_dict() | {"multipliers": multipliers})
    if state.fidelity is not None and record.fidelity is not None:
        state.fidelity.load_description(record.fidelity)
    before = Phases()  # what this session took until now is counted when it ends
    before.add(record.phases or {})
    if main or state.sharded:
        save_checkpoint(output, record.steps, replace(state, phases=before), record.identity)
