"""What every family's ControlNet must hold against the stock ControlNet pipeline, whichever family it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from support.drawing import PROMPTS, TOLERANCE, generators


def conditions(side: int, seed: int = 0, count: int = 2) -> Tensor:
    """Conditions (count, 3, side, side) uint8."""
    return torch.randint(0, 256, (count, 3, side, side), generator=generators(seed)[0], dtype=torch.uint8)


def assert_predicts_as_in_the_stock_pipeline(
    family: Any,
    calls: Iterable[tuple[Tensor, Tensor, Tensor]],
    rows: dict[str, Tensor],
    control: Tensor,
) -> None:
    """`predict` gives what the denoiser gave in each call, under pictures of conditions and under their latents.

    Args:
        calls: noisy latents, timesteps and output of each call.
        rows: the conditioning of a call's rows.
        control: conditions (B, 3, H, W) uint8; a call has them once or twice.
    """
    for noisy, timesteps, out in calls:
        with torch.no_grad():
            read = family.encode_control(control)
            times = len(noisy) // len(control)
            found, again = (
                family.predict(family.model, noisy, timesteps, rows | {"control": c.repeat(times, *[1] * (c.ndim - 1))})
                for c in (control, read)
            )
            alone = family.predict(family.model, noisy, timesteps, rows)
        torch.testing.assert_close(found, out, **TOLERANCE)
        torch.testing.assert_close(again, out, **TOLERANCE)
        assert not torch.allclose(alone, out, atol=1e-3)


def assert_samples_as_the_stock_pipeline(family: Any, expected: Tensor, control: Tensor) -> None:
    """`sample` under conditions gives the stock pipeline's pictures, a row alone the same, and without them others."""
    settings = {"steps": 3, "guidance_scale": 3.0, "resolution": control.shape[-1]}
    found = family.sample(PROMPTS, generators(0, 1), **settings, control=control)
    torch.testing.assert_close(family.decode(found) / 2 + 0.5, expected, **TOLERANCE)
    alone = family.sample(PROMPTS[1:], generators(1), **settings, control=control[1:])
    torch.testing.assert_close(alone[0], found[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(family.sample(PROMPTS, generators(0, 1), **settings), found, atol=1e-3)


def assert_adds_exactly_nothing(family: Any, latents: Tensor, control: Tensor) -> None:
    """Beside a new ControlNet the denoiser predicts bit by bit what it predicts alone."""
    rows = family.encode_prompts(PROMPTS)
    timesteps = family.process.timesteps[torch.tensor([100, 800])]
    with torch.no_grad():
        alone = family.predict(family.denoiser, latents, timesteps, rows)
        beside = family.predict(family.model, latents, timesteps, rows | {"control": control})
    assert torch.equal(alone, beside)
