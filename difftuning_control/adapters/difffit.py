"""DiffFit: biases, norms and scale factors γ train, everything else stays.

Each attention and each feed-forward branch of a transformer block ends in γ ⊙ (W x + b), with γ = 1 at the start.

References:
    DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning
    (Xie et al., 2023), https://arxiv.org/abs/2304.06648
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from difftuning_control.errors import UserError

GAMMA = "difffit_gamma"


def branch_ends(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The last linear layer of every attention and feed-forward branch, by name."""
    ends: dict[str, nn.Linear] = {}
    for name, module in denoiser.named_modules():
        inside: list[tuple[str, Any]] = []
        if isinstance(module, FeedForward):
            inside = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1:]
        elif hasattr(module, "to_q"):
            inside = [(n, m) for n, m in module.named_modules() if n in ("to_out.0", "to_add_out")]
        elif "SingleTransformerBlock" in type(module).__name__:
            inside = [("proj_out", getattr(module, "proj_out", None))]
        ends |= {f"{name}.{n}": m for n, m in inside if isinstance(m, nn.Linear)}
    return ends


def small_weights(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Biases, and the weights of norms, by name."""
    small = {}
    for name, module in denoiser.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and (key == "bias" or "Norm" in type(module).__name__) and key != GAMMA:
                small[f"{name}.{key}" if name else key] = parameter
    return small


def _scaled(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * getattr(layer, GAMMA).to(output.dtype)


class TrainedWhole:
    """Parameters of a denoiser that train themselves, and their pretrained values, which can act in their place.

    Args:
        parameters: by name; their values now are what `remove` brings back.
        name: of the adapter that they belong to.
        pretrained: the values that act at strength 0, where they are not these.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], name: str, pretrained: dict[str, Tensor] | None = None):
        self.name, self.parameters = name, parameters
        self.base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.pretrained = self.base if pretrained is None else pretrained

    @torch.no_grad()
    def set(self, values: dict[str, Tensor], strength: float = 1.0) -> None:
        """pretrained + strength · (values − pretrained)."""
        for name, parameter in self.parameters.items():
            base = self.pretrained[name].float().to(parameter.device)
            value = values[name].float().to(parameter.device)
            parameter.copy_(value if strength == 1 else base + strength * (value - base))

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """While open, the weights are pretrained + strength · (tuned − pretrained); at 0 the pretrained ones."""
        tuned = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                base = self.pretrained[name].to(parameter.device)
                parameter.data = torch.lerp(base.float(), tuned[name].float(), strength).to(base) if strength else base
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = tuned[name]

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """While open, the weights are as they would be without what trained, bit for bit."""
        tuned = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.base[name].to(parameter.device)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = tuned[name]

    def remove(self) -> None:
        """Leave them as they were, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.data = self.base[name].to(parameter.device)


class DiffFit(TrainedWhole):
    """γ, biases and norms of a denoiser, which can be switched off and taken off again.

    Args:
        name: as an adapter's.

    Raises:
        UserError: if the model has no transformer block.
    """

    def __init__(self, denoiser: nn.Module, name: str = "default"):
        self.ends = branch_ends(denoiser)
        if not self.ends:
            raise UserError("adapter.kind is difffit, but the model has no transformer block; use another kind.")
        parameters = small_weights(denoiser)
        self.handles = []
        for end, layer in self.ends.items():
            gamma = nn.Parameter(torch.ones(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device))
            layer.register_parameter(GAMMA, gamma)
            self.handles.append(layer.register_forward_hook(_scaled))
            parameters[f"{end}.{GAMMA}"] = gamma
        super().__init__(parameters, name)

    @contextmanager
    def taken_off(self) -> Iterator[None]:
        """As of every part that trains whole, and without γ."""
        gammas = {end: layer._parameters.pop(GAMMA) for end, layer in self.ends.items()}
        try:
            with super().taken_off():
                yield
        finally:
            for end, gamma in gammas.items():
                self.ends[end]._parameters[GAMMA] = gamma

    @staticmethod
    def shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what trains."""
        gammas = {f"{name}.{GAMMA}": (layer.out_features,) for name, layer in branch_ends(denoiser).items()}
        return {name: tuple(p.shape) for name, p in small_weights(denoiser).items()} | gammas

    def remove(self) -> None:
        """Leave the denoiser as it was, bit for bit."""
        super().remove()
        for handle in self.handles:
            handle.remove()
        for layer in self.ends.values():
            del layer._parameters[GAMMA]
