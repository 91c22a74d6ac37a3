"""What training, bank and analysis need of a model; a family's own file adds what is peculiar to it.

A family decides what `conditioning` means: a dict of tensors, one row a picture, that `encode_prompts` makes of prompts
and `denoiser_inputs` turns into the denoiser's own arguments. Nobody else looks into it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.control import ControlledDenoiser, to_tensor
from difftuning_control.families.tunable import save_transformer_lora
from difftuning_control.objective.noise import BaseDensity, NoiseProcess
from difftuning_control.system.digests import digest_of
from difftuning_control.system.tensors import digest_of_module

if TYPE_CHECKING:
    from typing_extensions import Self

    from difftuning_control.families.prompts import PromptEmbeddings


class Family(ABC):
    """A model of one family, around a diffusers pipeline object.

    The pipeline's modules are used as they are: a denoiser that is tuned here is tuned in `pipe` too. `controlnet` is
    the one that `sample` and `model` use where a condition is given; None until somebody sets it. With
    `encodes_in_step` prompts are rows of tokens, and `model` encodes them: for a text encoder that trains or trained.
    """

    name: ClassVar[str]
    component: ClassVar[str]  # of the pipeline, that is tuned: unet or transformer
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora_targets: ClassVar[tuple[str, ...]] = ()  # empty where no text encoder is trained
    base_density: ClassVar[BaseDensity] = "uniform"  # how often the family trains at each noise level
    class_conditional: ClassVar[bool] = False  # told a class, and has its names for prompts; see `dit`
    takes_sizes: ClassVar[bool] = False  # whether `conditioning` may hold `sizes`, see `cache.Framing.sizes`
    controlnet_class: ClassVar[Any] = None  # None where diffusers has no ControlNet
    control_pipeline_class: ClassVar[Any] = None
    control_argument: ClassVar[str] = "image"  # of that pipeline's call
    condition_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # what that pipeline makes of a picture
    encodes_control: ClassVar[bool] = False  # whether a ControlNet reads latents, and not pictures
    controlnet_whole: ClassVar[tuple[str, ...]] = ()  # what a LoRA of a ControlNet trains whole: its input, its zeros

    def __init__(self, pipe: Any):
        self.pipe = pipe  # Any: diffusers' annotations leave out most of its modules' methods
        self._check_variant()
        self.process = NoiseProcess.from_scheduler(pipe.scheduler, self.base_density)
        self.controlnet: Any = None
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

    # --- the model --------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.component)

    @property
    def model(self) -> Any:
        """What `predict` is given: the denoiser, with its ControlNet if there is one."""
        if self.controlnet is None:
            return self.denoiser
        return ControlledDenoiser(self.denoiser, self.controlnet, self.residuals)

    @property
    def modules(self) -> dict[str, Any]:
        """What weights are loaded, by name: denoiser, vae, and the text encoders that there are."""
        found = {"denoiser": self.denoiser, "vae": self.pipe.vae}
        named = self.pipe.components.items()
        return found | {n: m for n, m in named if n.startswith("text_encoder") and m is not None}

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

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.vae.dtype

    def to(self, device: torch.device | str) -> Self:
        """Move all modules, with `offload` all but the text encoders."""
        if not self.offload:
            self.pipe.to(device)
        for name, module in self.modules.items() if self.offload else ():
            module.to("cpu" if name.startswith("text_encoder") else device)
        return self

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

    def quantise(self, kind: str) -> None:
        """Keep the denoiser's weights in fewer bits: float8, int8 or nf4.

        Raises:
            UserError: if that does not work in this family, or a package is missing.
        """
        raise UserError(
            "model.quantization is for the transformers of SD3, FLUX, PixArt, Sana and Lumina2, and this is a "
            f"{type(self.pipe).__name__}; leave it out."
        )

    def mend_adapter(self, path: Path) -> None:
        """Called once the adapter of this file was loaded, for what loading does to it."""
        return

    @property
    def learned_variance(self) -> bool:
        """Whether `predict` gives (B, 2C, h, w): the prediction, and v of `variance.py`."""
        return False

    def trained_whole(self) -> dict[str, nn.Parameter]:
        """Parameters of the denoiser that train beside any adapter: what it was given anew for this run."""
        return {}

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    @abstractmethod
    def resolution_step(self) -> int:
        """Sides must be multiples of this many pixels."""

    def check_resolution(self, side: int, name: str) -> None:
        """Refuse a side in pixels that the model cannot take.

        Raises:
            UserError: saying under which name it was given.
        """
        if side % self.resolution_step:
            raise UserError(
                f"{name} is {side}; this model takes multiples of {self.resolution_step} (its own is "
                f"{self.native_resolution})."
            )

    def training_process(self, resolution: int) -> NoiseProcess:
        """The forward process to train with at a side in pixels: that of the scheduler, with its dynamic shift.

        A flow-matching scheduler with dynamic shifting draws larger pictures at more noise,
        σ' = s σ / (1 + (s − 1) σ), s = e^μ, μ linear in the number of tokens; training at the same levels puts the
        work where sampling will be (Esser et al., 2024, https://arxiv.org/abs/2403.03206, section 5.3.2).
        """
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return self.process
        tokens = self.shift_tokens(resolution)
        few, many = config.base_image_seq_len, config.max_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - few) / (many - few)
        return self.process.shifted(math.exp(mu) if config.time_shift_type == "exponential" else mu)

    def shift_tokens(self, resolution: int) -> int:
        """How many tokens the stock pipeline tells a scheduler with dynamic shifting that a side in pixels has."""
        return (resolution // self.resolution_step) ** 2

    @abstractmethod
    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The denoiser's keyword arguments, as the stock pipeline passes them."""

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
        return denoiser(**inputs, return_dict=False)[0]

    # --- identity -------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each component's weights as loaded, taken on first use: read it before anything is tuned."""
        found = {name: digest_of_module(module) for name, module in self.modules.items()}
        for name, part in self.pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                found[name] = digest_of({"vocabulary": part.get_vocab(), "length": part.model_max_length})
        return found

    @property
    def fingerprint(self) -> str:
        return digest_of(self.fingerprints)

    @property
    def conditioning_fingerprint(self) -> str:
        """Changes when what `encode_prompts` gives does."""
        found = {name: digest for name, digest in self.fingerprints.items() if name not in ("denoiser", "vae")}
        return digest_of([found, str(self.dtype)])

    def sampler_settings(self) -> dict[str, Any]:
        """The scheduler that `sample` uses, by class and configuration."""
        config = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        return {"class": type(self.pipe.scheduler).__name__, **config}

    # --- pictures and latents -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, unscaled float32, (B, C, h, w).

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
        """
        posterior = self.pipe.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def scale_latents(self, latents: Tensor) -> Tensor:
        """VAE latents to the denoiser's scale."""
        return (latents - self.latent_shift) * self.pipe.vae.config.scaling_factor

    @property
    def latent_shift(self) -> float:
        """What is taken from VAE latents before they are scaled."""
        return self.pipe.vae.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of the denoiser's latents."""
        latents = latents.to(self.device, self.dtype) / self.pipe.vae.config.scaling_factor
        return self.pipe.vae.decode(latents + self.latent_shift).sample.float().clamp(-1, 1)

    # --- prompts ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The conditioning of these prompts, each tensor (B, …), as the stock pipeline makes it."""

    def tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        """The conditioning where `model` encodes prompts: `prompt_ids`, as the stock pipeline tokenizes them."""
        raise NotImplementedError

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has, and how many the text encoder takes; both count the end marks."""
        tokenizer = self.pipe.tokenizer
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids), tokenizer.model_max_length

    def check_prompts(self, prompts: list[str]) -> None:  # noqa: B027 most families take any text
        """Refuse prompts that the model has no condition for; nothing is encoded. Any text is one.

        Raises:
            UserError: with the prompt, for a class-conditional model without that class.
        """

    def remember(self, embeddings: PromptEmbeddings) -> None:
        """Keep what prompts are encoded as, where `offload` makes encoding them again expensive."""
        if self.offload:
            self._remembered.append(embeddings)

    def _remember(self, prompt: str) -> bool:
        """Whether it is known what a prompt is encoded as; of the cached ones it is read."""
        if prompt not in self._known:
            found = next((e for e in self._remembered if prompt in e.index), None)
            if found is None:
                return False
            self._known[prompt] = {name: tensor[0] for name, tensor in found.rows([prompt]).items()}
        return True

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """What the stock pipeline is given for these prompts; with `offload` it is their embeddings."""
        return self.embedding_arguments(prompts) if self.offload else {"prompt": prompts}

    def embedding_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Embeddings of the prompts, and of the empty one for guidance, by the names of the pipeline's call."""
        fresh = [p for p in dict.fromkeys([*prompts, ""]) if not self._remember(p)]
        if fresh:
            with self.encoding():
                found = {name: tensor.cpu() for name, tensor in self.encode_prompts(fresh).items()}
            self._known |= {p: {name: t[i] for name, t in found.items()} for i, p in enumerate(fresh)}
        rows = {n: torch.stack([self._known[p][n] for p in prompts]) for n in self._known[""]}
        rows |= {f"negative_{n}": torch.stack([t] * len(prompts)) for n, t in self._known[""].items()}
        return {name: tensor.to(self.device) for name, tensor in rows.items()}

    # --- sampling ---------------------------------------------------------------------------------------------------

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
            pipe = self.control_pipeline()
            condition = to_tensor(control, self.condition_range).to(self.device, self.controlnet.dtype)
            options[self.control_argument] = condition
        pipe.set_progress_bar_config(disable=True)
        with self._drawing():
            return pipe(
                **options,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="latent",
            ).images.float()

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

    # --- control ----------------------------------------------------------------------------------------------------

    def encode_control(self, control: Tensor) -> Tensor:
        """Conditions (B, 3, H, W) uint8 as the ControlNet takes them: pictures in `condition_range`."""
        return to_tensor(control, self.condition_range)

    @property
    def control_fingerprint(self) -> str:
        """Changes when what `encode_control` gives does, where it encodes."""
        raise NotImplementedError

    @staticmethod
    def residuals(controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's further arguments that a ControlNet gives for a condition and the denoiser's own arguments."""
        raise NotImplementedError

    def control_pipeline(self) -> Any:
        """The stock ControlNet pipeline around the same modules."""
        return self.control_pipeline_class(**self.pipe.components, controlnet=self.controlnet)

    @property
    def channel_order(self) -> str:
        """What the ControlNet itself turns the RGB that it is given into."""
        config = self.controlnet.config if self.controlnet is not None else {}
        return config.get("controlnet_conditioning_channel_order", "rgb")

    def need_controlnet(self) -> None:
        """Refuse a family that has no ControlNets.

        Raises:
            UserError: naming the pipeline.
        """
        if self.controlnet_class is None:
            raise UserError(
                f"there is no ControlNet for a {type(self.pipe).__name__} here; train a LoRA or all weights instead."
            )

    def new_controlnet(self, seed: int) -> Any:
        """A ControlNet that starts as a copy of the denoiser's first layers and adds nothing yet, float32.

        `seed` draws whatever has no counterpart in the denoiser.

        Raises:
            UserError: if the family has none.
        """
        from difftuning_control.families.hub import quiet_loading

        self.need_controlnet()
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self._new_controlnet()
        return found.float().to(self.device)

    def _new_controlnet(self) -> Any:
        raise NotImplementedError

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        """Refuse a ControlNet that was made for another model.

        Raises:
            UserError: with the two numbers that differ.
        """
        raise NotImplementedError

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

    def save_controlnet(self, folder: Path, controlnet: Any) -> None:
        """A directory for the ControlNet class's `from_pretrained`."""
        controlnet.save_pretrained(folder, safe_serialization=True)

    def save_pipeline(self, folder: Path) -> None:
        """A pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.pipe.save_pretrained(folder, safe_serialization=True)
