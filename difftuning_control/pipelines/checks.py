"""What the drop-ins refuse: sources, adapters and compiled modules that a setting cannot act on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import nn

from difftuning_control.adapters.attached import runs_any_of
from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.errors import UserError
from difftuning_control.pipelines.guidance import TunedWeights
from difftuning_control.pipelines.guiding import Guiding

NAMES = {"unet": "UNet", "transformer": "transformer", "controlnet": "ControlNet"}
"""How sentences call a pipeline's modules."""

IP_ADAPTER = ("encoder_hid_proj", "image_proj")  # where a UNet or FLUX, and where SD3 keep one


SHAPES = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "num_embeds_ada_norm",
    "dim",
    "hidden_size",
)
"""Of a denoiser's configuration, where it has them: what the pretrained one must have too."""


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_source(denoiser: Any, source: Any, component: str) -> None:
    """Refuse a source that is no model, the denoiser itself, or of another shape.

    Raises:
        UserError: with what was found, or the two values that differ.
    """
    name = NAMES[component]
    if not isinstance(source, nn.Module):
        raise UserError(f"source_{component} is a {type(source).__name__}; expected the pretrained {name}, loaded.")
    if unwrap_module(source) is unwrap_module(denoiser):
        raise UserError(
            f"source_{component} is the {name} that was tuned; give a second one, as it was before it was tuned."
        )
    config: Any = source.config
    for key in SHAPES:
        ours, its = denoiser.config.get(key), config.get(key)
        if ours != its:
            raise UserError(
                f"source_{component} does not belong to this model: its {key} is {its}, the {name}'s {ours}; give the "
                f"{name} that was tuned, as it was before."
            )


