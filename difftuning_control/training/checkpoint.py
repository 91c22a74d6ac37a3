"""Exact save and resume, in safetensors and JSON: nothing pickled is written or read.

A checkpoint holds what changes while training: trainable weights, optimizer, averaged weights, learning-rate schedule,
gradient scaler, budget, fidelity curve and step. The data order and all noise follow from the step (see `batches`), so
a resumed run continues bit for bit. Where the weights are spread over processes (`sharding`), each writes its part of
the tensors; either kind of checkpoint is read by any number of processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.runs.folder import CHECKPOINT
from difftuning_control.system.digests import DIGEST, digest_of, digest_of_file
from difftuning_control.system.durable import discard, place, write_json
from difftuning_control.system.tensors import read_tensors, write_tensors
from difftuning_control.training.phases import Phases

OPTIMIZER = re.compile(r"\d{6}\.\w+")  # the optimizer's name of one of its tensors: of which parameter, and what
DELETE = "delete it to resume from an earlier state, or from the beginning where there is none"


@dataclass
class TrainingState:
    """The objects that a checkpoint saves and restores in place."""

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None = None
    scaler: Any | None = None
    budget: Any | None = None
    fidelity: Any | None = None
    sharded: bool = False
    logged: int = 0  # lines of metrics.jsonl
    phases: Phases | None = None  # what the run has taken so far, with the sessions before

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, under the names that a checkpoint has for them."""
        return {} if self.ema is None else {f"{i:06d}": p for i, p in enumerate(self.ema.shadow_params)}


