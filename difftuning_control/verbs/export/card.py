"""The model card of an export: the lines of Python that draw with exactly what was exported, and the run's figures."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.pipelines.guiding import BY_CLASS
from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.runs.card import asked_for, few_steps_of, model_card, variant_of
from difftuning_control.runs.gates import check_passed
from difftuning_control.system.text import code_span, plain_markdown, python_text

if TYPE_CHECKING:
    from difftuning_control.pipelines.registry import DropIn
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.requests import ExportRequest
    from difftuning_control.runs.record import RunRecord

CLOSING = "`export.json` says what was exported and which base it belongs to."
PLACES = {
    "kohya": "Put {file} where your program looks for LoRAs (`models/Lora` in the web UIs{scripts}). {reader} reads "
    "it too:",
    "comfyui": "Put {file} into `models/loras` of ComfyUI and load it by the node *LoraLoaderModelOnly* (or *Load "
    "LoRA*), behind a checkpoint of the base.",
}
TRUST = (
    "`trust_remote_code=True` lets diffusers run `{name}.py`, whose one line imports `{klass}` from the installed "
    "difftuning-control. `difftune export --pipeline stock` does without."
)
GUIDANCE = (
    "`pipe.set_extras(domain_guidance=True)` takes the unconditional branch of guidance from the pretrained model; "
    "start with a lower `guidance_scale` than otherwise."
)
SCHEDULE = (
    "`set_extras(adapter_schedule=…)` takes the `schedule` of `export.json`, the ψ of training, or one of your own."
)


DESPITE = "**Exported despite its quality gates** (`--despite-gates`): it fails them, or was not judged by them."


@dataclass(frozen=True)
class Parts:
    """What an export consists of.

    Args:
        stock: diffusers' class of the pipeline.
        ours: the drop-in; None in a stock export.
        controlnet: diffusers' class of the ControlNet, if there is one.
        file: the LoRA file for another program, if that is what was exported.
        component: the denoiser's name in the pipeline.
        absent: components that the model was saved without, which diffusers wants to be told.
        network: the module of sd-scripts that reads the LoRA file, where it has one.
    """

    stock: str
    ours: DropIn | None
    controlnet: str | None
    file: str | None
    component: str = "unet"
    absent: tuple[str, ...] = ()
    network: str | None = None


def export_card(request: ExportRequest, recipe: Recipe, run: RunRecord, parts: Parts, figures: list[str]) -> str:
    """The card's text.

    Args:
        figures: of `evaluation_lines`.
    """
    if request.format == "comfyui":
        use = [PLACES["comfyui"].format(file=code_span(parts.file or ""))]
    else:
        use = ["```python", *_code(request, recipe, run, parts), "```"]
    if request.format == "kohya":
        file, named = parts.file or "", parts.network
        words = code_span(f"--network_module {named} --network_weights {shlex.quote(file)}")
        scripts = f"; sd-scripts takes it with {words}" if named else ""
        reader = "Stock diffusers" if parts.component == "unet" else "This package"
        use = [PLACES["kohya"].format(file=code_span(file), scripts=scripts, reader=reader), "", *use]
    if parts.ours is not None:
        use += ["", TRUST.format(name=parts.ours.file, klass=parts.ours.name)]
        has_adapter = recipe.method == "lora" and request.adapter == "separate"
        scale = BY_CLASS[parts.ours.stock].scale  # None where there is no unconditional branch to be taken
        if scale is not None and (has_adapter or request.source_unet != "none"):
            use += ["", GUIDANCE.replace("guidance_scale", scale)]
        use += ["", SCHEDULE] if has_adapter else []
    if despite_gates(request, run):
        use += ["", DESPITE]
    return model_card(recipe, run, use, figures, CLOSING)


def despite_gates(request: ExportRequest, run: RunRecord) -> bool:
    """Whether an export was asked for that the run's gates would have refused."""
    if not request.despite_gates:
        return False
    try:
        check_passed(run, request.run)
    except UserError:
        return True
    return False


