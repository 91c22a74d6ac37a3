"""The record of a run: `run.json`, the model card, and who may write into an output folder."""

from __future__ import annotations

import platform
import re
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from difftuning_control.adapters.kinds import LORA_KINDS
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.digests import digest_of
from difftuning_control.system.durable import discard, free, is_empty, sweep, write_text
from difftuning_control.system.text import plain_markdown, python_text
from difftuning_control.system.untrusted import from_json, read_text

WRITTEN = (
    "pytorch_lora_weights.safetensors", "pipeline", "recipe.yaml", "run.json", "metrics.jsonl", "README.md", "samples",
    "logs", "schedule.json", "controlnet", "fidelity.json", "report.html", "adapter", "difffit.safetensors",
    "class_embeddings.safetensors", "inputs.jsonl", "gates",
)  # fmt: skip
KIND_NAMES = {"lora": "LoRA", "dora": "DoRA", "tlora": "T-LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT",
              "boft": "BOFT", "ia3": "IA3", "difffit": "DiffFit"}  # fmt: skip
PACKAGES = ("difftuning-control", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def deciding_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values without what only watches or says where things are written."""
    values = recipe.to_dict()
    values.pop("output")
    values.pop("gates")
    values["data"].pop("cache")
    schedule = values["tuning"]["schedule"]
    if schedule["path"] is not None:  # what the file says, not where it lies
        schedule["path"] = recipe.tuning.schedule.build(1000).to_dict()
    values["data"].pop("max_pixels")  # what is left out shows in the data's fingerprint
    for name in ("resume", "checkpoint_every", "save_at", "validate_every", "sample_every", "sample_prompts",
                 "sample_steps", "sample_guidance_scale", "trackers", "shard"):  # fmt: skip
        values["training"].pop(name)
    values["control"].pop("workers")
    if recipe.training.stop_when is None:
        values["control"].pop("fidelity")
    return values


def rows_of_step(recipe: Recipe, processes: int) -> int:
    """How many rows all processes have in an optimizer step."""
    return recipe.training.batch_size * recipe.training.gradient_accumulation_steps * processes


def recipe_identity(recipe: Recipe, fingerprints: dict[str, Any], processes: int) -> str:
    """A digest of what decides the weights: the recipe without what only watches, and the inputs' fingerprints.

    Args:
        processes: how many share the work. How a step's rows are dealt out decides nothing but rounding.
    """
    values = deciding_settings(recipe)
    for name in ("batch_size", "gradient_accumulation_steps"):
        values["training"].pop(name)
    # where things lie does not matter: what they are is in the fingerprints
    for section, names in (("model", ("id",)), ("data", ("path", "validation_path")), ("bank", ("path",)),
                           ("control", ("path", "validation_path", "weights", "init"))):  # fmt: skip
        for name in names:
            values[section].pop(name)
    return digest_of([values, fingerprints, rows_of_step(recipe, processes)])


def read_run(output: Path) -> dict[str, Any] | None:
    """The `run.json` of an output folder, or None."""
    try:
        found = from_json(read_text(output / "run.json"))
        return found if isinstance(found, dict) and "status" in found else None
    except (OSError, ValueError):
        return None


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a run to resume or to overwrite."""
    if is_empty(output):
        return
    run = read_run(output)
    if resume and run is not None:
        return
    if run is None:
        raise UserError(f"the output {output} is not empty and holds no run; choose another folder.")
    if not overwrite:
        raise UserError(
            f"the output {output} already holds a run ({run.get('status')}); go on with --training.resume true, "
            "replace it with --overwrite, or choose another folder."
        )


def refuse_unwritable(output: Path) -> None:
    """Refuse an output before the work, not after it; nothing is left there.

    Raises:
        UserError: if there is a file where it or a folder above it should be, or nothing can be written in it.
    """
    if any(p.is_file() for p in (output, *output.parents)):
        raise UserError(f"the output {output} is a file or lies below one; name a folder.")
    place = next(p for p in (output, *output.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        said = f"the output {output} cannot be written ({error.strerror})"
        raise UserError(f"{said}; mend that, or choose another folder.") from None


def check_folder(path: str | Path, marker: str, overwrite: bool, option: str = "--output") -> None:
    """Refuse an output folder that holds something else than an earlier result, or one that is not to be replaced.

    Args:
        marker: the file that such a result always has.
        option: which names the folder.

    Raises:
        UserError: in these cases, and if nothing can be written there.
    """
    folder = Path(path)
    refuse_unwritable(folder)
    if not folder.exists() or is_empty(folder):
        return
    if not (folder / marker).exists():
        raise UserError(f"the output {folder} is not empty and holds no {marker}; choose another folder.")
    if not overwrite:
        raise UserError(f"the output {folder} already holds {marker}; give --overwrite or another {option}.")


class OutputFolder:
    """An output folder that one run writes into; its lock goes when the process does.

    Raises:
        UserError: if another run is writing there, nothing can be written, or the folder holds something and is neither
            to be resumed nor to be overwritten.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool):
        refuse_unwritable(path)
        self.path, self._created = path, [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"the output {path} is in use by another run; wait for it, or choose another folder."
            ) from None
        try:
            _check_output(path, resume, overwrite)
        except UserError:
            self.release()
            raise

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for folder in (self.path, self.path / "samples"):
            sweep(folder)

    def clear(self) -> None:
        """Remove what an earlier run wrote; other files are left alone."""
        self.sweep()
        # its checkpoints first and its record last: broken off, this leaves a run that can be overwritten once more
        for entry in sorted(self.path.iterdir(), key=lambda p: (p.name == "run.json", p.name)):
            if entry.name in WRITTEN or entry.name.startswith(("checkpoint-", "step-")):
                discard(entry) if entry.is_dir() else entry.unlink()

    def release(self) -> None:
        """Give the lock back; folders that were made for nothing go too."""
        if self._lock.is_locked:
            free(self._lock)
            self._lock.release()
        with suppress(OSError):  # the first that holds something
            for folder in self._created:
                folder.rmdir()


def write_recipe(output: Path, recipe: Recipe) -> None:
    write_text(output / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WHOLE_RUN = "`run.json` has the whole configuration; `recipe.yaml` repeats the run."


def base_name(model: str) -> str:
    """A base as others may read it: a Hub id as it is, of a directory the last part alone."""
    return model if model == "embedded" or is_hub_id(model) else Path(model).resolve().name


def is_hub_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def model_card(
    recipe: Recipe,
    run: dict[str, Any],
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
    titles = {"lora": f"{KIND_NAMES[recipe.adapter.kind]} for", "full": "Tuned from", "controlnet": "ControlNet for"}
    kind: str = "lora" if recipe.adapter.kind in LORA_KINDS else recipe.adapter.kind
    tag: list[str] = {"lora": [kind], "full": [], "controlnet": ["controlnet"]}[recipe.method]
    told = "class-conditional" if run.get("classes") else "text-to-image"
    card = {
        "library_name": "diffusers",
        **({"base_model": recipe.model.id} if is_hub_id(recipe.model.id) else {}),
        "tags": [told, "diffusers", "difftuning-control", *tag],
    }
    tuning = recipe.tuning
    if recipe.uses_bank:
        words = f"retention and reconsolidation ({tuning.schedule.kind} schedule, {tuning.estimator} estimator, "
        words += f"λ = {tuning.retention_weight}, {tuning.retention_ratio:.0%} of the batch from the bank)"
    else:
        words = "plain fine-tuning"
    lines = [
        "---", yaml.safe_dump(card, sort_keys=False).strip(), "---", "",
        f"# {titles[recipe.method]} {plain_markdown(base_name(recipe.model.id))}", "",
        f"Tuned with difftuning-control on {run['data']['pictures']} pictures for {run['steps']} steps: "
        f"{words}.", "", *(["```python", *_usage(recipe, run), "```"] if use is None else use), "",
        *_class_lines(run.get("classes")), *(figures or []), *_fidelity_lines(run.get("fidelity")),
        *_gate_lines(run.get("gates")),
        "## Loss by noise band", "", *_loss_table(run["losses"]), "", closing, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _class_lines(found: dict[str, Any] | None) -> list[str]:
    """Which number each class has, at most the first hundred."""
    if found is None:
        return []
    named = [f"{number} {plain_markdown(name)}" for name, number in found["classes"].items()]
    more = f", … ({len(named)} in all)" if len(named) > 100 else ""
    what = "Classes of a new label space" if found["label_space"] == "new" else "Classes of the pictures"
    return [f"{what}: {', '.join(named[:100])}{more}.", ""]


def prompt_of(run: dict[str, Any]) -> str:
    """One of a run's prompts as a string of Python."""
    return python_text(" ".join((run["prompts"] or [""])[0].split()))


def asked_for(run: dict[str, Any]) -> str:
    """What a pipeline's call is given, in Python: one of the run's prompts, or its class."""
    prompt = prompt_of(run)
    if (classes := run.get("classes")) is None:
        return prompt
    return f"pipe.get_label_ids([{prompt}])" if classes["named"] else f"[{run['prompts'][0]}]"


def _usage(recipe: Recipe, run: dict[str, Any]) -> list[str]:
    """The lines of Python that draw a picture with the result in stock diffusers."""
    base = python_text(run["base_path"] if recipe.model.id == "embedded" else recipe.model.id)
    output = python_text(recipe.output)
    prompt = prompt_of(run)
    if recipe.method == "controlnet":
        place, (controlnet, pipeline) = python_text(f"{recipe.output}/controlnet"), run["control"]["classes"]
        return [
            f"from diffusers import {controlnet}, {pipeline}",
            "from PIL import Image",
            "from difftuning_control import Conditioner, ControlSpec", "",
            f'controlnet = {controlnet}.from_pretrained({place})',
            f'pipe = {pipeline}.from_pretrained({base}, controlnet=controlnet)',
            f'condition = Conditioner(ControlSpec.load({place})).prepare(Image.open("photo.png"))',
            f"image = pipe({prompt}, {run['control']['argument']}=condition).images[0]",
        ]  # fmt: skip
    call = f"image = pipe({asked_for(run)}).images[0]"
    if recipe.method == "full":
        load = [f"pipe = DiffusionPipeline.from_pretrained({python_text(f'{recipe.output}/pipeline')})"]
        return ["from diffusers import DiffusionPipeline", "", *load, call]
    start, load = ["from diffusers import DiffusionPipeline"], [f"pipe = DiffusionPipeline.from_pretrained({base})"]
    stock = run.get("loads_lora", run.get("classes") is None)  # records of earlier versions do not say
    if recipe.adapter.kind in ("lora", "dora") and stock:
        load.append(f"pipe.load_lora_weights({output})")
    else:
        start.append("from difftuning_control import load_adapter")
        if recipe.adapter.kind == "tlora" and stock:
            load.append("# pipe.load_lora_weights takes it too, but runs it at its full rank at every noise level")
        load.append(f"load_adapter(pipe, {output})")
    return [*start, "", *load, call]


def _fidelity_lines(curve: dict[str, Any] | None) -> list[str]:
    if curve is None:
        return []
    names = list(curve["without"])
    rows = [("without control", curve["without"])]
    rows += [(f"step {step}", {n: curve["figures"][n][i] for n in names}) for i, step in enumerate(curve["steps"])]
    shown = rows[:1] + rows[1:][:: max(1, len(rows) // 8)]
    shown += [rows[-1]] if rows[-1] not in shown else []
    found = curve["convergence"]
    said = "No convergence can be told from noise."
    if found is not None:
        way = "sudden" if found["sudden"] else "gradual"
        said = f"Convergence: {way}, at step {found['step']:.0f} (from {found['start']:.0f} to {found['end']:.0f})."
    return [
        "## Fidelity to held-out conditions", "", f"Compared as {curve['kind']}. {said}", "",
        "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|",
        *(f"| {label} | " + " | ".join(f"{row[n]:.3f}" for n in names) + " |" for label, row in shown), "",
    ]  # fmt: skip


def _gate_lines(judged: dict[str, Any] | None) -> list[str]:
    """The limits that the run was judged by, and whether it keeps them."""
    if judged is None:
        return []
    rows = [
        f"| {name} | {'unknown' if g['value'] is None else format(g['value'], '.4g')} | at {g['at']} {g['limit']:g} | "
        f"{'yes' if g['passed'] else '**no**'} |"
        for name, g in judged["figures"].items()
    ]
    said = "The run passes its gates." if judged["passed"] else "**The run fails its gates.**"
    return ["## Quality gates", "", said, "", "| | measured | asked | passed |", "|---|---|---|---|", *rows, ""]


def _loss_table(losses: dict[str, Any]) -> list[str]:
    if not losses:
        return ["Not measured: no pictures were held out and there was no bank."]
    rows = [
        "| noise band (centre u) | " + " | ".join(f"{role}, {when}" for role in losses for when in ("base", "tuned"))
    ]
    rows[0] += " |"
    rows.append("|---" * (1 + 2 * len(losses)) + "|")
    centres = next(iter(losses.values()))["base"]["u"]
    for i, centre in enumerate(centres):
        values = [losses[role][when]["loss"][i] for role in losses for when in ("base", "tuned")]
        rows.append(f"| {centre:.1f} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    return rows
