"""The components of a model: its modules, where they lie, which of them train, and their fingerprints."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from difftuning_control.errors import UserError
from difftuning_control.system.digests import digest_of
from difftuning_control.system.tensors import digest_of_module

if TYPE_CHECKING:
    from typing_extensions import Self


@cache
def _computing_with_vae(kind: type) -> type:
    """A pipeline class that computes where its autoencoder lies; saved under its own name. diffusers before 0.40
    computes where the first component by name lies, which is a text encoder."""
    place = property(lambda pipe: pipe.vae.device)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": place})


class Components(ABC):
    """The modules of a diffusers pipeline, and the ControlNet beside them.

    With `offload` the text encoders stay on the CPU but for the while of `encoding`.
    """

    component: ClassVar[str]  # of the pipeline, that is tuned: unet or transformer
    spared: ClassVar[tuple[str, ...]] = ("text_encoder",)  # beginnings of the names of modules that stay on the CPU
    # with `offload` but for the while that they are needed
    pipe: Any  # diffusers' annotations leave out most of its modules' methods
    controlnet: Any
    offload: bool

    def need(self, *names: str) -> None:
        """Refuse a model without these components.

        Raises:
            UserError: naming the first that is missing.
        """
        for name in names:
            if getattr(self.pipe, name, None) is None:
                raise UserError(
                    f"the model has no {name}, which a {type(self.pipe).__name__} needs; give one that was saved whole."
                )

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.component)

    @property
    def modules(self) -> dict[str, Any]:
        """What weights are loaded, by name: denoiser, vae, and the text encoders that there are."""
        modules = {"denoiser": self.denoiser, "vae": self.pipe.vae}
        named = self.pipe.components.items()
        return modules | {n: m for n, m in named if n.startswith("text_encoder") and m is not None}

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.vae.dtype

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        """Beginnings of the names of those parameters of denoiser or ControlNet whose output nobody reads."""
        return ()

    def freeze_unused(self) -> None:
        """Train no parameter without a gradient: weight decay alone would move it, and processes would wait for it."""
        for module in (self.denoiser, self.controlnet):
            if module is not None and (unused := self.unused_parameters(module)):
                for name, parameter in module.named_parameters():
                    if name.startswith(unused):
                        parameter.requires_grad_(False)

    def checkpoint_activations(self) -> None:
        """Compute the activations of denoiser and ControlNet again in the backward pass instead of keeping them."""
        for module in (self.denoiser, self.controlnet):
            if module is not None:
                module.enable_gradient_checkpointing()

    def to(self, device: torch.device | str) -> Self:
        """Move all modules, with `offload` all but those that are spared."""
        if not self.offload:
            self.pipe.to(device)
        self.placed(self.pipe)
        for name, module in self.modules.items() if self.offload else ():
            module.to("cpu" if name.startswith(self.spared) else device)
        return self

    def placed(self, pipe: Any) -> Any:
        """A pipeline of these modules, the same object: with `offload` it draws on the denoiser's device, although
        text encoders of its lie on the CPU."""
        kind: Any = type(pipe)
        if self.offload and "device" not in vars(kind):
            pipe.__class__ = _computing_with_vae(kind)
        return pipe

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """While open, prompts can be encoded: with `offload` the text encoders take the denoiser's place."""
        if not self.offload:
            yield
            return
        place = self.device
        encoders = [module for name, module in self.modules.items() if name.startswith("text_encoder")]
        self.denoiser.to("cpu")
        try:
            for module in encoders:
                module.to(place)
            yield
        finally:
            for module in encoders:
                module.to("cpu")
            self.denoiser.to(place)

    def trained_whole(self) -> dict[str, nn.Parameter]:
        """Parameters of the denoiser that train beside any adapter: what it was given anew for this run."""
        return {}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each component's weights as loaded, taken on first use: read it before anything is tuned."""
        digests = {name: digest_of_module(module) for name, module in self.modules.items()}
        for name, part in self.pipe.components.items():
            if name.startswith(("tokenizer", "processor")) and part is not None:
                words = getattr(part, "tokenizer", part)  # of a processor for text and pictures
                digests[name] = digest_of({"vocabulary": words.get_vocab(), "length": words.model_max_length})
        return digests

    @property
    def fingerprint(self) -> str:
        return digest_of(self.fingerprints)
