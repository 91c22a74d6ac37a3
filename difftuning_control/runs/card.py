"""The model card of a run: what was trained, how it is loaded, what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from difftuning_control.data.label_space import LabelSpace
from difftuning_control.evaluation.band_losses import LossChanges
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.recipe.adapter_kinds import KINDS, LORA_KINDS
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.gate_results import GateResults
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.record_sections import Change
from difftuning_control.system.text import plain_markdown, python_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WHOLE_RUN = "`run.json` has the whole configuration; `recipe.yaml` repeats the run."


def base_name(model: str) -> str:
    """A base as others may read it: a Hub id as it is, of a directory the last part alone."""
    return model if model == "embedded" or is_hub_id(model) else Path(model).resolve().name


def is_hub_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def model_card(
    recipe: Recipe,
    run: RunRecord,
    use: list[str] | None = None,
    figures: list[str] | None = None,
    closing: str = WHOLE_RUN,
) -> str:
    """The README of a trained model: what it is, how to use it, what it was trained on and what was measured.

    Args:
        use: lines that say how it is used; those of the run's own folder when None.
        figures: lines with figures that were measured after the run.
        closing: the last line.
    """
    titles = {"lora": f"{KINDS[recipe.adapter.kind].title} for", "full": "Tuned from", "controlnet": "ControlNet for"}
    kind: str = "lora" if recipe.adapter.kind in LORA_KINDS else recipe.adapter.kind
    tag: list[str] = {"lora": [kind], "full": [], "controlnet": ["controlnet"]}[recipe.method]
    told = "class-conditional" if run.classes else "text-to-image"
    card = {
        "library_name": "diffusers",
        **({"base_model": recipe.model.id} if is_hub_id(recipe.model.id) else {}),
        "tags": [told, "diffusers", "difftuning-control", *tag],
        **({"instance_prompt": recipe.data.trigger} if recipe.data.trigger is not None else {}),
    }
    tuning = recipe.tuning
    if tuning.retention_ratio > 0:
        source = "from the bank" if tuning.retention_rows == "bank" else "its own pictures"
        taught = ", towards the pretrained model's prediction" if tuning.retention == "teacher" else ""
        words = f"retention and reconsolidation ({tuning.schedule.kind} schedule, {tuning.estimator} estimator, "
        words += f"λ = {tuning.retention_weight}, {tuning.retention_ratio:.0%} of the batch {source}{taught})"
    else:
        words = "plain fine-tuning"
    lines = [
        "---",
        yaml.safe_dump(card, sort_keys=False).strip(),
        "---",
        "",
        f"# {titles[recipe.method]} {plain_markdown(base_name(recipe.model.id))}",
        "",
        f"Tuned with difftuning-control on {run.data.pictures} pictures for {run.steps} steps: {words}.",
        "",
        *_trigger_lines(recipe.data.trigger),
        *(["```python", *_usage(recipe, run), "```"] if use is None else use),
        "",
        *_change_lines(run.changes),
        *_class_lines(run.classes),
        *(figures or []),
        *_fidelity_lines(run.fidelity),
        *_gate_lines(run.gates),
        "## Loss by noise band",
        "",
        *_loss_table(run.losses),
        "",
        closing,
        "",
    ]
    return "\n".join(lines)


def _trigger_lines(trigger: str | None) -> list[str]:
    """The words that call up what was learnt."""
    return [] if trigger is None else [f"Say **{plain_markdown(trigger)}** in a prompt.", ""]


def _change_lines(changes: list[Change]) -> list[str]:
    """What was changed on the way."""
    if not changes:
        return []
    said = [
        f"from step {c.step} on " + ", ".join(f"`{k}` {v[1]} (was {v[0]})" for k, v in c.keys.items()) for c in changes
    ]
    return [f"Changed on the way, so not bit-equal to an undisturbed run: {'; '.join(said)}.", ""]


def _class_lines(space: LabelSpace | None) -> list[str]:
    """Which number each class has, at most the first hundred."""
    if space is None:
        return []
    named = [f"{number} {plain_markdown(name)}" for name, number in space.classes.items()]
    more = f", … ({len(named)} in all)" if len(named) > 100 else ""
    what = "Classes of a new label space" if space.is_new else "Classes of the pictures"
    return [f"{what}: {', '.join(named[:100])}{more}.", ""]


def prompt_of(run: RunRecord) -> str:
    """One of a run's prompts as a string of Python."""
    return python_text(" ".join((run.prompts or [""])[0].split()))


def asked_for(run: RunRecord) -> str:
    """What a pipeline's call is given, in Python: one of the run's prompts, or its class."""
    prompt = prompt_of(run)
    if run.classes is None:
        return prompt
    return f"pipe.get_label_ids([{prompt}])" if run.classes.named else f"[{(run.prompts or [''])[0]}]"


