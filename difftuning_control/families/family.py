"""A family of models: what training, bank and analysis need of one; its own file adds what is peculiar to it.

What a family is told and gives is in four parts: its components, its latents, its prompts and its ControlNet.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.autoencoder import LatentSpace
from difftuning_control.families.control import Controlled, ControlledDenoiser, to_tensor
from difftuning_control.families.few_steps import USUAL_STEPS, Configs, FewSteps, by_index, by_name, by_scheduler
from difftuning_control.families.fit import Fit
from difftuning_control.families.older_form import write_older_form
from difftuning_control.families.prompts import PromptEmbeddings, Prompting
from difftuning_control.families.tunable import save_transformer_lora
from difftuning_control.objective.noise import BaseDensity, NoiseProcess
from difftuning_control.recipe.drawing import Settings
from difftuning_control.recipe.inputs import Solver


class Family(Controlled, Prompting, LatentSpace):
    """A model of one family, around a diffusers pipeline object.

    The pipeline's modules are used as they are: a denoiser that is tuned here is tuned in `pipe` too. `controlnet` is
    the one that `sample` and `model` use where a condition is given; None until somebody sets it. With
    `encodes_in_step` prompts are rows of tokens, and `model` encodes them: for a text encoder that trains or trained.
    """

    name: ClassVar[str]
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora_targets: ClassVar[tuple[str, ...]] = ()  # empty where no text encoder is trained
    base_density: ClassVar[BaseDensity] = "uniform"  # how often the family trains at each noise level
    fit: ClassVar[Fit] = Fit()
    distilled_steps: ClassVar[int] = USUAL_STEPS  # of the family's models that were distilled
    class_conditional: ClassVar[bool] = False  # told a class, and has its names for prompts; see `dit`
    prompts_at_once: ClassVar[int] = 32  # that go through the text encoders; a language model takes gigabytes for these
    takes_sizes: ClassVar[bool] = False  # whether `conditioning` may hold `sizes`, see `Framing.sizes`

    def __init__(self, pipe: Any):
        self.pipe = pipe  # Any: diffusers' annotations leave out most of its modules' methods
        self._check_variant()
        self._scheduled = NoiseProcess.from_scheduler(pipe.scheduler, self.base_density)
        self.process = self.told(self._scheduled)
        self.controlnet: Any = None
        self.prepare_control: Callable[[Any], Any] = lambda pipe: pipe  # what `sample` does to its ControlNet pipeline
        self.encodes_in_step = False
        self.offload = False  # whether the text encoders stay on the CPU but for the while of `encoding`
        self._known: dict[str, dict[str, Tensor]] = {}
        self._remembered: list[PromptEmbeddings] = []
        for name, module in self.modules.items():
            if name != "denoiser":
                module.requires_grad_(False).eval()

    @abstractmethod
    def _check_variant(self) -> None:
        """Refuse a model of this pipeline class that cannot be tuned, by name; and one without its encoders."""

    # --- the model --------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """What `predict` is given: the denoiser, with its ControlNet if there is one."""
        if self.controlnet is None:
            return self.denoiser
        return ControlledDenoiser(self.denoiser, self.controlnet, self.residuals)

    @abstractmethod
    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The denoiser's keyword arguments, as the stock pipeline passes them."""

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        """The prediction (B, C, h, w) that the first of the denoiser's outputs is for these noisy latents."""
        return output

    def told(self, process: NoiseProcess) -> NoiseProcess:
        """A scheduler's process with timesteps as the denoiser is told them."""
        return process

    def predict(
        self, denoiser: nn.Module, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's output (B, C, h, w), see `learned_variance`. `denoiser` may be a wrapped form of `self.model`.

        Where `conditioning` has a `control` (B, 3, H, W) uint8, or what `encode_control` makes of it, the model must
        have a ControlNet.
        """
        inputs = self.denoiser_inputs(noisy_model_input, timesteps, conditioning)
        if "control" in conditioning:
            control = conditioning["control"]
            encoded = self.encode_control(control) if control.dtype == torch.uint8 else control
            inputs["control"] = encoded.to(noisy_model_input.dtype)
        return self.denoiser_output(denoiser(**inputs, return_dict=False)[0], noisy_model_input)

    @property
    def learned_variance(self) -> bool:
        """Whether `predict` gives (B, 2C, h, w): the prediction, and v of `variance.py`."""
        return False

    def training_process(self, resolution: int) -> NoiseProcess:
        """The forward process to train with at a side in pixels: that of the scheduler, with its dynamic shift.

        A flow-matching scheduler with dynamic shifting draws larger pictures at more noise,
        σ' = s σ / (1 + (s − 1) σ), s = e^μ, μ linear in the number of tokens; training at the same levels puts the
        work where sampling will be (Esser et al., 2024, https://arxiv.org/abs/2403.03206, section 5.3.2).
        """
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return self.process
        mu = self.shift_of(resolution)
        return self.told(self._scheduled.shifted(math.exp(mu) if config.time_shift_type == "exponential" else mu))

    def shift_of(self, resolution: int) -> float:
        """μ, which the stock pipeline tells a scheduler with dynamic shifting for a side in pixels."""
        config, tokens = self.pipe.scheduler.config, self.shift_tokens(resolution)
        few, many = config.base_image_seq_len, config.max_image_seq_len
        return config.base_shift + (config.max_shift - config.base_shift) * (tokens - few) / (many - few)

    def shift_tokens(self, resolution: int) -> int:
        """How many tokens the stock pipeline tells a scheduler with dynamic shifting that a side in pixels has."""
        return (resolution // self.resolution_step) ** 2

    def quantise(self, kind: str) -> None:
        """Keep the denoiser's weights in fewer bits: float8, int8 or nf4.

        Raises:
            UserError: if that does not work in this family, or a package is missing.
        """
        raise UserError(
            "model.quantization is for transformers that are told prompts, and not for a "
            f"{type(self.pipe).__name__}; leave it out."
        )

    @classmethod
    def lora_targets_by(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the layers that a recipe's `auto` targets, by the denoiser's configuration."""
        return cls.lora_targets

    def mend_adapter(self, path: Path) -> None:
        """Called once the adapter of this file was loaded, for what loading does to it."""
        return

    # --- sampling ---------------------------------------------------------------------------------------------------

    @classmethod
    def few_steps_by(cls, configs: Configs) -> FewSteps | None:
        """How a model of this family draws that was distilled to few steps; None of one that was not."""
        steps = cls.distilled_steps
        return by_index(configs, steps) or by_scheduler(configs, steps) or by_name(configs, steps)

    @property
    def few_steps(self) -> FewSteps | None:
        """The same of this model."""
        config, scheduler = self.pipe.config, self.pipe.scheduler
        its = {**scheduler.config, "_class_name": type(scheduler).__name__}
        return self.few_steps_by(Configs(str(config.get("_name_or_path") or ""), config, its, self.denoiser.config))

    def few_step_arguments(self) -> dict[str, Any]:
        """What the stock pipeline's call is given where this model was distilled; nothing where it was not."""
        if (few := self.few_steps) is None:
            return {}
        return {"num_inference_steps": few.steps, **self.guidance_arguments(few.guidance_scale, 1)}

    def suited(self, settings: Settings) -> Settings:
        """Settings with the steps and the guidance that they leave out as this model draws."""
        few = self.few_steps
        return settings.for_model(None if few is None else few.drawn)

    def scheduler_of(self, solver: Solver) -> Any:
        """The scheduler of a solver, for the model's own process.

        Raises:
            UserError: if the model is none that the solver is for.
        """
        if solver == "own":
            return self.pipe.scheduler
        if self.process.prediction == "flow":
            raise UserError(
                f"bank.solver is {solver}, which is for models that predict noise or v, and this one is of flow "
                "matching; say own."
            )
        from diffusers import DPMSolverMultistepScheduler  # saves it where the model's own draws

        # its pipeline takes a learned variance off before the scheduler sees the prediction
        return DPMSolverMultistepScheduler.from_config(
            self.pipe.scheduler.config, algorithm_type=solver, variance_type=None
        )

    def sampler_settings(self, solver: Solver = "own") -> dict[str, Any]:
        """The scheduler that `sample` uses, by class and configuration."""
        scheduler = self.scheduler_of(solver)
        config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        return {"class": type(scheduler).__name__, **config}

    @contextmanager
    def solved_by(self, solver: Solver) -> Iterator[None]:
        """While open, `sample` draws with a solver."""
        own = self.pipe.scheduler
        self.pipe.scheduler = self.scheduler_of(solver)
        try:
            yield
        finally:
            self.pipe.scheduler = own

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
        resolution: int,
        control: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) in the denoiser's scale, drawn with the stock pipeline and its own scheduler.

        Row i depends on its prompt, generator and condition alone.

        Args:
            control: conditions (B, 3, H, W) uint8 for the ControlNet; without it the model alone draws.
        """
        pipe, options = self.pipe, self.prompt_arguments(prompts)
        if control is not None:
            pipe = self.prepare_control(self.placed(self.control_pipeline()))
            condition = to_tensor(control, self.condition_range).to(self.device, self.controlnet.dtype)
            options |= {self.control_argument: condition, "controlnet_conditioning_scale": 1.0}  # as it is trained
        pipe.set_progress_bar_config(disable=True)
        with self._drawing():
            drawn = pipe(
                **options,
                height=resolution,
                width=resolution,
                **self.step_arguments(steps),
                **self.guidance_arguments(guidance_scale, len(prompts)),
                generator=generators,
                output_type="latent",
            ).images.float()
        return self.drawn_latents(drawn, resolution)

    def step_arguments(self, steps: int) -> dict[str, Any]:
        """What the stock pipeline is given to draw in so many steps."""
        return {"num_inference_steps": steps}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """What the stock pipeline is given for classifier-free guidance at a scale of which 1 is none."""
        return {"guidance_scale": scale}

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        """Latents (B, C, h, w) in the denoiser's scale of what the stock pipeline gives for output_type latent."""
        return drawn

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Denoiser and ControlNet, and a text encoder that trains, in evaluation mode for the while."""
        modules = [m for m in (self.denoiser, self.controlnet) if m is not None]
        modules += [self.pipe.text_encoder] if self.encodes_in_step else []
        training = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, before in zip(modules, training):
                module.train(before)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_lora(
        self,
        folder: Path,
        layers: dict[str, Tensor],
        metadata: dict[str, Any],
        text_encoder_layers: dict[str, Tensor] | None = None,
        text_encoder_metadata: dict[str, Any] | None = None,
    ) -> None:
        """`pytorch_lora_weights.safetensors`; its metadata keep the scale right for any alpha."""
        if not hasattr(self.pipe, "save_lora_weights"):  # of a DiT or PixArt, which diffusers has no LoRA methods for
            assert text_encoder_layers is None
            save_transformer_lora(folder, layers, metadata)
            return
        named: dict[str, Any] = {f"{self.component}_lora_layers": layers}
        named[f"{self.component}_lora_adapter_metadata"] = metadata
        if text_encoder_layers is not None:
            named["text_encoder_lora_layers"] = text_encoder_layers
            named["text_encoder_lora_adapter_metadata"] = text_encoder_metadata
        type(self.pipe).save_lora_weights(folder, **named, safe_serialization=True)

    def save_trained_whole(self, folder: Path) -> None:
        """What `load_adapter` takes along, where `trained_whole` has something."""
        raise NotImplementedError

    def load_trained_whole(self, folder: Path) -> None:
        """The inverse, into parameters that train already; a UserError if they are of other classes."""
        raise NotImplementedError

    def save_pipeline(self, folder: Path) -> None:
        """A pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.pipe.save_pretrained(folder, safe_serialization=True)
        write_older_form(folder)
