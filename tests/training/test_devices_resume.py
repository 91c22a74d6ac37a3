"""A checkpoint that another device's optimizer wrote is gone on from in the way that this one computes."""

from __future__ import annotations

import torch

from difftuning_control.training.checkpoint import load_checkpoint, save_checkpoint
from support.checkpoints import fresh


def test_a_fused_optimizer_stays_fused_and_heeds_its_mark_after_a_checkpoint_of_another(tmp_path):
    saved, loaded = fresh(0, False, False), fresh(1, False, False)
    for parameter in saved.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    saved.optimizer.step()
    saved.optimizer.zero_grad()
    groups = [{**group, "fused": True} for group in loaded.optimizer.param_groups]
    loaded.optimizer = torch.optim.AdamW(groups, fused=True)
    for group in loaded.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    load_checkpoint(save_checkpoint(tmp_path, 1, saved, "me"), loaded, "me")
    assert [group["fused"] for group in loaded.optimizer.param_groups] == [True] * len(groups)
    before = {name: parameter.detach().clone() for name, parameter in loaded.parameters.items()}
    for stop, moves in ((1.0, False), (0.0, True)):
        for parameter in loaded.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        for group in loaded.optimizer.param_groups:
            group["lr"] = 0.1  # it warms up from 0
        loaded.optimizer.found_inf = torch.tensor(stop)  # which an optimizer that is not fused refuses
        loaded.optimizer.step()
        assert all(torch.equal(before[n], p) != moves for n, p in loaded.parameters.items())
