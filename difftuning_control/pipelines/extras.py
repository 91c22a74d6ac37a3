"""What the drop-in pipelines have in common: their settings, and the hooks that act while a stock `__call__` runs.

Without a setting nothing is hooked and the stock class runs as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from difftuning_control.adapters.snapshot import load_adapters, save_adapters, taken_off, tuned_modules
from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.pipelines.checks import (
    NAMES,
    check_cache,
    check_compiled,
    check_ip_adapter,
    check_scalable,
    check_source,
)
from difftuning_control.pipelines.guidance import (
    AtForward,
    SamplingHook,
    TunedWeights,
    above,
    active_adapters,
    pausing,
    tuned_weights,
    tuner_layers,
)
from difftuning_control.pipelines.saved import ADAPTERS, check_adapters, saved_folder, unsaved_settings
from difftuning_control.pipelines.strength import Strength, as_strength, check_u, stored

DIFFUSERS_CALLBACKS = (PipelineCallback, MultiPipelineCallbacks)  # known by their class; they draw nothing
UNCHANGED: Any = object()
AS_IT_IS: Any = object()  # the dtype that `from_pipe` casts shared modules to: none


@dataclass(frozen=True)
class Extras:
    """What a pipeline adds to its stock class.

    Args:
        domain_guidance: the unconditional branch of guidance comes from the pretrained model.
        tuned_adapters: names of the adapters that were tuned, in the pipeline; the only one that acts when None.
        adapter_schedule: strength of these adapters over u.
        hand_over: u₀ in [0, 1]; at u ≤ u₀ the pretrained model goes on.

    Raises:
        UserError: for a value of another kind or out of its range.
    """

    domain_guidance: bool = False
    tuned_adapters: tuple[str, ...] | None = None
    adapter_schedule: Strength | None = None
    hand_over: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.domain_guidance, bool):
            raise UserError(f"domain_guidance is {self.domain_guidance!r}; expected True or False.")
        if self.hand_over is not None:
            check_u(self.hand_over, "hand_over")
        if self.tuned_adapters is not None and not (
            self.tuned_adapters and all(isinstance(n, str) and n for n in self.tuned_adapters)
        ):
            raise UserError(f"tuned_adapters is {self.tuned_adapters!r}; expected names of adapters, or None.")

    @property
    def is_active(self) -> bool:
        return self.domain_guidance or self.adapter_schedule is not None or self.hand_over is not None


def like(stock: Callable[..., Any], **parameters: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a method the name, documentation and signature of a stock one, with further keyword parameters."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Any = functools.wraps(stock)(method)
        signature = inspect.signature(stock)
        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in parameters.items()]
        kept = list(signature.parameters.values())
        last = [kept.pop()] if kept[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        del wrapped.__wrapped__  # would be the stock call, which knows of no extras
        wrapped.__signature__ = signature.replace(parameters=[*kept, *added, *last])
        return wrapped

    return decorate


def bound(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a stock `__call__` by name, defaults included."""
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    return call