def check_beside(denoiser: Any, source: Any, component: str) -> None:
    """Refuse a source that computes in another precision than the denoiser, of which torch would tell nothing clear.

    Raises:
        UserError: with both.
    """
    ours, its = denoiser.dtype, source.dtype
    if ours == its or not {ours, its} <= set(FLOATS) or torch.is_autocast_enabled(denoiser.device.type):
        return
    if any(getattr(module, "is_quantized", False) for module in (denoiser, source)):
        return  # whose parameters do not tell what they compute in
    raise UserError(
        f"source_{component} is in {_word(its)} and the {NAMES[component]} in {_word(ours)}; make them alike: "
        f"source.to({ours})."
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_place(source: Any, device: torch.device, component: str) -> None:
    """Refuse a source on another device than the pipeline computes on; one that is moved for each forward is no matter.

    Raises:
        UserError: with both.
    """
    is_moved = hasattr(source, "_hf_hook") or hasattr(source, "_diffusers_hook")
    if not is_moved and source.device != device:
        raise UserError(
            f"source_{component} is on {source.device} and the pipeline computes on {device}; move it: "
            f'source.to("{device}").'
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


def check_scalable(weights: TunedWeights, setting: str) -> None:
    """Refuse adapters that have no scale, and full weights, which have none either.

    Raises:
        UserError: naming the kind.
    """
    if weights.source is not None and setting != "adapter_schedule":
        raise UserError(
            f"{setting} needs an adapter, whose strength it sets, and here the weights themselves were tuned; give 0, "
            "which is the pretrained model, or 1, which is ordinary guidance."
        )
    for layer in weights.layers:
        if isinstance(layer, TrainedWhole):
            continue
        its = [n for n in weights.adapters if n in layer._get_available_adapters()]
        if any(n not in getattr(layer, "scaling", {}) for n in its):
            kind = type(layer).__module__.split(".")[2]  # peft.tuners.<kind>
            raise UserError(
                f"{setting} needs adapters with a scale, and {', '.join(its)} has none (a {kind}); "
                + ("use hand_over, which switches it." if setting == "adapter_schedule" else "give 0 or 1.")
            )


def check_compiled(module: nn.Module, component: str, changes: str | None) -> None:
    """Refuse what would be compiled anew at every step, or what no hook reaches.

    Args:
        changes: the setting that gives an adapter other strengths than on and off, if there is one.

    Raises:
        UserError: in these cases.
    """
    name = NAMES[component]
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise UserError(
            f"the {name} was compiled in place ({component}.compile()), where no hook reaches it; use "
            f"torch.compile(pipe.{component}) instead."
        )
    if changes is not None and is_compiled_module(module):
        other = "use hand_over" if changes == "adapter_schedule" else "give 0 or 1"
        raise UserError(
            f"the {name} is compiled and would be compiled anew for every value of {changes}; {other}, "
            "or leave it uncompiled."
        )


def check_cache(module: Any, component: str, setting: str = "domain_guidance") -> None:
    """Refuse a cache of what blocks gave in the forward before, which may have been with other weights.

    Args:
        setting: what changes the weights.

    Raises:
        UserError: if one is enabled.
    """
    if getattr(module, "is_cache_enabled", False):
        raise UserError(
            f"the {NAMES[component]} reuses what it computed a forward before (enable_cache), which {setting} "
            f"would mix with what other weights computed; call pipe.{component}.disable_cache()."
        )


def check_share(name: str, guiding: Guiding, option: str) -> None:
    """Refuse a share of the adapter in unconditional rows that a transformer of their own predicts (Ideogram 4).

    Args:
        name: of the pipeline's class.
        option: what asks for the share.

    Raises:
        UserError: in this case.
    """
    if guiding.rows == "beside":
        raise UserError(
            f"a {name} has a transformer of its own for the unconditional rows, which no adapter acts on; leave out "
            f"{option}."
        )


def check_scale(pipe: Any, guiding: Guiding, scale: float, unconditional_strength: float) -> None:
    """Refuse Domain Guidance where the stock class has no second branch, and where that branch is a transformer of its
    own (which is the pretrained one always) a share of the adapter in it.

    Raises:
        UserError: in these cases.
    """
    name, denoiser = type(pipe).__name__, getattr(pipe, guiding.component)
    if unconditional_strength > 0:
        check_share(name, guiding, "unconditional_strength")
    if guiding.rows == "beside":
        return
    if guiding.scale is None:
        raise UserError(
            f"domain_guidance needs a second prediction with a scale, and a {name} has none; use hand_over or "
            "adapter_schedule."
        )
    try:
        given = f"{guiding.scale} {scale:g}"
    except (TypeError, ValueError):
        raise UserError(f"{guiding.scale} is {scale!r}; expected a number.") from None
    above = guiding.threshold(pipe)
    if scale != guiding.neutral and not scale > above:
        more = "or more" if above == guiding.neutral else f"or more than {above:g}"
        raise UserError(
            f"domain_guidance does nothing at {given}; give {guiding.neutral:g}, which is the tuned model alone, "
            f"{more}, or leave domain_guidance out."
        )
    told = denoiser.config.get("time_cond_proj_dim") is not None or pipe.config.get("is_distilled")
    if scale > above and told:
        raise UserError(
            f"domain_guidance does nothing at {given} on this model, which is distilled or told its guidance and has "
            "no unconditional rows; leave domain_guidance out."
        )


DEPRECATED = ("callback", "callback_steps", "mask_feature")  # what stock classes take under `**kwargs`


def check_unused(stock: Callable[..., Any], pipe: Any, given: dict[str, Any]) -> None:
    """Refuse arguments that a stock `__call__` takes and does not look at.

    Raises:
        UserError: naming them.
    """
    parameters = inspect.signature(stock).parameters
    unused = [name for name in given if name not in parameters and name not in DEPRECATED]
    swallows = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unused and swallows:  # where it does not, Python refuses them
        what = "image-to-image and inpainting" if {"image", "strength", "mask_image"} & set(unused) else "other"
        raise UserError(
            f"a {type(pipe).__name__} does not use {', '.join(unused)}; leave it out, or use the class that does "
            f"({what} pipelines of diffusers take the same settings by attach)."
        )


def tuned_among(acting: list[str], named: Sequence[str] | None, place: str, set_by: str, needed: bool) -> list[str]:
    """The adapters that were tuned: those that are named, or else the only one that acts.

    Args:
        acting: the adapters that act.
        place: the module in which, for sentences.
        set_by: how users name them, up to `tuned_adapters=`.
        needed: whether it must be known where several act; there are none otherwise.

    Raises:
        UserError: if one that is named does not act, or it cannot be told which were tuned.
    """
    absent = [name for name in named or () if name not in acting]
    if absent:
        raise UserError(
            f"tuned_adapters names {', '.join(absent)}, which does not act in the {place} (acting: "
            f"{', '.join(acting) or 'none'}); load and activate it, not fused, or name another."
        )
    if named is not None:
        return list(named)
    if len(acting) > 1 and needed:
        raise UserError(
            f"several adapters act in the {place} ({', '.join(acting)}); say which were tuned: "
            f"{set_by}tuned_adapters=[{acting[0]!r}])."
        )
    return acting if len(acting) == 1 else []


def check_nets(pipe: Any, nets: Sequence[Any], tuned: Sequence[Any], in_halves: bool) -> None:
    """Refuse settings of the adapter where a ControlNet runs tuned layers of the denoiser itself, as Z-Image's runs its
    refiners; and guidance by halves of a batch whose rows the ControlNet has padded to the length of the longest.

    Args:
        nets: the ControlNets, at least one.
        tuned: parameters that were tuned, or of layers that adapters act in.
        in_halves: whether each half of a batch gets a forward of its own.
    """
    if any(runs_any_of(net, tuned) for net in nets) or in_halves:
        raise UserError(
            f"the ControlNet of a {type(pipe).__name__} runs layers of the transformer that the adapter tuned, or "
            "needs both prompts in one forward; leave out domain_guidance (or give it unconditional_strength=1), "
            "hand_over and adapter_schedule, or draw without the ControlNet."
        )
