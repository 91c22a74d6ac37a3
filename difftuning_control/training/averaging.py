"""The running average of the trained weights, with a decay that rises or one that is the same from the start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


def running_average(parameters: Iterable[torch.nn.Parameter], decay: float, warmup: bool) -> EMAModel:
    """average ← d · average + (1 − d) · weights after each step, beginning with the weights as they are.

    Args:
        decay: d, between 0 and 1.
        warmup: d is 0 in the first step, and min(decay, 1 − (1 + s)^(−2/3)) s steps later; otherwise `decay` always.
    """
    if warmup:
        return EMAModel(parameters, decay=decay, use_ema_warmup=True)
    # without use_ema_warmup diffusers has a warm-up of another form; a least decay and a start before step 0 have none
    return EMAModel(parameters, decay=decay, min_decay=decay, update_after_step=-1)