class TunedSampling:
    """Mixed into a stock pipeline class, before it.

    Attributes:
        component: the denoiser's name in the pipeline; with `source_` before it, the pretrained one's.
        source_keys: what the configurations of both have in common.
        guidance_argument: of the call, that is w under Domain Guidance.
    """

    extras: Extras
    component: ClassVar[str] = "transformer"
    source_keys: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "num_embeds_ada_norm",
    )
    guidance_argument: ClassVar[str] = "guidance_scale"

    def _start_extras(self, source: Any, *, saved_adapters: list[str] | None = None, **settings: Any) -> None:
        pipe: Any = self
        if source is not None:
            check_source(self.denoiser, source, self.component, self.source_keys)
        pipe.register_modules(**{self.source_name: source})
        self.extras = Extras()
        self._text_tuned: list[TunedWeights] = []  # of encoders that are pretrained for negative prompts
        self.set_extras(**settings)
        pipe.register_to_config(saved_adapters=None)  # in the configuration of a saved pipeline only
        if saved_adapters:
            load_adapters(self, saved_folder(pipe, saved_adapters))

    @property
    def denoiser(self) -> Any:
        """The tuned one."""
        return getattr(self, self.component)

    @property
    def source_name(self) -> str:
        return f"source_{self.component}"

    @property
    def source(self) -> Any:
        """The pretrained denoiser beside it, or None."""
        return getattr(self, self.source_name)

    # --- settings ---------------------------------------------------------------------------------------------------

    def set_extras(
        self,
        *,
        domain_guidance: bool = UNCHANGED,
        tuned_adapters: str | list[str] | None = UNCHANGED,
        adapter_schedule: Any = UNCHANGED,
        hand_over: float | None = UNCHANGED,
    ) -> None:
        """Change what is given and leave the rest; saved with the pipeline.

        Args:
            domain_guidance: take the unconditional branch from the pretrained model, ε_pretrained(x, ∅) +
                w (ε_tuned(x, c) − ε_pretrained(x, ∅)), w the `guidance_scale` of the call. At w = 1 that is the tuned
                prediction, and one forward.
            tuned_adapters: the adapters that were tuned, by name; needed where several act at once.
            adapter_schedule: their strength over u: a power, a table, a run's folder, or a function
                (`strength.as_strength`); None for full strength.
            hand_over: u₀; at u ≤ u₀ the pretrained model finishes the picture. None for never.

        Raises:
            UserError: for a value of another kind or out of its range.
        """
        given: dict[str, Any] = {"domain_guidance": domain_guidance, "hand_over": hand_over}
        if tuned_adapters is not UNCHANGED:
            listed = [tuned_adapters] if isinstance(tuned_adapters, str) else tuned_adapters
            given["tuned_adapters"] = None if listed is None else tuple(listed)
        if adapter_schedule is not UNCHANGED:
            given["adapter_schedule"] = None if adapter_schedule is None else as_strength(adapter_schedule)
        self.extras = replace(self.extras, **{k: v for k, v in given.items() if v is not UNCHANGED})
        pipe: Any = self
        names = self.extras.tuned_adapters
        pipe.register_to_config(
            domain_guidance=self.extras.domain_guidance,
            tuned_adapters=None if names is None else list(names),
            adapter_schedule=stored(self.extras.adapter_schedule),
            hand_over=self.extras.hand_over,
        )

    def _strengths(self) -> list[Strength]:
        return [s for s in [self.extras.adapter_schedule] if s is not None]

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _sample(
        self,
        stock: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        others: Sequence[SamplingHook] = (),
    ) -> Any:
        """The stock `__call__`, with the hooks that the settings ask for; these and the others pause in a callback."""
        if not self.extras.is_active and not others:
            return stock(self, *args, **kwargs)
        call = bound(stock, self, *args, **kwargs)
        with ExitStack() as stack:
            hooks = list(others)
            if self.extras.is_active:
                hooks.append(stack.enter_context(self._weights_hooked(call.arguments)))
            callback = call.arguments.get("callback_on_step_end")
            if callback is not None and not isinstance(callback, DIFFUSERS_CALLBACKS):
                call.arguments["callback_on_step_end"] = pausing(callback, hooks)
            return stock(*call.args, **call.kwargs)

    @contextmanager
    def _weights_hooked(self, call: dict[str, Any]) -> Iterator[SamplingHook]:
        extras, weights = self.extras, self._weights()
        branch: AtForward = lambda inputs: "tuned"  # noqa: E731
        scale = call[self.guidance_argument]
        if extras.domain_guidance:
            self._check_guidance(scale)
        is_guided = extras.domain_guidance and scale != 1  # at w = 1 the formula is the tuned prediction
        if is_guided:
            check_cache(self.denoiser, self.component)
            branch = self._branch(call)
        strength = self._strength(weights)
        check_compiled(self.denoiser, self.component, extras.adapter_schedule)
        encoders = self._tuned_text_encoders(weights.adapters)
        if encoders and (extras.hand_over is not None or extras.adapter_schedule is not None):
            setting = "adapter_schedule" if extras.hand_over is None else "hand_over"
            raise UserError(
                f"{setting} acts on the {NAMES[self.component]}, but {', '.join(weights.adapters)} tuned "
                f"{', '.join(encoders)} too, which would stay tuned at every step; set_extras({setting}=None), or "
                f"switch the text encoder's part off (pipe.{next(iter(encoders))}.disable_adapters())."
            )
        with ExitStack() as stack:
            if is_guided:
                self._text_tuned = list(encoders.values())
                stack.callback(self._text_tuned.clear)
            yield stack.enter_context(tuned_weights(self.denoiser, weights, strength, branch, scale))

    def _check_guidance(self, scale: float) -> None:
        """Refuse a scale below 1, at which the stock class has no second branch.

        Raises:
            UserError: in this case.
        """
        if not scale >= 1:
            raise UserError(
                f"domain_guidance does nothing at {self.guidance_argument} {scale:g}; give 1, which is the tuned model "
                "alone, or more, or set_extras(domain_guidance=False)."
            )

    def _branch(self, call: dict[str, Any]) -> AtForward:
        """Which weights answer a forward under Domain Guidance: a guided batch has its unconditional rows first."""
        pipe: Any = self
        return lambda inputs: "unconditional first" if pipe.do_classifier_free_guidance else "tuned"

    def _weights(self) -> TunedWeights:
        """The tuned weights and the pretrained ones behind them, as they are now.

        Raises:
            UserError: if it cannot be told which adapters were tuned, or there are none and no source.
        """
        acting, named = active_adapters(self.denoiser), self.extras.tuned_adapters
        absent, name = [n for n in named or () if n not in acting], NAMES[self.component]
        if absent:
            raise UserError(
                f"tuned_adapters names {', '.join(absent)}, which does not act in the {name} (acting: "
                f"{', '.join(acting) or 'none'}); load and activate it, not fused, or name another."
            )
        if named is None and len(acting) > 1 and (self.source is None or self.extras.adapter_schedule):
            raise UserError(
                f"several adapters act in the {name} ({', '.join(acting)}); say which were tuned: "
                f"set_extras(tuned_adapters=[{acting[0]!r}])."
            )
        adapters = list(named) if named is not None else acting if len(acting) == 1 else []
        if self.extras.adapter_schedule is not None and not adapters:
            raise UserError(
                "adapter_schedule has no adapter to act on; load one (load_lora_weights or load_adapter), not fused."
            )
        weights = TunedWeights(tuner_layers(self.denoiser), adapters, self.source)
        if self.source is not None:
            check_ip_adapter(self.denoiser, self.source, self.component)
        return weights

    def _strength(self, weights: TunedWeights) -> Callable[[Tensor], float]:
        """From a sampler's timestep to the strength of the tuned weights."""
        schedule, u0 = self.extras.adapter_schedule, self.extras.hand_over
        if schedule is None and u0 is None:
            return lambda timestep: 1.0
        if schedule is not None:
            check_scalable(weights)
        process = self._process()
        is_above = above(process, u0) if u0 is not None else lambda timestep: True

        def strength(timestep: Tensor) -> float:
            if not is_above(timestep):
                return 0.0
            return schedule(process.u_at(timestep)) if schedule is not None else 1.0

        return strength

    def _process(self) -> NoiseProcess:
        pipe: Any = self
        try:
            return NoiseProcess.from_scheduler(pipe.scheduler)
        except ValueError as error:
            raise UserError(f"schedules over u do not work with this scheduler: {error}") from None

    def _tuned_text_encoders(self, adapters: list[str]) -> dict[str, TunedWeights]:
        """The weights of each text encoder that one of the tuned adapters acts in, by its name in the pipeline."""
        encoders = {name: getattr(self, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        tuned = {n: e for n, e in encoders.items() if e is not None and set(active_adapters(e)) & set(adapters)}
        return {name: TunedWeights(tuner_layers(encoder), adapters) for name, encoder in tuned.items()}

    # --- from and to disk and other pipelines -----------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """As in the stock class; a source only where there is one, so that stock classes take them all."""
        found = super().components  # type: ignore[misc]
        return {k: v for k, v in found.items() if k != self.source_name or v is not None}

    @classmethod
    @like(DiffusionPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in the stock class, but shared modules keep their dtype and device unless `dtype` is given."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs = {**kwargs, **in_precision(AS_IT_IS)}
        parent: Any = super()
        found = parent.from_pipe(pipeline, **kwargs)
        functions = isinstance(pipeline, TunedSampling) and pipeline.extras.adapter_schedule
        if functions and "adapter_schedule" not in kwargs and isinstance(found, TunedSampling):
            found.set_extras(adapter_schedule=functions)  # a function is in no configuration
        return found

    @like(DiffusionPipeline.to)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class."""
        parent: Any = super()
        return self if kwargs.get("dtype") is AS_IT_IS else parent.to(*args, **kwargs)

    @like(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class, with every setting that has something to act on, and every adapter of the denoiser
        and the text encoders: `from_pretrained` loads them again, as they acted.

        Raises:
            UserError: if a schedule is a function, which no file can hold, or an adapter is of a kind or in a module
                that a saved pipeline does not hold; nothing is written then.
        """
        pipe: Any = self
        if any(strength.values is None for strength in self._strengths()):
            raise UserError("a schedule is a function, which cannot be saved; give a power or a table before saving.")
        names = check_adapters(pipe)
        place = Path(bound(DiffusionPipeline.save_pretrained, self, *args, **kwargs).arguments["save_directory"])
        settings = unsaved_settings(self, names)
        kept = {name: pipe.config[name] for name in (*settings, "saved_adapters")}
        save_adapters(pipe, names, place / ADAPTERS)
        parent: Any = super()
        try:
            pipe.register_to_config(saved_adapters=names or None, **settings)
            with taken_off(list(tuned_modules(pipe).values())):
                parent.save_pretrained(*args, **kwargs)
        finally:
            pipe.register_to_config(**kept)
