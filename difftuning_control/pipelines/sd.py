"""Stable Diffusion 1.x and 2.x: drop-ins for the stock text-to-image and ControlNet pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from difftuning_control.pipelines.extras import like
from difftuning_control.pipelines.strength import Strength
from difftuning_control.pipelines.unet import ControlledUNet, UNetSampling


class DiffTuningPipeline(UNetSampling, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusionPipeline._optional_components, "source_unet"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        source_unet: UNet2DConditionModel | None = None,
        requires_safety_checker: bool = True,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusionPipeline.__init__(
            self,
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self._start_extras(
            source_unet,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    @like(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusionPipeline.encode_prompt, args, kwargs)

    @like(StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._sample(StableDiffusionPipeline.__call__, args, kwargs)


class DiffTuningControlNetPipeline(ControlledUNet, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `tuned_adapters`, `adapter_schedule`, `hand_over` and `control_schedule` are the
    settings of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """

    _optional_components = [*StableDiffusionControlNetPipeline._optional_components, "source_unet"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | list[ControlNetModel] | tuple[ControlNetModel] | MultiControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        source_unet: UNet2DConditionModel | None = None,
        requires_safety_checker: bool = True,
        domain_guidance: bool = False,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        control_schedule: dict | list | str | Strength | Callable | None = None,
        saved_adapters: list | None = None,
    ):
        StableDiffusionControlNetPipeline.__init__(
            self,
            vae,
            text_encoder,
            tokenizer,
            unet,
            controlnet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
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

    @like(StableDiffusionControlNetPipeline.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode(StableDiffusionControlNetPipeline.encode_prompt, args, kwargs)

    @like(StableDiffusionControlNetPipeline.__call__, preprocess=False)
    def __call__(self, *args: Any, preprocess: bool | Sequence[bool] = False, **kwargs: Any) -> Any:
        return self._sample_controlled(StableDiffusionControlNetPipeline.__call__, args, kwargs, preprocess)