def few_steps_of(run: RunRecord) -> str:
    """What the call of a base that was distilled is given beside, in Python, with a comma before it."""
    return "".join(f", {name}={value!r}" for name, value in run.few_steps.items())


def variant_of(recipe: Recipe) -> str:
    """What `from_pretrained` of the base is given for its variant, in Python, with a comma before it."""
    return f", variant={python_text(recipe.model.variant)}" if recipe.model.variant is not None else ""


def _usage(recipe: Recipe, run: RunRecord) -> list[str]:
    """The lines of Python that draw a picture with the result in stock diffusers."""
    places = run.places  # absolute, so that the lines run from any folder
    base = python_text(run.base_path if recipe.model.id == "embedded" else places.get("model", recipe.model.id))
    base += variant_of(recipe)
    folder = places.get("run", recipe.output)
    output = python_text(folder)
    prompt, few = prompt_of(run), few_steps_of(run)
    if run.control is not None:
        scale = f"controlnet_conditioning_scale=1.0{few}"
        place, (controlnet, pipeline) = python_text(f"{folder}/controlnet"), run.control.classes
        return [
            f"from diffusers import {controlnet}, {pipeline}",
            "from PIL import Image",
            "from difftuning_control import Conditioner, ControlSpec",
            "",
            f"controlnet = {controlnet}.from_pretrained({place})",
            f"pipe = {pipeline}.from_pretrained({base}, controlnet=controlnet)",
            f'condition = Conditioner(ControlSpec.load({place})).prepare(Image.open("photo.png"))',
            f"image = pipe({prompt}, {run.control.argument}=condition, {scale}).images[0]",
        ]
    call = f"image = pipe({asked_for(run)}{few}).images[0]"
    if recipe.method == "full":
        load = [f"pipe = DiffusionPipeline.from_pretrained({python_text(f'{folder}/pipeline')})"]
        return ["from diffusers import DiffusionPipeline", "", *load, call]
    start, load = ["from diffusers import DiffusionPipeline"], [f"pipe = DiffusionPipeline.from_pretrained({base})"]
    if KINDS[recipe.adapter.kind].loads_in_diffusers and run.stock_loads_lora:
        load.append(f"pipe.load_lora_weights({output})")
    else:
        start.append("from difftuning_control import load_adapter")
        if recipe.adapter.kind == "tlora" and run.stock_loads_lora:
            load.append("# pipe.load_lora_weights takes it too, but runs it at its full rank at every noise level")
        load.append(f"load_adapter(pipe, {output})")
    return [*start, "", *load, call]


def _fidelity_lines(curve: FidelityRecord | None) -> list[str]:
    if curve is None:
        return []
    names = list(curve.without)
    rows = [("without control", curve.without)]
    rows += [(f"step {step}", curve.row(i)) for i, step in enumerate(curve.steps)]
    shown = rows[:1] + rows[1:][:: max(1, len(rows) // 8)]
    shown += [rows[-1]] if rows[-1] not in shown else []
    change = curve.convergence
    said = "No convergence can be told from noise."
    if change is not None:
        way = "sudden" if change.sudden else "gradual"
        said = f"Convergence: {way}, at step {change.step:.0f} (from {change.start:.0f} to {change.end:.0f})."
    return [
        "## Fidelity to held-out conditions",
        "",
        f"Compared as {curve.kind}. {said}",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {label} | " + " | ".join(f"{row[n]:.3f}" for n in names) + " |" for label, row in shown),
        "",
    ]


def _gate_lines(judged: GateResults | None) -> list[str]:
    """The limits that the run was judged by, and whether it keeps them."""
    if judged is None:
        return []
    rows = [
        f"| {name} | {gate.shown} | at {gate.at} {gate.limit:g} | "
        f"{'yes' if gate.passed else '**no**'}{', within the noise' if gate.is_within_noise else ''} |"
        for name, gate in judged.figures.items()
    ]
    said = "The run passes its gates." if judged.passed else "**The run fails its gates.**"
    return ["## Quality gates", "", said, "", "| | measured | asked | passed |", "|---|---|---|---|", *rows, ""]


def _loss_table(losses: LossChanges) -> list[str]:
    if not losses:
        return ["Not measured: no pictures were held out and there was no bank."]
    rows = ["| noise band (centre u) | " + " | ".join(f"{role}, base | {role}, tuned" for role in losses) + " |"]
    rows.append("|---" * (1 + 2 * len(losses)) + "|")
    centres = next(iter(losses.values())).base.centres
    for i, centre in enumerate(centres):
        values = [bands.losses[i] for change in losses.values() for bands in (change.base, change.tuned)]
        rows.append(f"| {centre:.1f} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    return rows
