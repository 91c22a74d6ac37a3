"""From a running pipeline to one with a control, sharing all weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.utils.torch_utils import unwrap_module

from difftuning_control.adapters.files import DIFFFIT_FILE, LORA_FILE, PEFT_FOLDER
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.tuning import ControlNetTuning
from difftuning_control.data.control_spec import ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.families.hub import quiet_loading
from difftuning_control.families.loading import load_controlnet_model
from difftuning_control.pipelines.registry import BY_STOCK
from difftuning_control.pipelines.settings import extras_of

ADAPTER_RESULTS = (LORA_FILE, DIFFFIT_FILE, PEFT_FOLDER)


def controlled(name: str) -> Any:
    """The class of ours that a pipeline of a stock class becomes with a ControlNet; None where there is none."""
    row = BY_STOCK.get(name)
    if row is None or row.control is None:
        return None
    return getattr(import_module("difftuning_control.pipelines"), BY_STOCK[row.control].name)


def add_control(
    pipe: Any,
    controlnet: Any,
    *,
    adapter: str | Path | None = None,
    spec: ControlSpec | Sequence[ControlSpec | None] | None = None,
    **extras: Any,
) -> Any:
    """A ControlNet pipeline around the modules of a running one, which goes on as it is.

    Adapters, device, dtype and settings come along; a pipeline that has ControlNets keeps them, and the new ones come
    after them.

    Args:
        pipe: a Stable Diffusion, SDXL, SD3 or FLUX text-to-image or ControlNet pipeline, of diffusers or of this
            package.
        controlnet: a model of diffusers' class, its folder or Hub id, the output folder of a run, or a list of these;
            moved to the device and dtype that the denoiser computes with.
        adapter: the output folder of a run or a file, as `load_adapter` takes it, under the name `default`; it acts in
            `pipe` too, whose denoiser is shared.
        spec: how the new ControlNets' conditions are made, where no `control_spec.json` lies beside their weights.
        extras: settings as `set_extras` takes them.

    Raises:
        UserError: if the pipeline is of another kind, a ControlNet was made for another base, or the adapter does not
            fit; the pipeline is then as it was.
    """
    target = next((made for c in type(pipe).__mro__ if (made := controlled(c.__name__)) is not None), None)
    if target is None:
        raise UserError(
            f"a control can be added to Stable Diffusion, SDXL, SD3 and FLUX text-to-image pipelines, and this is a "
            f"{type(pipe).__name__}; make one of those with from_pipe first."
        )
    has = getattr(pipe, "controlnet", None)
    present = [] if has is None else list(getattr(has, "nets", [has]))
    added = load_controlnets(pipe, controlnet, target)
    nets = [*present, *added]
    if (schedule := extras_of(pipe).control_schedule) is not None:
        extras = {"control_schedule": [*schedule, *[None] * len(added)]} | extras
    made = target.from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0], **extras)
    if spec is not None:
        given = [spec] if isinstance(spec, ControlSpec) else list(spec)
        made.set_control_specs([*(made._spec(i, missing_ok=True) for i in range(len(present))), *given])
    if adapter is not None:
        load_adapter(made, adapter)
    return made


def controlnet_place(path: str | Path) -> str:
    """The folder of a ControlNet in the output of a run; any other folder or Hub id as it is.

    Raises:
        UserError: for the output of a run that trained something else.
    """
    place = Path(path).expanduser()
    if not place.is_dir() or (place / "config.json").exists():
        return str(path) if not place.exists() else str(place)
    if (place / ControlNetTuning.result / "config.json").exists():
        return str(place / ControlNetTuning.result)
    if any((place / name).exists() for name in ADAPTER_RESULTS):
        raise UserError(f"{path} holds an adapter and no ControlNet; give it as adapter, or load_adapter(pipe, …).")
    raise UserError(f"{path} holds no ControlNet; expected a ControlNet's folder, or the output folder of its run.")


def load_controlnets(pipe: Any, given: Any, target: Any) -> list[Any]:
    """ControlNets of a pipeline's device and dtype, from a model, a folder or Hub id, or a list of these.

    Args:
        target: the class of ours that they are for.

    Raises:
        UserError: if one cannot be loaded, or was made for another model.
    """
    klass, dtype = target.controlnet_class, getattr(pipe, target.component).dtype
    controlnets, each = [], given if isinstance(given, (list, tuple)) else [given]
    if not each:
        raise UserError(f"there is no ControlNet to add; expected a {klass.__name__}, its folder, or a list of these.")
    for i, one in enumerate(each):
        name = str(one) if isinstance(one, (str, Path)) else f"number {i + 1}"
        if isinstance(one, (str, Path)):
            one = load_controlnet_model(klass, controlnet_place(one), dtype)
        if not isinstance(unwrap_module(one), klass):
            raise UserError(f"{name} is a {type(one).__name__}; expected a {klass.__name__}, its folder or its Hub id.")
        name = one.config.get("_name_or_path") or name
        target.check_controlnet(pipe, one, name)
        with quiet_loading():  # diffusers names the modules to keep in float32 even where there are none
            controlnets.append(one.to(pipe._execution_device, dtype))  # an offloaded denoiser lies elsewhere
    return controlnets
