"""The record of a run: `run.json`, the model card, and who may write into an output folder."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from difftuning_control.adapter_kinds import LORA_KINDS
from difftuning_control.durable import discard, free, is_empty, sweep
from difftuning_control.errors import UserError
from difftuning_control.fingerprint import digest_of, write_text
from difftuning_control.recipe import Recipe
from difftuning_control.words import harmless

WRITTEN = (
    "pytorch_lora_weights.safetensors", "pipeline", "recipe.yaml", "run.json", "metrics.jsonl", "README.md", "samples",
    "logs", "schedule.json", "controlnet", "fidelity.json", "report.html", "adapter", "difffit.safetensors",
    "class_embeddings.safetensors",
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
    values["data"].pop("cache")
    schedule = values["tuning"]["schedule"]
    if schedule["path"] is not None:  # what the file says, not where it lies
        schedule["path"] = recipe.tuning.schedule.build(1000).to_dict()
    for name in ("resume", "checkpoint_every", "save_at", "validate_every", "sample_every", "sample_prompts",
                 "sample_steps", "sample_guidance_scale", "trackers"):  # fmt: skip
        values["training"].pop(name)
    values["control"].pop("workers")
    if recipe.training.stop_when is None:
        values["control"].pop("fidelity")
    return values


def recipe_identity(recipe: Recipe, fingerprints: dict[str, Any], processes: int) -> str:
    """A digest of what decides the weights: the recipe without what only watches, and the inputs' fingerprints.

    Args:
        processes: how many share the work; the batch is theirs together.
    """
    values = deciding_settings(recipe)
    # where things lie does not matter: what they are is in the fingerprints
    for section, names in (("model", ("id",)), ("data", ("path", "validation_path")), ("bank", ("path",)),
                           ("control", ("path", "validation_path", "weights", "init"))):  # fmt: skip
        for name in names:
            values[section].pop(name)
    return digest_of([values, fingerprints, processes])


def read_run(output: Path) -> dict[str, Any] | None:
    """The `run.json` of an output folder, or None."""
    try:
        return json.loads((output / "run.json").read_text(encoding="utf-8"))
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


def refuse_file(output: Path) -> None:
    """A UserError if there is a file where the output or a folder above it should be."""
    if any(p.is_file() for p in (output, *output.parents)):
        raise UserError(f"the output {output} is a file or lies below one; name a folder.")


def check_folder(path: str | Path, marker: str, overwrite: bool, option: str = "--output") -> None:
    """Refuse an output folder that holds something else than an earlier result, or one that is not to be replaced.

    Args:
        marker: the file that such a result always has.
        option: which names the folder.

    Raises:
        UserError: in these cases.
    """
    folder = Path(path)
    refuse_file(folder)
    if not folder.exists() or is_empty(folder):
        return
    if not (folder / marker).exists():
        raise UserError(f"the output {folder} is not empty and holds no {marker}; choose another folder.")
    if not overwrite:
        raise UserError(f"the output {folder} already holds {marker}; give --overwrite or another {option}.")


class OutputFolder:
    """An output folder that one run writes into; its lock goes when the process does.

    Raises:
        UserError: if another run is writing there, or the folder holds something and is neither to be resumed nor to
            be overwritten.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool):
        self.path, self._created = path, not path.exists()
        refuse_file(path)
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
        """Give the lock back; a folder that was made for nothing goes too."""
        if self._lock.is_locked:
            free(self._lock)
            self._lock.release()
        if self._created and not any(self.path.iterdir()):
            self.path.rmdir()


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
        f"# {titles[recipe.method]} {base_name(recipe.model.id)}", "",
        f"Tuned with difftuning-control on {run['data']['pictures']} pictures for {run['steps']} steps: "
        f"{words}.", "", *(["```python", *_usage(recipe, run), "```"] if use is None else use), "",
        *_class_lines(run.get("classes")), *(figures or []), *_fidelity_lines(run.get("fidelity")),
        "## Loss by noise band", "", *_loss_table(run["losses"]), "", closing, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _class_lines(found: dict[str, Any] | None) -> list[str]:
    """Which number each class has, at most the first hundred."""
    if found is None:
        return []
    named = [f"{number} {harmless(name)}" for name, number in found["classes"].items()]
    more = f", … ({len(named)} in all)" if len(named) > 100 else ""
    what = "Classes of a new label space" if found["label_space"] == "new" else "Classes of the pictures"
    return [f"{what}: {', '.join(named[:100])}{more}.", ""]


def prompt_of(run: dict[str, Any]) -> str:
    """One of a run's prompts as a string of Python."""
    return json.dumps(" ".join((run["prompts"] or [""])[0].replace("`", "'").split()), ensure_ascii=False)


def _usage(recipe: Recipe, run: dict[str, Any]) -> list[str]:
    """The lines of Python that draw a picture with the result in stock diffusers."""
    base = run["base_path"] if recipe.model.id == "embedded" else recipe.model.id
    prompt = prompt_of(run)
    if recipe.method == "controlnet":
        place, (controlnet, pipeline) = f"{recipe.output}/controlnet", run["control"]["classes"]
        return [
            f"from diffusers import {controlnet}, {pipeline}",
            "from PIL import Image",
            "from difftuning_control import Conditioner, ControlSpec", "",
            f'controlnet = {controlnet}.from_pretrained("{place}")',
            f'pipe = {pipeline}.from_pretrained("{base}", controlnet=controlnet)',
            f'condition = Conditioner(ControlSpec.load("{place}")).prepare(Image.open("photo.png"))',
            f"image = pipe({prompt}, {run['control']['argument']}=condition).images[0]",
        ]  # fmt: skip
    call = f"image = pipe({prompt}).images[0]"
    if (classes := run.get("classes")) is not None:
        given = f"pipe.get_label_ids([{prompt}])" if classes["named"] else f"[{run['prompts'][0]}]"
        call = f"image = pipe({given}).images[0]"
    if recipe.method == "full":
        load = [f'pipe = DiffusionPipeline.from_pretrained("{recipe.output}/pipeline")']
        return ["from diffusers import DiffusionPipeline", "", *load, call]
    start, load = ["from diffusers import DiffusionPipeline"], [f'pipe = DiffusionPipeline.from_pretrained("{base}")']
    if recipe.adapter.kind in ("lora", "dora") and classes is None:
        load.append(f'pipe.load_lora_weights("{recipe.output}")')
    else:
        start.append("from difftuning_control import load_adapter")
        if recipe.adapter.kind == "tlora":
            load.append("# pipe.load_lora_weights takes it too, but runs it at its full rank at every noise level")
        load.append(f'load_adapter(pipe, "{recipe.output}")')
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
