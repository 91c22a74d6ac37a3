"""A small training state and its comparison."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from difftuning_control.training.checkpoint import TrainingState


def fresh(seed: int, ema: bool = True, scaler: bool = True) -> TrainingState:
    """A small model with two parameter groups, AdamW, a cosine schedule, averaged weights and a gradient scaler."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters.items() if "weight" in n], "weight_decay": 0.1},
        {"params": [p for n, p in parameters.items() if "bias" in n], "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, 0.05)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=9)
    state = TrainingState(parameters, optimizer, scheduler)
    if ema:
        state.ema = EMAModel(parameters.values(), decay=0.9, use_ema_warmup=True)
    if scaler:
        state.scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=3)
    return state


def everything(state: TrainingState) -> dict:
    found = {
        "weights": {n: p.detach() for n, p in state.parameters.items()},
        "optimizer": state.optimizer.state_dict()["state"],
        "groups": [{**g, "betas": list(g["betas"])} for g in state.optimizer.state_dict()["param_groups"]],
        "lr": state.lr_scheduler.get_last_lr(),
        "epoch": state.lr_scheduler.last_epoch,
    }
    if state.ema is not None:
        found["ema"] = state.ema.state_dict()
    if state.scaler is not None:
        found["scaler"] = state.scaler.state_dict()
    return found


def assert_same_state(found: TrainingState, expected: TrainingState) -> None:
    torch.testing.assert_close(everything(found), everything(expected), atol=0, rtol=0)
