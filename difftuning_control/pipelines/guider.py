"""Domain Guidance for diffusers' modular pipelines: a guider, as diffusers' own guiders are.

    ε̂ = ε_k(x, ∅) + w (ε_tuned(x, c) − ε_k(x, ∅))

k is `unconditional_strength`: the tuned adapter's strength in the unconditional prediction, 0 for the pretrained model.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from diffusers.configuration_utils import register_to_config

from difftuning_control.errors import UserError

try:
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.guiders.guider_utils import BaseGuidance
except ImportError:  # before diffusers 0.35
    raise UserError(
        "this diffusers has no guiders, which its modular pipelines take; install a newer one (pip install -U "
        "diffusers), or use attach on an ordinary pipeline."
    ) from None

from difftuning_control.pipelines.checks import check_cache, check_scalable, tuned_among
from difftuning_control.pipelines.guidance import TunedWeights, active_adapters, adapters_at, tuner_layers
from difftuning_control.pipelines.strength import check_u


class DomainGuidance(ClassifierFreeGuidance):
    """`ClassifierFreeGuidance` whose unconditional prediction comes from the pretrained model behind an adapter.

    Args:
        guidance_scale, guidance_rescale, start, stop: as in `ClassifierFreeGuidance`.
        unconditional_strength: k in [0, 1]; 1 is ordinary guidance.
        tuned_adapters: the adapters that were tuned, by name; needed where several act at once.

    Raises:
        UserError: for a strength out of its range; in `prepare_models` if it cannot be told which adapter was tuned.
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes what is given by place for a default, which it then neither saves nor copies
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        unconditional_strength: float = 0.0,
        tuned_adapters: list[str] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        BaseGuidance.__init__(self, start, stop)  # not the parent's, which would add its own configuration
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.use_original_formulation = False
        self.unconditional_strength = check_u(unconditional_strength, "unconditional_strength")
        self.tuned_adapters = tuned_adapters
        self._weaker = ExitStack()  # what cleaning up closes

    def prepare_models(self, denoiser: Any) -> None:
        """Before each prediction: the adapter as it is for the conditional one, and at k times its strength for the
        unconditional one.

        Raises:
            UserError: if it cannot be told which adapter was tuned, or it cannot act at this strength.
        """
        self._weaker.close()  # that of a prediction which an error ended
        super().prepare_models(denoiser)
        if self.is_conditional or self.unconditional_strength == 1:
            return
        check_cache(denoiser, "unet" if hasattr(denoiser, "down_blocks") else "transformer")
        weights = TunedWeights(tuner_layers(denoiser), self._adapters(denoiser))
        if self.unconditional_strength > 0:
            check_scalable(weights, "unconditional_strength between 0 and 1")
        self._weaker.enter_context(adapters_at(weights.layers, weights.adapters, self.unconditional_strength))

    def cleanup_models(self, denoiser: Any) -> None:
        """After each prediction: the adapter at its full strength again."""
        self._weaker.close()

    def _adapters(self, denoiser: Any) -> list[str]:
        acting, place = active_adapters(denoiser), type(denoiser).__name__
        return tuned_among(acting, self.tuned_adapters, place, "DomainGuidance(", needed=True)
