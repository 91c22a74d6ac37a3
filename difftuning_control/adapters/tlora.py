"""T-LoRA: a LoRA whose rank falls as the noise rises, so that few pictures are not learnt by heart where it is high.

    W x + s · (B S M(t) A x − B₀ S₀ M(t) A₀ x)        M(t) keeps the first r(t) of r components

    r(t) = ⌊(T − t)(r − r_min) / T⌋ + r_min           t = 0 … T − 1, the noise level
         = ⌊(1 + 1/T − u)(r − r_min)⌋ + r_min          in the noise coordinate u = (t + 1)/T

A₀, S₀ and B₀ are the last singular components of a random matrix, and A, S and B start as the same (see `lora_start`).
With gaussian initialisation B starts at zero, and S and the second term are not there. The mask follows the timestep of
each row, in training and in sampling.

References:
    T-LoRA: Single Image Diffusion Model Customization Without Overfitting (Soboleva et al., 2025),
    https://arxiv.org/abs/2507.05964
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.forwards import timestep_name, timestep_place
from difftuning_control.objective.noise import NoiseProcess


def ranks(u: Tensor, levels: int, rank: int, min_rank: int) -> Tensor:
    """r(u), whole numbers of the shape of u.

    Args:
        levels: T.
    """
    share = (1 + 1 / levels - u.double()) * (rank - min_rank)
    return (share + 1e-4).floor().long().clamp(0, rank - min_rank) + min_rank  # 1e-4: u is a float32


def rank_limits(process: NoiseProcess, rank: int, min_rank: int) -> list[float]:
    """Of each component past the first `min_rank`: the timestep, as the model takes it, above which it is masked.

    Half-way between two levels, so that a sampler's timesteps off the grid count as the nearest level's. Where
    timesteps fall with the noise, these are negated, and so are those that `RankMask` compares.
    """
    limits = ranks(process.u, len(process), rank, min_rank)
    timesteps = process.time_sign * process.timesteps.double()
    edges = torch.cat([timesteps[:1] - 1, (timesteps[1:] + timesteps[:-1]) / 2, timesteps[-1:] + 1])
    return [float(edges[int((limits > component).sum())]) for component in range(min_rank, rank)]


class RankMask:
    """Sees the timesteps of every forward of a denoiser, and masks what its T-LoRA layers do accordingly.

    Gradient checkpointing recomputes each part of a forward under that forward's mask. A cache of the prompt's keys and
    values (Qwen-Image 2.1) is not used, since they would be those of the first step's rank.

    Args:
        rank, limits: of the components, see `rank_limits`; those before the limits' are never masked.
        runs: how many times a layer has all components, one after the other.
        sign: −1 where timesteps fall with the noise.
    """

    def __init__(self, denoiser: nn.Module, rank: int, limits: list[float], runs: int = 1, sign: int = 1):
        self.rank, self.limits, self.sign = rank, limits, sign
        self.name, self.place = timestep_name(denoiser), timestep_place(denoiser)
        self.gate: Tensor | None = None
        self._checkpointing = [m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")]
        self._limits = torch.tensor(([float("inf")] * (rank - len(limits)) + limits) * runs)
        self._handles: list[Any] = []
        self.follow(denoiser)

    def cover(self, layer: nn.Module) -> None:
        """Mask the output of a LoRA's A, (B, …, runs · rank)."""
        layer.register_forward_hook(self._apply)

    def follow(self, net: nn.Module) -> None:
        """Take the timestep from the denoiser, or also from a ControlNet that runs layers of it before (Z-Image)."""
        self._handles.append(net.register_forward_pre_hook(self._see, with_kwargs=True))
        self._handles.append(net.register_forward_hook(self._forget, always_call=True))

    def remove(self) -> None:
        """See no timesteps any more."""
        for handle in self._handles:
            handle.remove()

    def describe(self) -> dict[str, Any]:
        return {"kind": "tlora", "rank": self.rank, "limits": self.limits, "sign": self.sign}

    def _see(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        timestep = kwargs[self.name] if self.name in kwargs else args[self.place]
        timesteps = self.sign * torch.as_tensor(timestep).reshape(-1, 1)
        self._limits = self._limits.to(timesteps.device)
        self.gate = (timesteps <= self._limits).float()
        if torch.is_grad_enabled():
            for module in self._checkpointing:
                if module.gradient_checkpointing:
                    self._keep_for(module)
        uncached = {name: None for name in ("kv_cache", "kv_cache_mode") if name in kwargs}
        return args, kwargs | uncached

    def _forget(self, *_: Any) -> None:
        """Have layers that something else runs before the next forward find no timestep, rather than the last one."""
        if not torch.is_grad_enabled():  # else parts may be computed again
            self.gate = None

    def _keep_for(self, module: Any) -> None:
        """Have a module's checkpointed parts recomputed under the mask that they are computed under."""
        checkpoint = module._gradient_checkpointing_func
        if getattr(checkpoint, "mask", None) is self:
            return

        def kept(part: Callable[..., Any], *args: Any) -> Any:
            gate = self.gate

            def as_it_was(*args: Any) -> Any:
                now, self.gate = self.gate, gate
                try:
                    return part(*args)
                finally:
                    self.gate = now

            return checkpoint(as_it_was, *args)

        kept.mask = self  # type: ignore[attr-defined]
        module._gradient_checkpointing_func = kept

    def _apply(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.gate is None:
            raise UserError(
                "a layer of the T-LoRA runs before the denoiser was told a timestep; load the adapter into the "
                "pipeline that has the ControlNet."
            )
        gate = self.gate
        if len(gate) not in (1, len(output)):
            if not (gate == gate[:1]).all():
                raise ValueError(f"a T-LoRA layer has {len(output)} rows, the denoiser's timestep {len(gate)}.")
            gate = gate[:1]  # a part of a batch whose rows have one timestep, as under Domain Guidance
        gate = gate.view(len(gate), *[1] * (output.ndim - 2), -1)
        return output * gate.to(output)  # a timestep that is a plain number has its gate on the CPU


def orthogonal_start(shapes: list[tuple[int, int]], rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A (r, in), S (r,) and B (out, r) for layers (out, in): the last r singular components of a matrix of N(0, 1/r²).

    The singular vectors of a normal matrix are uniformly distributed and independent of its singular values. So the
    vectors are drawn by themselves, and the values, of which only the last r are wanted, once for each shape: an SVD a
    layer would take hours on a large model.
    """
    values: dict[tuple[int, int], Tensor] = {}
    factors = []
    for out, into in shapes:
        if (out, into) not in values:
            values[out, into] = torch.linalg.svdvals(torch.randn(out, into) / rank)[-rank:]
        left = torch.linalg.qr(torch.randn(out, rank))[0]
        right = torch.linalg.qr(torch.randn(into, rank))[0]
        factors.append((right.T.contiguous(), values[out, into].clone(), left.contiguous()))
    return factors