def _code(request: ExportRequest, recipe: Recipe, run: RunRecord, parts: Parts) -> list[str]:
    """Lines of Python: where things lie, the pipeline, what belongs to it, and a picture."""
    used: dict[str, list[str]] = {"diffusers": [], "difftuning_control": [], "huggingface_hub": [], "PIL": []}
    is_whole = request.format == "diffusers" and request.base == "copied"
    where = python_text(request.push or request.to)
    body = [f"folder = {where}" if request.push is None else f"folder = snapshot_download({where})"]
    if request.push is not None:
        used["huggingface_hub"].append("snapshot_download")
    klass, options = "DiffusionPipeline", ["folder" if is_whole else "base"]
    if not is_whole and recipe.model.id == "embedded":
        used["difftuning_control"].append("embedded_model")
        body.append("base = str(embedded_model())")
    elif not is_whole:
        body.append(f"base = {python_text(recipe.model.id)}")
    if parts.controlnet is not None and not is_whole:
        used["diffusers"].append(parts.controlnet)
        body.append(f'controlnet = {parts.controlnet}.from_pretrained(f"{{folder}}/controlnet")')
        options.append("controlnet=controlnet")
        klass = parts.stock if parts.ours is None else klass
    options += [f"{name}=None" for name in parts.absent]
    if parts.ours is not None:
        options += [] if is_whole else [f'custom_pipeline=f"{{folder}}/{parts.ours.file}.py"']
        options.append("trust_remote_code=True")
    used["diffusers"].append(klass)
    variant = "" if is_whole else variant_of(recipe)
    body.append(f"pipe = {klass}.from_pretrained({', '.join(options)}{variant})")
    if recipe.method == "lora" and request.adapter == "separate":
        if parts.file is not None and parts.component != "unet":  # kohya's names, which not every stock class reads
            used["difftuning_control"].append("load_adapter")
            body.append(f'load_adapter(pipe, folder + "/" + {python_text(parts.file)})')
        elif KINDS[recipe.adapter.kind].loads_in_diffusers and run.stock_loads_lora:
            name = "" if parts.file is None else f", weight_name={python_text(parts.file)}"
            body.append(f"pipe.load_lora_weights(folder{name})")
        else:
            used["difftuning_control"].append("load_adapter")
            body.append("load_adapter(pipe, folder)")
    if request.source_unet == "difference":
        used["difftuning_control"].append("load_source")
        body.append(f'source = load_source(pipe.{parts.component}, f"{{folder}}/source_difference.safetensors")')
        body.append(f"pipe.register_modules(source_{parts.component}=source)")
    if request.source_unet != "none" and parts.ours is not None and BY_CLASS[parts.ours.stock].scale is not None:
        body.append("pipe.set_extras(domain_guidance=True)")
    few = few_steps_of(run)
    prompt, image = asked_for(run), run.control.argument if run.control is not None else "image"
    if parts.controlnet is None:
        body.append(f"image = pipe({prompt}{few}).images[0]")
    elif parts.ours is not None:
        used["PIL"].append("Image")
        body.append(f'image = pipe({prompt}, {image}=Image.open("photo.png"), preprocess=True{few}).images[0]')
    else:
        used["PIL"].append("Image")
        used["difftuning_control"] += ["Conditioner", "ControlSpec"]
        spec = 'ControlSpec.load(f"{folder}/controlnet")'
        body.append(f'condition = Conditioner({spec}).prepare(Image.open("photo.png"))')
        body.append(f"image = pipe({prompt}, {image}=condition, controlnet_conditioning_scale=1.0{few}).images[0]")
    return [*(f"from {module} import {', '.join(sorted(names))}" for module, names in used.items() if names), "", *body]


def evaluation_lines(path: str, run: str, record: RunRecord) -> list[str]:
    """The figures that `difftune evaluate` gave a run and its base, as a table.

    Raises:
        UserError: if the file cannot be read, or does not have this run.
    """
    from difftuning_control.evaluation.report.tables import table_rows  # saves it where no evaluation is given

    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        side = next((s for s in result["sides"] if _is_of(s, run, record)), None)
        if side is not None:
            rows = table_rows({"base": result["base"], "sides": [{**side, "name": "tuned"}]})
            asked = result["settings"]
            prompts = f"{asked['pictures']} prompts, {len(asked['seeds'])} seeds"
            if not asked["pictures"]:  # too few were held out
                prompts = f"{len(asked['outside'])} prompts outside the new domain"
            words = f"{prompts}, {asked['steps']} steps, guidance "
            words += f"{asked['guidance_scale']:g}, features {plain_markdown(str(asked['features']))}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"the evaluation {path} cannot be read; name one of difftune evaluate.") from None
    if side is None:
        judged = ", ".join(str(s["name"]) for s in result["sides"])
        raise UserError(f"the evaluation {path} judged {judged}, not this run ({run}); evaluate it, or omit it.")
    table = [f"| {' | '.join(row)} |" for row in rows]
    table.insert(1, "|---" * len(rows[0]) + "|")
    return [
        "## Pictures against real ones" if asked["pictures"] else "## What was kept",
        "",
        f"{words}; mean ± standard deviation over seeds.",
        "",
        *table,
        "",
    ]


def _is_of(side: dict[str, Any], run: str, record: RunRecord) -> bool:
    """Whether figures are this run's: by its identity, or by its place in files of earlier versions."""
    if "identity" in side:
        return side["identity"] == record.identity
    return Path(side["name"]).resolve() == Path(run).resolve()
