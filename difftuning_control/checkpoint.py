"""Exact save and resume, in safetensors and JSON: nothing pickled is written or read.

A checkpoint holds what changes while training: trainable weights, optimizer, averaged weights, learning-rate schedule,
gradient scaler, budget, fidelity curve and step. The data order and all noise follow from the step (see `batches`), so
a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from difftuning_control.durable import discard, place
from difftuning_control.errors import UserError
from difftuning_control.fingerprint import DIGEST, digest_of, digest_of_file, read_tensors, write_json, write_tensors

NAME = re.compile(r"checkpoint-(\d+)")
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
    logged: int = 0  # lines of metrics.jsonl


def save_checkpoint(output: Path, step: int, state: TrainingState, identity: str) -> Path:
    """Write `checkpoint-<step>`, whole or not at all, then delete the older ones; until then the last good one stays.

    Args:
        identity: digest of what the run depends on; a resume with another one is refused.

    Raises:
        OSError: if there is no space; the older checkpoints are as they were, and nothing is left of this one.
    """
    final = output / f"checkpoint-{step}"
    temporary = output / f".checkpoint-{step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, state, identity)
        if final.exists():
            discard(final)
        place(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in output.glob("checkpoint-*"):
        if NAME.fullmatch(older.name) and older != final:
            discard(older)
    return final


def _write(temporary: Path, step: int, state: TrainingState, identity: str) -> None:
    write_tensors(temporary / "weights.safetensors", {n: p.data for n, p in state.parameters.items()})
    tensors, scalars = _split(state.optimizer.state_dict()["state"])
    write_tensors(temporary / "optimizer.safetensors", tensors)
    values: dict[str, Any] = {
        "step": step,
        "logged": state.logged,
        "identity": identity,
        "optimizer": scalars,
        "param_groups": state.optimizer.state_dict()["param_groups"],
        "lr_scheduler": {k: v for k, v in state.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
    }
    if state.ema is not None:
        averaged = state.ema.state_dict()
        shadows = averaged.pop("shadow_params")
        write_tensors(temporary / "ema.safetensors", {f"{i:06d}": p for i, p in enumerate(shadows)})
        values["ema"] = averaged
    if state.scaler is not None:
        values["scaler"] = state.scaler.state_dict()
    if state.budget is not None:
        values["budget"] = state.budget.state_dict()
    if state.fidelity is not None:
        values["fidelity"] = state.fidelity.state_dict()
    values["files"] = {p.name: digest_of_file(p) for p in sorted(temporary.iterdir())}
    values = json.loads(json.dumps(values, default=str))  # as it will be read back
    write_json(temporary / "state.json", values | {DIGEST: digest_of(values)})


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, newest first."""
    found = [p for p in output.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / "state.json").exists()]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def load_checkpoint(folder: Path, state: TrainingState, identity: str) -> int:
    """Restore everything in place and return the step.

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
    if values["identity"] != identity:
        raise UserError(
            f"{folder} was written with another recipe, base or data; resume with the same, or start afresh with "
            "--overwrite."
        )
    damaged = [n for n, d in values["files"].items() if not (folder / n).exists() or digest_of_file(folder / n) != d]
    if damaged:
        raise UserError(f"{folder} is damaged ({', '.join(damaged)}); {DELETE}.")
    weights = read_tensors(folder / "weights.safetensors") or {}
    if set(weights) != set(state.parameters):
        raise UserError(f"{folder} holds weights of another model or adapter; start afresh with --overwrite.")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(weights[name])
    tensors = read_tensors(folder / "optimizer.safetensors") or {}
    merged = _merge(tensors, values["optimizer"])
    state.optimizer.load_state_dict({"state": merged, "param_groups": values["param_groups"]})
    state.lr_scheduler.load_state_dict(values["lr_scheduler"] | {"lr_lambdas": [None] * len(values["param_groups"])})
    if state.ema is not None:
        shadows = read_tensors(folder / "ema.safetensors") or {}
        device = state.ema.shadow_params[0].device
        state.ema.load_state_dict(values["ema"] | {"shadow_params": [shadows[k].to(device) for k in sorted(shadows)]})
    if state.scaler is not None and values.get("scaler"):
        state.scaler.load_state_dict(values["scaler"])
    if state.budget is not None:
        state.budget.load_state_dict(values["budget"])
    if state.fidelity is not None:
        state.fidelity.load_state_dict(values["fidelity"])
    state.logged = values["logged"]
    return int(values["step"])


def _split(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state by parameter and name, as tensors and as JSON values."""
    tensors, scalars = {}, {}
    for number, entries in state.items():
        for name, value in entries.items():
            key = f"{number:06d}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            else:
                scalars[key] = value
    return tensors, scalars


def _merge(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    return state
