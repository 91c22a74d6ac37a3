"""A stock pipeline's `__call__` with the hooks that settings ask for: what drop-ins and attached pipelines run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import Tensor

from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.errors import UserError
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.pipelines.checks import (
    NAMES,
    check_beside,
    check_cache,
    check_compiled,
    check_ip_adapter,
    check_nets,
    check_scalable,
    check_scale,
    check_unused,
    tuned_among,
)
from difftuning_control.pipelines.control_strength import ControlUse, check_skippable, control_strength
from difftuning_control.pipelines.freeu import freeu_alike
from difftuning_control.pipelines.guidance import (
    AtForward,
    TunedWeights,
    above,
    active_adapters,
    tuned_weights,
    tuner_layers,
)
from difftuning_control.pipelines.guiding import Guiding, guiding_of, has_negative
from difftuning_control.pipelines.hooks import SamplingHook, pausing
from difftuning_control.pipelines.prompts import encoding_negative_prompts
from difftuning_control.pipelines.settings import Extras
from difftuning_control.pipelines.strength import Strength

DIFFUSERS_CALLBACKS = (PipelineCallback, MultiPipelineCallbacks)  # known by their class; they draw nothing
CALLBACKS = {"callback_on_step_end", "callback"}  # the second is deprecated, and of Stable Diffusion in its `**kwargs`
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
logger = logging.get_logger(__name__)


def bound(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a stock `__call__` by name, defaults included."""
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    return call


def nets_of(pipe: Any) -> list[Any]:
    """A pipeline's ControlNets, none, one or several."""
    controlnet = getattr(pipe, "controlnet", None)
    return [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))


