"""FLUX.1: drop-ins for the stock text-to-image and ControlNet pipelines.

FLUX has no unconditional rows: dev is told its guidance. Under Domain Guidance w is the call's `true_cfg_scale`, and

    with a negative prompt       ε̂ = ε_pretrained(x, negative) + w (ε_tuned(x, c) − ε_pretrained(x, negative))
    without                      ε̂ = ε_pretrained(x, c) + w (ε_tuned(x, c) − ε_pretrained(x, c))

each with the embedded guidance of the call, at two forwards a step. The first is the stock class's own, whose second
forward the pretrained weights answer. At w = 1, the stock default, both are the tuned prediction and one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from typing import Any, ClassVar

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel
from transformers import (  # type: ignore[attr-defined]
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from difftuning_control.errors import UserError
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling, like
from difftuning_control.pipelines.guidance import AtForward, SamplingHook
from difftuning_control.pipelines.prompts import pretrained
from difftuning_control.pipelines.strength import Strength


def has_negative(call: dict[str, Any]) -> bool:
    """Whether a call has a negative prompt, by the stock pipeline's own rule."""
    embeds = (call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"])
    return call["negative_prompt"] is not None or all(e is not None for e in embeds)


class FluxSampling(TunedSampling):
    """`TunedSampling` of a FLUX pipeline."""

    guidance_argument: ClassVar[str] = "true_cfg_scale"
    control_keys: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def _branch(self, call: dict[str, Any]) -> AtForward:
        if not has_negative(call):
            return lambda inputs: "both"
        turn: Iterator[Any] = cycle(("tuned", "pretrained"))  # the prompt's forward, then the negative one's
        return lambda inputs: next(turn)

    @contextmanager
    def _weights_hooked(self, call: dict[str, Any]) -> Iterator[SamplingHook]:
        self._encoded = 0
        with super()._weights_hooked(call) as hook:
            if self._text_tuned and not has_negative(call):
                raise UserError(
                    "the adapter tuned a text encoder too, and without a negative prompt domain_guidance asks the "
                    'pretrained model under the same embeddings; give a negative_prompt, "" for none.'
                )
            yield hook

    def _encode(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock `encode_prompt`, which a call runs a second time for its negative prompt; under Domain Guidance
        that is the pretrained encoders'."""
        if not self._text_tuned:
            return stock(self, *args, **kwargs)
        self._encoded += 1
        with pretrained(self._text_tuned if self._encoded == 2 else []):
            return stock(self, *args, **kwargs)

    def _process(self) -> NoiseProcess:
        """The transformer is told σ itself."""
        process = super()._process()
        return replace(process, timesteps=process.sigmas) if process.prediction == "flow" else process


class DiffTuningFluxPipeline(FluxSampling, FluxPipeline):
    """`FluxPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings of `set_extras`; the
    scale of Domain Guidance is the call's `true_cfg_scale`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*FluxPipeline._optional_components, "source_transformer"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        source_transformer: FluxTransformer2DModel | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        saved_adapters: list | None = None,
    ):
        FluxPipeline.__init__(
            self,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self._start_extras(
            source_transformer,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    @like(FluxPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(FluxPipeline.encode_prompt, args, kwargs)

    @like(FluxPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._sample(FluxPipeline.__call__, args, kwargs)


class DiffTuningFluxControlNetPipeline(FluxSampling, ControlledSampling, FluxControlNetPipeline):
    """`FluxControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule`, `hand_over` and `control_schedule` are the
    settings of `set_extras`; the scale of Domain Guidance is the call's `true_cfg_scale`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*FluxControlNetPipeline._optional_components, "source_transformer"]  # noqa: RUF012
    controlnet_class: ClassVar[Any] = FluxControlNetModel

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        controlnet: FluxControlNetModel
        | list[FluxControlNetModel]
        | tuple[FluxControlNetModel]
        | FluxMultiControlNetModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        source_transformer: FluxTransformer2DModel | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        control_schedule: dict | list | str | Strength | Callable | None = None,
        saved_adapters: list | None = None,
    ):
        FluxControlNetPipeline.__init__(
            self,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            controlnet,
            image_encoder,
            feature_extractor,
        )
        self._start_extras(
            source_transformer,
            control_schedule,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    @like(FluxControlNetPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(FluxControlNetPipeline.encode_prompt, args, kwargs)

    @like(FluxControlNetPipeline.__call__, preprocess=False)
    def __call__(self, *args: Any, preprocess: bool | Sequence[bool] = False, **kwargs: Any) -> Any:
        return self._sample_controlled(FluxControlNetPipeline.__call__, args, kwargs, preprocess)
