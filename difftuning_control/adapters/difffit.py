"""DiffFit: biases, norms and scale factors γ train, everything else stays.

Each attention and each feed-forward branch of a transformer block ends in γ ⊙ (W x + b), with γ = 1 at the start; W is
that of a linear layer, or of Sana's convolution of one pixel.

References:
    DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning
    (Xie et al., 2023), https://arxiv.org/abs/2304.06648
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError

GAMMA = "difffit_gamma"
LAYERS = (nn.Linear, nn.Conv2d)
FEED_FORWARD = ("FeedForward", "MLP", "SwiGLU", "GLUMBConv")  # how diffusers' classes of that kind end
LAST = ("net.2", "linear_out", "linear_2", "w2", "down", "out", "conv_point")  # their last layers, one in each


def branch_ends(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The last layer of every attention and feed-forward branch, by name.

    Raises:
        UserError: if a branch ends in none that is known, or the model has no transformer block.
    """
    ends: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in denoiser.named_modules():
        kind = type(module).__name__
        if kind.endswith(FEED_FORWARD):
            wanted: tuple[str, ...] = LAST
        elif hasattr(module, "to_q"):
            wanted = ("to_out.0", "to_add_out")
        elif hasattr(module, "to_qkv_mlp_proj"):  # FLUX.2's attention and feed-forward in one
            wanted = ("to_out",)
        elif kind.endswith("SingleTransformerBlock"):
            wanted = ("proj_out",)
        else:
            continue
        layers = {n: m for n, m in module.named_modules() if isinstance(m, LAYERS)}
        found = {f"{name}.{n}": m for n, m in layers.items() if n in wanted}
        if layers and not found and kind.endswith(FEED_FORWARD):
            raise UserError(
                f"adapter.kind is difffit, which does not know the end of {name} ({kind}); use another kind."
            )
        ends |= found
    if not ends:
        raise UserError("adapter.kind is difffit, but the model has no transformer block; use another kind.")
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
    gamma = getattr(layer, GAMMA).to(output.dtype)
    return output * (gamma[:, None, None] if isinstance(layer, nn.Conv2d) else gamma)


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
        UserError: of `branch_ends`.
    """

    def __init__(self, denoiser: nn.Module, name: str = "default"):
        self.ends = branch_ends(denoiser)
        parameters = small_weights(denoiser)
        self.handles = []
        for end, layer in self.ends.items():
            gamma = nn.Parameter(torch.ones(len(layer.weight), dtype=layer.weight.dtype, device=layer.weight.device))
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
        gammas = {f"{name}.{GAMMA}": (len(layer.weight),) for name, layer in branch_ends(denoiser).items()}
        return {name: tuple(p.shape) for name, p in small_weights(denoiser).items()} | gammas

    def remove(self) -> None:
        """Leave the denoiser as it was, bit for bit."""
        super().remove()
        for handle in self.handles:
            handle.remove()
        for layer in self.ends.values():
            del layer._parameters[GAMMA]
