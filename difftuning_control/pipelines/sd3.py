"""Stable Diffusion 3 and 3.5: drop-ins for the stock text-to-image and ControlNet pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.controlnets.controlnet_sd3 import SD3MultiControlNetModel
from transformers import (  # type: ignore[attr-defined]
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling, like
from difftuning_control.pipelines.guidance import AtForward
from difftuning_control.pipelines.prompts import NegativePrompts
from difftuning_control.pipelines.strength import Strength


class SD3Sampling(NegativePrompts, TunedSampling):
    """`TunedSampling` of a Stable Diffusion 3 pipeline."""

    def _branch(self, call: dict[str, Any]) -> AtForward:
        """Skip-layer guidance runs the transformer once more a step, without unconditional rows."""
        guided = super()._branch(call)
        return lambda inputs: "tuned" if inputs.get("skip_layers") is not None else guided(inputs)


class DiffTuningSD3Pipeline(SD3Sampling, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings of `set_extras`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "source_transformer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
        source_transformer: SD3Transformer2DModel | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusion3Pipeline.__init__(
            self,
            transformer,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
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

    @like(StableDiffusion3Pipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusion3Pipeline.encode_prompt, args, kwargs)

    @like(StableDiffusion3Pipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._sample(StableDiffusion3Pipeline.__call__, args, kwargs)


class DiffTuningSD3ControlNetPipeline(ControlledSampling, SD3Sampling, StableDiffusion3ControlNetPipeline):
    """`StableDiffusion3ControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule`, `hand_over` and `control_schedule` are the
    settings of `set_extras`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusion3ControlNetPipeline._optional_components, "source_transformer"]  # noqa: RUF012
    controlnet_class: ClassVar[Any] = SD3ControlNetModel

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
        controlnet: SD3ControlNetModel | list[SD3ControlNetModel] | tuple[SD3ControlNetModel] | SD3MultiControlNetModel,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
        source_transformer: SD3Transformer2DModel | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        control_schedule: dict | list | str | Strength | Callable | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusion3ControlNetPipeline.__init__(
            self,
            transformer,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
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

    @like(StableDiffusion3ControlNetPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusion3ControlNetPipeline.encode_prompt, args, kwargs)

    @like(StableDiffusion3ControlNetPipeline.__call__, preprocess=False)
    def __call__(self, *args: Any, preprocess: bool | Sequence[bool] = False, **kwargs: Any) -> Any:
        return self._sample_controlled(StableDiffusion3ControlNetPipeline.__call__, args, kwargs, preprocess)
