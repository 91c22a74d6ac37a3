"""What the drop-ins refuse: sources, adapters and compiled modules that a setting cannot act on."""

from __future__ import annotations

from typing import Any

from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.errors import UserError
from difftuning_control.pipelines.guidance import TunedWeights
from difftuning_control.pipelines.strength import Strength

NAMES = {"unet": "UNet", "transformer": "transformer", "controlnet": "ControlNet"}
"""How sentences call a pipeline's modules."""

IP_ADAPTER = ("encoder_hid_proj", "image_proj")  # where a UNet or FLUX, and where SD3 keep one


def check_source(denoiser: Any, source: Any, component: str, keys: tuple[str, ...]) -> None:
    """Refuse a source of another shape.

    Args:
        keys: of the configurations, that must be equal.

    Raises:
        UserError: with the two values that differ.
    """
    name = NAMES[component]
    for key in keys:
        ours, its = denoiser.config.get(key), source.config.get(key)
        if ours != its:
            raise UserError(
                f"source_{component} does not belong to this model: its {key} is {its}, the {name}'s {ours}; give the "
                f"{name} that was tuned, as it was before."
            )


def check_ip_adapter(denoiser: Any, source: Any, component: str) -> None:
    """Refuse a source that would not see the picture that an IP-Adapter shows the denoiser.

    Raises:
        UserError: in this case.
    """
    if any(getattr(denoiser, n, None) is not None and getattr(source, n, None) is None for n in IP_ADAPTER):
        raise UserError(
            f"an IP-Adapter is loaded into the {NAMES[component]}, but not into source_{component}, which would not "
            f"see the picture; unload it, or use an adapter instead of a source_{component}."
        )


def check_scalable(weights: TunedWeights) -> None:
    """Refuse adapters that have no scale.

    Raises:
        UserError: naming the kind.
    """
    for layer in weights.layers:
        if isinstance(layer, TrainedWhole):
            continue
        its = [n for n in weights.adapters if n in layer._get_available_adapters()]
        if any(n not in getattr(layer, "scaling", {}) for n in its):
            kind = type(layer).__module__.split(".")[2]  # peft.tuners.<kind>
            raise UserError(
                f"adapter_schedule needs adapters with a scale, and {', '.join(its)} has none (a {kind}); use "
                "hand_over, which switches it."
            )


def check_compiled(module: nn.Module, component: str, schedule: Strength | None) -> None:
    """Refuse what would be compiled anew at every step, or what no hook reaches.

    Raises:
        UserError: in these cases.
    """
    name = NAMES[component]
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise UserError(
            f"the {name} was compiled in place ({component}.compile()), where no hook reaches it; use "
            f"torch.compile(pipe.{component}) instead."
        )
    if schedule is not None and is_compiled_module(module):
        raise UserError(
            f"the {name} is compiled and would be compiled anew for every value of adapter_schedule; use hand_over, "
            "or leave it uncompiled."
        )


def check_cache(module: Any, component: str) -> None:
    """Refuse a cache of what blocks gave in the forward before, which may have been with other weights.

    Raises:
        UserError: if one is enabled.
    """
    if getattr(module, "is_cache_enabled", False):
        raise UserError(
            f"the {NAMES[component]} reuses what it computed a forward before (enable_cache), which domain_guidance "
            f"would mix with what other weights computed; call pipe.{component}.disable_cache()."
        )
