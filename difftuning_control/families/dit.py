"""DiT: a transformer on VAE latents that is told a class instead of a prompt, and may predict its variance beside ε.

Wherever others have prompts, a DiT has the names of its classes; the empty prompt is its null class.

References:
    Scalable Diffusion Models with Transformers (Peebles & Xie, 2022), https://arxiv.org/abs/2212.09748
    Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.family import Family
from difftuning_control.families.fit import Fit
from difftuning_control.families.tunable import NAMES, load_classes, make_tunable, save_classes, tables_of, unknown
from difftuning_control.system.digests import digest_of
from difftuning_control.system.durable import write_json

STOCK_NULL = 1000  # the class that `DiTPipeline` draws without one, whatever the model's own number of classes
SPREAD = 0.02  # of new class embeddings, as a DiT's are drawn
DRAWS_BY_ITSELF = (
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
)


class DiT(Family):
    """A `DiTPipeline`. Conditioning: `class_labels` (B,) long.

    A new label space puts its classes into the first rows of the tables, whose size stays: the stock pipeline looks for
    the null class in row 1000 and nowhere else. Models with another number of classes are sampled with their own null
    class here; the stock pipeline cannot guide them.
    """

    name = "dit"
    fit = Fit({"lora": 1e-4, "full": 1e-4}, {"lora": 2000, "full": 24000}, 32, ("full",), schedule={})
    component = "transformer"
    class_conditional = True

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        make_tunable(pipe.transformer)
        for module in pipe.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # in training it would drop labels in each block anew; batches do that here
        self.has_new_classes = False

    def _check_variant(self) -> None:
        self.need("transformer", "vae")
        config, given = self.pipe.transformer.config, self.pipe.vae.config.latent_channels
        if config.in_channels != given:
            raise UserError(
                f"the transformer takes {config.in_channels} channels (a variant that fills in or edits pictures), the "
                f"autoencoder gives {given}; give a plain class-conditional model."
            )
        gives = self.pipe.transformer.out_channels
        if gives not in (given, 2 * given):
            raise UserError(
                f"the transformer gives {gives} channels; expected {given}, or {2 * given} with the variance."
            )
        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ in DRAWS_BY_ITSELF or "sde" in scheduler.config.get("algorithm_type", ""):
            raise UserError(
                f"the model's scheduler, a {type(scheduler).__name__}, draws noise of its own in every step, for which "
                "a DiTPipeline takes no seed; save the model with a DDIMScheduler."
            )

    @property
    def resolution_step(self) -> int:
        return self.native_resolution

    def check_resolution(self, side: int, name: str) -> None:
        """The pipeline draws at one size, for which the position embedding was made."""
        if side != self.native_resolution:
            raise UserError(f"{name} is {side}; this model draws at {self.native_resolution} pixels only.")

    @property
    def learned_variance(self) -> bool:
        return self.pipe.transformer.out_channels == 2 * self.pipe.transformer.config.in_channels

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        labels = conditioning["class_labels"]
        return {"hidden_states": noisy_model_input, "timestep": timesteps, "class_labels": labels}

    # --- classes ----------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, int]:
        """Names, of which a class may have several, to classes."""
        return self.pipe.labels

    @property
    def null_class(self) -> int:
        return self.pipe.transformer.config.num_embeds_ada_norm

    @property
    def class_names(self) -> list[str]:
        """A name a class; its number where it has none."""
        count = max(self.labels.values()) + 1 if self.labels else self.null_class
        named = {number: name for name, number in reversed(self.labels.items())}
        return [named.get(i, str(i)) for i in range(count)]

    def class_of(self, prompt: str) -> int:
        """The class of a name, or of a number that is no name; the null class of nothing.

        Raises:
            UserError: if the model has no such class.
        """
        if prompt == "":
            return self.null_class
        if prompt in self.labels:
            return self.labels[prompt]
        names = self.class_names
        if prompt.isdecimal():
            if int(prompt) < len(names):
                return int(prompt)
            raise UserError(f"there is no class {prompt}; the model has 0 to {len(names) - 1}.")
        close = difflib.get_close_matches(prompt, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names[:8])}{', …' * (len(names) > 8)}."
        raise UserError(f"the model has no class {prompt!r}; {hint}")

    def set_classes(self, names: list[str], seed: int | None) -> None:
        """A new label space: class i is names[i]; the null class stays as it is.

        Args:
            seed: what the embeddings are drawn from; with None they begin as those of the model's own class i.

        Raises:
            UserError: if these are too few or too many, or a name has a comma, at which the pipeline splits names.
        """
        if not 2 <= len(names) <= self.null_class:
            raise UserError(f"the data have {len(names)} classes; expected 2 to {self.null_class} for this model.")
        for name in names:
            if "," in name:
                raise UserError(f"the class {name!r} has a comma, at which a DiTPipeline splits names; rename it.")
        self.fingerprints  # noqa: B018, those of the model as it was loaded
        if seed is not None:
            tables = list(tables_of(self.denoiser).values())
            generator = torch.Generator().manual_seed(seed)
            rows = SPREAD * torch.randn(len(names), tables[0].shape[1], generator=generator)
            with torch.no_grad():
                for table in tables:
                    table[: len(names)] = rows.to(table)
        self.pipe.labels = dict(sorted((name, i) for i, name in enumerate(names)))
        self.has_new_classes = True

    @contextmanager
    def unknown_classes(self, count: int) -> Iterator[None]:
        """While open, the first `count` classes are the null class: a pretrained model knows no more of new ones."""
        kept = {table: table.data for table in tables_of(self.denoiser).values()}
        try:
            for table, values in kept.items():
                table.data = unknown(values, count)
            yield
        finally:
            for table, values in kept.items():
                table.data = values

    def trained_whole(self) -> dict[str, nn.Parameter]:
        """The tables of a new label space."""
        return tables_of(self.denoiser) if self.has_new_classes else {}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return super().fingerprints | {"classes": digest_of(self.labels)}

    @property
    def conditioning_fingerprint(self) -> str:
        return digest_of([self.labels, self.null_class])

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """`class_labels` (B,) of class names."""
        return {"class_labels": torch.tensor([self.class_of(p) for p in prompts], device=self.device)}

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        return 1, 1

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            self.class_of(prompt)

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
        """Latents (B, C, h, w), drawn with the stock pipeline, which gives decoded ones; they are caught before."""
        assert control is None
        self.check_resolution(resolution, "resolution")
        labels, pipe = [self.class_of(prompt) for prompt in prompts], self.pipe
        pipe.set_progress_bar_config(disable=True)
        with self._drawing(), self._own_null_class(len(labels)), self._undecoded() as caught:
            pipe(
                labels, guidance_scale=guidance_scale, generator=generators, num_inference_steps=steps, output_type="pt"
            )
        return caught[0].float() * pipe.vae.config.scaling_factor

    @contextmanager
    def _undecoded(self) -> Iterator[list[Tensor]]:
        """The latents that the pipeline would have decoded meanwhile."""
        caught: list[Tensor] = []

        def catch(latents: Tensor) -> Any:
            caught.append(latents)
            return SimpleNamespace(sample=latents.new_zeros(len(latents), 3, 1, 1))

        self.pipe.vae.decode = catch
        try:
            yield caught
        finally:
            del self.pipe.vae.decode

    @contextmanager
    def _own_null_class(self, count: int) -> Iterator[None]:
        """Rows after the first `count`, which the pipeline adds for guidance, get this model's null class."""
        if self.null_class == STOCK_NULL:
            yield
            return

        def mend(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            labels = kwargs["class_labels"].clone()
            labels[count:] = self.null_class
            return args, kwargs | {"class_labels": labels}

        handle = self.denoiser.register_forward_pre_hook(mend, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    # --- saving and loading -----------------------------------------------------------------------------------------

    def save_pipeline(self, folder: Path) -> None:
        """A pipeline directory that knows its classes by name, which diffusers itself leaves out."""
        super().save_pipeline(folder)
        index = folder / "model_index.json"
        if self.labels:
            names = {str(i): name for i, name in enumerate(self.class_names)}
            write_json(index, json.loads(index.read_text(encoding="utf-8")) | {NAMES: names})

    def save_trained_whole(self, folder: Path) -> None:
        """`class_embeddings.safetensors`, of a new label space."""
        save_classes(self.denoiser, folder, self.class_names)

    def load_trained_whole(self, folder: Path) -> None:
        load_classes(self.denoiser, folder, self.class_names)
