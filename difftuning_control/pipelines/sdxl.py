"""Stable Diffusion XL: drop-ins for the stock text-to-image and ControlNet pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from difftuning_control.pipelines.extras import like
from difftuning_control.pipelines.strength import Strength
from difftuning_control.pipelines.unet import ControlledUNet, UNetSampling


class DiffTuningXLPipeline(UNetSampling, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "source_unet"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        source_unet: UNet2DConditionModel | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusionXLPipeline.__init__(
            self,
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self._start_extras(
            source_unet,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    @like(StableDiffusionXLPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusionXLPipeline.encode_prompt, args, kwargs)

    @like(StableDiffusionXLPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._sample(StableDiffusionXLPipeline.__call__, args, kwargs)


class DiffTuningXLControlNetPipeline(ControlledUNet, StableDiffusionXLControlNetPipeline):
    """`StableDiffusionXLControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule`, `hand_over` and `control_schedule` are the
    settings of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusionXLControlNetPipeline._optional_components, "source_unet"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | list[ControlNetModel] | tuple[ControlNetModel] | MultiControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        source_unet: UNet2DConditionModel | None = None,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        control_schedule: dict | list | str | Strength | Callable | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusionXLControlNetPipeline.__init__(
            self,
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            controlnet,
            scheduler,
            force_zeros_for_empty_prompt,
            add_watermarker,
            feature_extractor,
            image_encoder,
        )
        self._start_extras(
            source_unet,
            control_schedule,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    @like(StableDiffusionXLControlNetPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusionXLControlNetPipeline.encode_prompt, args, kwargs)

    @like(StableDiffusionXLControlNetPipeline.__call__, preprocess=False)
    def __call__(self, *args: Any, preprocess: bool | Sequence[bool] = False, **kwargs: Any) -> Any:
        return self._sample_controlled(StableDiffusionXLControlNetPipeline.__call__, args, kwargs, preprocess)
