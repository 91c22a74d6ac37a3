"""What the ControlNet pipelines add: strength over the noise, and conditions made as in training.

image (a photo) → ControlSpec beside the weights → condition → the stock `__call__`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from PIL import Image

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs
from difftuning_control.pipelines.control_strength import ControlUse
from difftuning_control.pipelines.extras import CONTROL_SETTINGS, TunedSampling, like
from difftuning_control.pipelines.sampling import Sampling, bound, nets_of
from difftuning_control.pipelines.settings import UNCHANGED, extras_of
from difftuning_control.pipelines.specs import find_spec


class ControlledSampling(TunedSampling):
    """Mixed into a stock ControlNet pipeline class, before it.

    Attributes:
        control_use: of the last call with a `control_schedule`, how often each ControlNet ran and was skipped.
        controlnet_class, control_keys: of its ControlNets, and what their configuration and the denoiser's have in
            common.
        control_argument: of the call, that takes the condition.
        condition_range: what the stock pipeline makes of a picture.
        conditions_by_row: whether for several ControlNets and a batch it takes a list for each row, and not for each
            ControlNet.
    """

    controlnet: Any
    control_use: list[ControlUse]
    settings: ClassVar[dict[str, Any]] = {**TunedSampling.settings, **CONTROL_SETTINGS}
    controlnet_class: ClassVar[Any]
    control_keys: ClassVar[tuple[str, ...]] = ("in_channels", "num_attention_heads", "attention_head_dim")
    control_argument: ClassVar[str] = "control_image"
    condition_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    conditions_by_row: ClassVar[bool] = False

    def _start_extras(self, source: Any, *, control_schedule: Any = None, **settings: Any) -> None:
        self._specs: list[tuple[Any, ControlSpec]] = []  # each with its ControlNet, which may be exchanged
        self._conditioners: dict[int, Conditioner] = {}
        self.control_use = []
        super()._start_extras(source, **settings)
        self.set_extras(control_schedule=control_schedule)

    @classmethod
    def _call_of(cls, stock: Any) -> Callable[..., Any]:
        @like(stock.__call__, preprocess=False)
        def __call__(self: Any, *args: Any, preprocess: bool | Sequence[bool] = False, **kwargs: Any) -> Any:  # noqa: N807
            return self._sample_controlled(stock.__call__, args, kwargs, preprocess)

        return __call__

    @property
    def nets(self) -> list[Any]:
        """The ControlNets, one or several."""
        return nets_of(self)

    @classmethod
    def check_controlnet(cls, pipe: Any, controlnet: Any, name: str) -> None:
        """Refuse a ControlNet that was made for another model than a pipeline's.

        Raises:
            UserError: with the two values that differ.
        """
        compare_configs(getattr(pipe, cls.component), controlnet, name, cls.control_keys)

    # --- settings ---------------------------------------------------------------------------------------------------

    def set_extras(self, *, control_schedule: Any = UNCHANGED, **others: Any) -> None:
        """As `TunedSampling.set_extras`, and how strongly ControlNets act.

        Args:
            control_schedule: strength over u (`strength.as_strength`), on top of the call's conditioning scale, start
                and end; a list for each of several ControlNets. Where it is 0 the ControlNet is not run.

        Raises:
            UserError: for a value of another kind, out of its range, or a list of another length.
        """
        self._change(len(self.nets), control_schedule=control_schedule, **others)

    # --- conditions -------------------------------------------------------------------------------------------------

    def set_control_specs(self, specs: ControlSpec | Sequence[ControlSpec | None]) -> None:
        """How each ControlNet's conditions are made, where no `control_spec.json` lies beside its weights.

        Raises:
            UserError: if there is not one for each ControlNet, or it gives another range than the pipeline.
        """
        given: list[ControlSpec | None] = [specs] if isinstance(specs, ControlSpec) else list(specs)
        if len(given) != len(self.nets):
            raise UserError(
                f"there are {len(given)} control specs for {len(self.nets)} ControlNets; give one for each."
            )
        for spec in given:
            if spec is not None:
                spec.check_range(self.condition_range)
        self._specs = [(net, spec) for net, spec in zip(self._unwrapped_nets(), given) if spec is not None]

    def control_spec(self, index: int = 0) -> ControlSpec:
        """How the conditions of a ControlNet are made.

        Raises:
            UserError: if none was set and none lies beside its weights.
        """
        return self._spec(index)

    def _unwrapped_nets(self) -> list[Any]:
        """The ControlNets, each the same object before and after it is compiled."""
        return [unwrap_module(net) for net in self.nets]

    def _spec(self, index: int, missing_ok: bool = False) -> Any:
        """The spec that was set for a ControlNet that acts now, or that lies beside it; looked up once."""
        nets = self._unwrapped_nets()
        self._specs = [(net, spec) for net, spec in self._specs if net in nets]
        known = next((spec for net, spec in self._specs if net is nets[index]), None)
        if known is not None:
            return known
        own_spec = find_spec(nets[index], self.condition_range, missing_ok)
        self._specs += [(nets[index], own_spec)] if own_spec is not None else []
        return own_spec

    def _conditioner(self, index: int) -> Conditioner:
        spec, conditioner = self.control_spec(index), self._conditioners.get(index)
        if conditioner is None or conditioner.spec is not spec:
            pipe: Any = self
            conditioner = self._conditioners[index] = Conditioner(spec, pipe._execution_device)
        return conditioner

    def prepare_conditions(
        self, image: Any, preprocess: bool | Sequence[bool], height: int | None, width: int | None
    ) -> tuple[Any, int, int]:
        """Photos to conditions, as in training; also the size of the pictures to be drawn.

        Args:
            image: a PIL photo or a list of them for a batch; for several ControlNets a list with one for each, or, as
                in the stock class, such a list for each row of a batch (Stable Diffusion), or one of the batch's
                pictures for each ControlNet (SD3, FLUX).
            preprocess: for which of several ControlNets; the others' conditions are left as they are.

        Raises:
            UserError: if there are not as many as ControlNets, something is no PIL picture, or a spec is missing.
        """
        several, count = hasattr(self.controlnet, "nets"), len(self.nets)
        each = list(image) if several and isinstance(image, (list, tuple)) else [image]
        by_row = self.conditions_by_row and several and bool(each) and isinstance(each[0], list)
        each = [list(column) for column in zip(*each)] if by_row else each
        wanted = list(preprocess) if isinstance(preprocess, (list, tuple)) else [preprocess] * count
        if len(each) != count or len(wanted) != count:
            raise UserError(
                f"there are {len(each)} images and {len(wanted)} answers of preprocess for {count} ControlNets."
            )
        if height is None or width is None:
            side = next((self.control_spec(i).resolution for i, want in enumerate(wanted) if want), None)
            height, width = height or side, width or side
        assert height is not None
        assert width is not None
        conditions = [
            self._prepared(i, photos, not want, height, width) for i, (photos, want) in enumerate(zip(each, wanted))
        ]
        if by_row:
            return [list(row) for row in zip(*conditions)], height, width
        return (conditions if several else conditions[0]), height, width

    def _prepared(self, index: int, photos: Any, ready: bool, height: int, width: int) -> Any:
        if ready:
            return photos
        batch = list(photos) if isinstance(photos, (list, tuple)) else [photos]
        strange = [type(p).__name__ for p in batch if not isinstance(p, Image.Image)]
        if strange or not batch:
            found = "none" if not batch or photos is None else strange[0]
            raise UserError(
                f"preprocess=True takes PIL pictures; found {found}. Give {self.control_argument}=Image.open(…)."
            )
        conditions = [self._conditioner(index).prepare(photo, height, width) for photo in batch]
        return conditions if isinstance(photos, (list, tuple)) else conditions[0]

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _sample_controlled(
        self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], preprocess: Any
    ) -> Any:
        """The stock `__call__` on prepared conditions, with the hooks that the settings ask for."""
        if any(preprocess) if isinstance(preprocess, (list, tuple)) else preprocess:
            call = bound(stock, self, *args, **kwargs)
            given = call.arguments
            size = (given["height"], given["width"])
            prepared = self.prepare_conditions(given[self.control_argument], preprocess, *size)
            given[self.control_argument], given["height"], given["width"] = prepared
            args, kwargs = call.args[1:], call.kwargs
        sampling = Sampling(self, self.extras, self.source, control_use=self.control_use)
        try:
            return sampling.run(stock, args, kwargs)
        finally:
            self.control_use = sampling.control_use

    # --- from and to disk and other pipelines -----------------------------------------------------------------------

    @classmethod
    @like(DiffusionPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        pipe = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, ControlledSampling) and isinstance(pipe, ControlledSampling):
            pipe._specs = list(pipeline._specs)
        functions = extras_of(pipeline).control_schedule  # a function is in no configuration
        if functions is not None and isinstance(pipe, ControlledSampling) and pipe.nets == nets_of(pipeline):
            pipe.set_extras(control_schedule=kwargs.get("control_schedule", list(functions)))
        return pipe

    @like(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class, with every setting, and each `control_spec.json` beside its ControlNet's weights."""
        for i in range(len(self.nets)):
            self._spec(i, missing_ok=True)  # now, before weights are written where it may lie
        super().save_pretrained(*args, **kwargs)

    @like(DiffusionPipeline.save_config)
    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class, which calls it when all weights are written and nothing is pushed to the Hub yet."""
        parent: Any = super()
        parent.save_config(*args, **kwargs)
        save_directory = bound(DiffusionPipeline.save_config, self, *args, **kwargs).arguments["save_directory"]
        for i, net in enumerate(self._unwrapped_nets()):
            place = Path(save_directory) / ("controlnet" if i == 0 else f"controlnet_{i}")
            spec = next((spec for one, spec in self._specs if one is net), None)
            if spec is not None and place.is_dir():
                spec.save(place)