def save_checkpoint(output: Path, step: int, state: TrainingState, identity: str) -> Path:
    """Write `checkpoint-<step>`, whole or not at all, then delete the older ones; until then the last good one stays.

    One process comes here, or all of them together where the state is sharded.

    Args:
        identity: digest of what the run depends on; a resume with another one is refused.

    Raises:
        OSError: if there is no space; the older checkpoints are as they were, and nothing is left of this one.
    """
    final = output / f"checkpoint-{step}"
    temporary = output / f".checkpoint-{step}.partial"
    main = not state.sharded or torch.distributed.get_rank() == 0
    try:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        tensors, scalars = _split(state.optimizer.state_dict()["state"])
        averages = {"ema": state.averages()} if state.ema is not None else {}
        weights = {n: p.data for n, p in state.parameters.items()}
        files = _write(temporary, {"weights": weights, "optimizer": tensors, **averages}, state.sharded)
        if main:
            values = _values(step, state, identity, scalars) | {"files": files, "sharded": state.sharded}
            values = json.loads(json.dumps(values, default=str))  # as it will be read back
            write_json(temporary / "state.json", values | {DIGEST: digest_of(values)})
            if final.exists():
                discard(final)
            place(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in output.glob("checkpoint-*") if main else ():
        if CHECKPOINT.fullmatch(older.name) and older != final:
            discard(older)
    return final


def _values(step: int, state: TrainingState, identity: str, scalars: dict[str, Any]) -> dict[str, Any]:
    """What is no tensor."""
    values: dict[str, Any] = {
        "step": step,
        "logged": state.logged,
        "identity": identity,
        "optimizer": scalars,
        "param_groups": state.optimizer.state_dict()["param_groups"],
        "lr_scheduler": {k: v for k, v in state.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
    }
    if state.ema is not None:
        values["ema"] = {k: v for k, v in state.ema.state_dict().items() if k != "shadow_params"}
    if state.scaler is not None:
        values["scaler"] = state.scaler.state_dict()
    if state.budget is not None:
        values["budget"] = state.budget.state_dict()
    if state.fidelity is not None:
        values["fidelity"] = state.fidelity.state_dict()
    if state.phases is not None:
        values["phases"] = state.phases.state_dict()
    return values


def _write(folder: Path, parts: dict[str, dict[str, Tensor]], sharded: bool) -> dict[str, Any]:
    """The tensors as a file a part, or as a file a process; gives the digest of each file."""
    if not sharded:
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        return {p.name: digest_of_file(p) for p in sorted(folder.iterdir())}
    from difftuning_control.training.sharding import (  # saves torch's FSDP for one process
        digests_together,
        write_shards,
    )

    torch.distributed.barrier()  # the folder is there
    write_shards(folder, {name: tensor for tensors in parts.values() for name, tensor in tensors.items()})
    torch.distributed.barrier()
    return digests_together(sorted(folder.glob("*.safetensors")))


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, newest first."""
    complete = [p for p in output.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and (p / "state.json").exists()]
    return sorted(complete, key=lambda p: -int(p.name.split("-")[1]))


def load_checkpoint(folder: Path, state: TrainingState, identity: str, earlier: Sequence[str] = ()) -> int:
    """Restore everything in place and return the step.

    Args:
        earlier: identities that the run had before its learning rate or its length were changed. From a checkpoint of
            one of these the schedule is not restored: it is the new one, entered at this step.

    Raises:
        UserError: if the checkpoint is damaged or belongs to a run with other settings, data or base.
    """
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        digest = values.pop(DIGEST)
    except (ValueError, KeyError, AttributeError, TypeError):
        digest = None
    if digest is None or digest != digest_of(values):
        raise UserError(f"{folder} is damaged (state.json); {DELETE}.")
    if values["identity"] not in (identity, *earlier):
        raise UserError(
            f"{folder} was written with another recipe, base or data; resume with the same, or start afresh with "
            "--overwrite."
        )
    if state.sharded:
        from difftuning_control.training.sharding import digests_together  # saves torch's FSDP for one process

        digests: dict[str, str | None] = digests_together([folder / name for name in values["files"]])
    else:
        digests = {n: digest_of_file(folder / n) if (folder / n).exists() else None for n in values["files"]}
    damaged = [name for name, digest in values["files"].items() if digests[name] != digest]
    if damaged:
        raise UserError(f"{folder} is damaged ({', '.join(damaged)}); {DELETE}.")
    read = _read_shards if state.sharded or values.get("sharded") else _read_files
    merged = _merge(read(folder, state), values["optimizer"])
    groups = _as_here(values["param_groups"], state.optimizer)
    if values["identity"] == identity:
        state.optimizer.load_state_dict({"state": merged, "param_groups": groups})
        state.lr_scheduler.load_state_dict(values["lr_scheduler"] | {"lr_lambdas": [None] * len(groups)})
    else:
        rates = [group["initial_lr"] for group in state.optimizer.param_groups]
        groups = [group | {"initial_lr": rate} for group, rate in zip(groups, rates)]
        state.optimizer.load_state_dict({"state": merged, "param_groups": groups})
        enter_schedule(state.lr_scheduler, values["step"])
    if state.ema is not None:
        state.ema.load_state_dict(values["ema"] | {"shadow_params": state.ema.shadow_params})
    if state.scaler is not None and values.get("scaler"):
        state.scaler.load_state_dict(values["scaler"])
    if state.budget is not None:
        state.budget.load_state_dict(values["budget"])
    if state.fidelity is not None:
        state.fidelity.load_state_dict(values["fidelity"])
    if state.phases is not None:
        state.phases.load_state_dict(values.get("phases", {}))
    state.logged = values["logged"]
    return int(values["step"])


def _as_here(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """An optimizer's groups as they were saved, with how this one computes: fused on a GPU, and not elsewhere."""
    how = [{k: g[k] for k in ("fused", "foreach", "capturable") if k in g} for g in optimizer.param_groups]
    return [group | here for group, here in zip(groups, how)]


def enter_schedule(scheduler: Any, step: int) -> None:
    """Put a schedule, and its optimizer's learning rates, where they would be after so many steps of it."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates


def _read_files(folder: Path, state: TrainingState) -> dict[str, Tensor]:
    """Fill weights and averaged weights from a file each; gives the optimizer's tensors."""
    _fill(folder, dict(state.parameters), read_tensors(folder / "weights.safetensors") or {})
    if state.ema is not None:
        _fill(folder, state.averages(), read_tensors(folder / "ema.safetensors") or {})
    read = read_tensors(folder / "optimizer.safetensors") or {}
    return {name: tensor.clone() for name, tensor in read.items()}  # not mapped from a file that is deleted later


def _fill(folder: Path, targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    if {n: t.shape for n, t in values.items()} != {n: t.shape for n, t in targets.items()}:
        raise _other_model(folder)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def _read_shards(folder: Path, state: TrainingState) -> dict[str, Tensor]:
    """Fill weights and averaged weights from files that hold parts of them; gives the optimizer's tensors, spread as
    the weights are that they belong to."""
    from difftuning_control.training.sharding import read_shards, shapes  # saves torch's FSDP for one process

    sizes = shapes(folder)
    targets: dict[str, Tensor] = {n: p.data for n, p in state.parameters.items()} | state.averages()
    optimizer = {n: size for n, size in sizes.items() if OPTIMIZER.fullmatch(n)}
    if {n: t.shape for n, t in targets.items()} != {n: s for n, s in sizes.items() if n not in optimizer}:
        raise _other_model(folder)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    made = {}
    for name, size in optimizer.items():
        parameter = parameters[int(name.split(".")[0])]
        made[name] = torch.zeros_like(parameter.data) if size == parameter.shape else torch.zeros(size)
    read_shards(folder, targets | made, state.sharded)
    return made


def _other_model(folder: Path) -> UserError:
    return UserError(f"{folder} holds weights of another model or adapter; start afresh with --overwrite.")


def _split(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state by parameter and name, as tensors and as JSON values.

    bitsandbytes wraps its tensors in a dictionary, which it needs not when it loads, and parameters share some of them,
    which safetensors refuses.
    """
    tensors, scalars, seen = {}, {}, set()
    for number, entries in state.items():
        wrapped = [value for value in entries.values() if isinstance(value, dict)]
        plain = {name: value for name, value in entries.items() if not isinstance(value, dict)}
        for name, value in ChainMap(plain, *wrapped).items():
            key = f"{number:06d}.{name}"
            if isinstance(value, torch.Tensor) and value.ndim:
                pointer = value.data_ptr()  # 0 of sharded tensors, which share nothing
                tensors[key] = value.clone() if pointer in seen else value
                seen |= {pointer} - {0}
            else:  # AdamW makes a tensor of its steps again
                scalars[key] = value.item() if isinstance(value, torch.Tensor) else value
    return tensors, scalars


def _merge(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    return state