@dataclass
class Sampling:
    """The calls of a pipeline, drop-in or stock.

    Args:
        pipe: with a denoiser that is tuned.
        extras: its settings.
        source: the pretrained denoiser, where the tuned one's own weights were tuned.
        set_by: how sentences tell users to change a setting.

    Attributes:
        control_use: of the last call with a `control_schedule`, how often each ControlNet ran and was skipped.
    """

    pipe: Any
    extras: Extras
    source: Any = None
    set_by: str = "set_extras("
    control_use: list[ControlUse] = field(default_factory=list)

    @property
    def guiding(self) -> Guiding:
        return guiding_of(self.pipe)

    @property
    def component(self) -> str:
        return self.guiding.component

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.component)

    def run(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock `__call__`, with the hooks that the settings ask for; they pause in a callback.

        Raises:
            UserError: for arguments that the stock class swallows, and settings that cannot act.
        """
        check_unused(stock, self.pipe, kwargs)
        if not self.extras.is_active:
            return stock(self.pipe, *args, **kwargs)
        call = bound(stock, self.pipe, *args, **kwargs)
        with ExitStack() as stack:
            hooks = self._controls_hooked(stack) if self.extras.control_schedule is not None else []
            if self.extras.acts_on_weights:
                hooks.append(stack.enter_context(self._weights_hooked(call.arguments)))
            for given in (call.arguments, call.arguments.get("kwargs", {})):
                for name in CALLBACKS & given.keys():
                    if given[name] is not None and not isinstance(given[name], DIFFUSERS_CALLBACKS):
                        given[name] = pausing(given[name], hooks)
            if self.extras.changes_by_step and "use_kv_cache" in call.arguments:
                call.arguments["use_kv_cache"] = False  # which keeps what the first step's weights made of a prompt
            output = stock(*call.args, **call.kwargs)
        if self.extras.control_schedule is not None:
            for i, use in enumerate(self.control_use):
                saved = f", which saved about {use.seconds_saved:.2f} s" if use.seconds_saved is not None else ""
                logger.info(f"ControlNet {i} ran {use.run} times and was skipped {use.skipped} times{saved}.")
        return output

    # --- the denoiser -----------------------------------------------------------------------------------------------

    @contextmanager
    def _weights_hooked(self, call: dict[str, Any]) -> Iterator[SamplingHook]:
        extras, weights, guiding = self.extras, self.weights(), self.guiding
        branch: AtForward = lambda inputs, timestep: "tuned"  # noqa: E731
        scale = 1.0 if guiding.scale is None else call[guiding.scale]
        if extras.domain_guidance:
            check_scale(self.pipe, guiding, scale, extras.unconditional_strength)
        # at the scale that means no guidance the formula is the tuned prediction
        is_guided = extras.domain_guidance and scale > guiding.threshold(self.pipe)
        if is_guided or extras.changes_by_step:
            setting = "domain_guidance" if is_guided else extras.step_setting
            check_cache(self.denoiser, self.component, setting)
            self._check_norms(weights)
        if is_guided:
            if 0 < extras.unconditional_strength < 1:
                check_scalable(weights, "unconditional_strength between 0 and 1")
            branch = guiding.branch(self.pipe, call)
        in_halves = is_guided and extras.unconditional_strength < 1
        if (in_halves or extras.changes_by_step) and (nets := nets_of(self.pipe)):
            check_nets(self.pipe, nets, self._tuned(weights), guiding.lists and in_halves)
        strength = self._strength(weights)
        check_compiled(self.denoiser, self.component, self._changes_scales())
        encoders = self._tuned_text_encoders(weights.adapters)
        self._check_encoders(list(encoders), weights.adapters, is_guided, call)
        with ExitStack() as stack:
            if in_halves and encoders:
                its = list(encoders.values())
                how = guiding.encoders
                stack.enter_context(encoding_negative_prompts(self.pipe, its, how, extras.unconditional_strength))
            share = extras.unconditional_strength
            if self.source is not None:
                stack.enter_context(freeu_alike(unwrap_module(self.denoiser), unwrap_module(self.source)))
            yield stack.enter_context(
                tuned_weights(self.denoiser, weights, strength, branch, scale, share, guiding.lists)
            )

    def _changes_scales(self) -> str | None:
        """The setting that gives the adapter other strengths than on and off, if there is one."""
        if self.extras.adapter_schedule is not None:
            return "adapter_schedule"
        return "unconditional_strength" if 0 < self.extras.unconditional_strength < 1 else None

    def _check_encoders(self, tuned: Sequence[str], adapters: list[str], is_guided: bool, call: dict[str, Any]) -> None:
        """Refuse what a tuned text encoder would not follow."""
        if not tuned:
            return
        extras, first, named = self.extras, tuned[0], ", ".join(adapters)
        if extras.changes_by_step:
            setting = extras.step_setting
            raise UserError(
                f"{setting} acts on the {NAMES[self.component]}, but {named} tuned {', '.join(tuned)} too, which would "
                f"stay tuned at every step; {self.set_by}{setting}=None), or switch the text encoder's part off "
                f"(pipe.{first}.disable_adapters())."
            )
        if is_guided and self.guiding.encoders is None:
            raise UserError(
                f"{named} tuned {', '.join(tuned)} too, and how a {type(self.pipe).__name__} encodes negative prompts "
                f"is not known; switch the text encoder's part off (pipe.{first}.disable_adapters())."
            )
        if is_guided and self.guiding.alone and not has_negative(call):
            raise UserError(
                "the adapter tuned a text encoder too, and without a negative prompt domain_guidance asks the "
                'pretrained model under the same embeddings; give a negative_prompt, "" for none.'
            )

    def weights(self) -> TunedWeights:
        """The tuned weights and the pretrained ones behind them, as they are now.

        Raises:
            UserError: if it cannot be told which adapters were tuned, or there are none and no source.
        """
        adapters = tuned_among(
            active_adapters(self.denoiser),
            self.extras.tuned_adapters,
            NAMES[self.component],
            self.set_by,
            needed=self.source is None or self.extras.adapter_schedule is not None,
        )
        if self.extras.adapter_schedule is not None and not adapters:
            raise UserError(
                "adapter_schedule has no adapter to act on; load one (load_lora_weights or load_adapter), not fused."
            )
        weights = TunedWeights(tuner_layers(self.denoiser), adapters, self.source)
        if self.source is not None:
            check_beside(self.denoiser, self.source, self.component)
            check_ip_adapter(self.denoiser, self.source, self.component)
        return weights

    def _check_norms(self, weights: TunedWeights) -> None:
        """Refuse norm layers that a tuned LoRA may have exchanged; those of one beside it act as they are."""
        if not getattr(unwrap_module(self.denoiser), "_transformer_norm_layers", None):  # where diffusers keeps others
            return
        if self.source is not None or set(active_adapters(self.denoiser)) <= set(weights.adapters):
            raise UserError(
                "a LoRA exchanged norm layers of the transformer, which no setting can switch off; load it without "
                f"them, name the others ({self.set_by}tuned_adapters=[…])), or leave the settings of the adapter out."
            )
        logger.warning(
            "norm layers that a LoRA exchanged stay as they are wherever the tuned adapters are switched off."
        )

    def _tuned(self, weights: TunedWeights) -> list[Any]:
        """The parameters whose strength the settings change, and those beside them in the same layers."""
        if self.source is not None:
            return list(unwrap_module(self.denoiser).parameters())
        whole = [layer for layer in weights.layers if isinstance(layer, TrainedWhole)]
        layers = [layer for layer in weights.layers if not isinstance(layer, TrainedWhole)]
        return [p for layer in layers for p in layer.parameters()] + [p for w in whole for p in w.parameters.values()]

    def _strength(self, weights: TunedWeights) -> Callable[[Tensor], float]:
        """From a sampler's timestep to the strength of the tuned weights."""
        schedule, u0 = self.extras.adapter_schedule, self.extras.hand_over
        if schedule is None and u0 is None:
            return lambda timestep: 1.0
        if schedule is not None:
            check_scalable(weights, "adapter_schedule")
        process = self.process()
        is_above = above(process, u0) if u0 is not None else lambda timestep: True

        def strength(timestep: Tensor) -> float:
            if not is_above(timestep):
                return 0.0
            return schedule(process.u_at(timestep)) if schedule is not None else 1.0

        return strength

    def process(self) -> NoiseProcess:
        """The noise levels of the pipeline's scheduler, with the timesteps that its denoiser is told.

        Raises:
            UserError: if the scheduler has none that are known.
        """
        try:
            process = NoiseProcess.from_scheduler(self.pipe.scheduler)
        except ValueError as error:
            raise UserError(f"schedules over u do not work with this scheduler: {error}") from None
        return self.guiding.process(process, self.denoiser)

    def _tuned_text_encoders(self, adapters: list[str]) -> dict[str, TunedWeights]:
        """The weights of each text encoder that one of the tuned adapters acts in, by its name in the pipeline."""
        encoders = {name: getattr(self.pipe, name, None) for name in ENCODERS}
        tuned = {n: e for n, e in encoders.items() if e is not None and set(active_adapters(e)) & set(adapters)}
        return {name: TunedWeights(tuner_layers(encoder), adapters) for name, encoder in tuned.items()}

    # --- ControlNets ------------------------------------------------------------------------------------------------

    def _controls_hooked(self, stack: ExitStack) -> list[SamplingHook]:
        nets, schedules = nets_of(self.pipe), self.extras.control_schedule
        assert schedules is not None
        if len(schedules) != len(nets):
            raise UserError(
                f"control_schedule was set for {len(schedules)} ControlNets, and there are {len(nets)} now; "
                f"{self.set_by}control_schedule=[…]) anew, with one for each."
            )
        if is_compiled_module(self.pipe.controlnet) and hasattr(self.pipe.controlnet, "nets"):
            raise UserError(
                "the ControlNets were compiled as one, which control_schedule would have compiled anew at every step; "
                "compile each of them: pipe.controlnet.nets[0] = torch.compile(pipe.controlnet.nets[0])."
            )
        process = self.process()
        self.control_use = [ControlUse() for _ in nets]
        hooks = []
        for net, strength, use in zip(nets, schedules, self.control_use):
            check_compiled(net, "controlnet", None)
            check_skippable(net)
            hooks.append(stack.enter_context(control_strength(net, _at(strength, process), use)))
        return hooks


def _at(strength: Strength | None, process: NoiseProcess) -> Callable[[Tensor], float]:
    """From a sampler's timestep to a ControlNet's strength."""
    return lambda timestep: 1.0 if strength is None else strength(process.u_at(timestep))
