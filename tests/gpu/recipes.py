"""What the recipes of `examples` need on one GPU: a few steps of each, on a model of the published size.

    python tests/gpu/recipes.py --work /dev/shm/difftuning --output recipes.json     # on the GPU
    python tests/gpu/recipes.py --small --work build/recipes --output recipes.json   # the same at tiny sizes, on a CPU

Weights are random and made on the GPU: nothing is downloaded, and tokenizers know a few words, so prompts are short.
Beside what a recipe's first lines say of its memory stands the most that tensors took, in training with its bank, its
checkpoint and its pictures, and in `difftune sample` of the run. Each model is deleted once its recipes are done.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from difftuning_control.errors import UserError  # noqa: E402
from difftuning_control.families.hub import best_device  # noqa: E402
from difftuning_control.verbs.bench import models  # noqa: E402
from difftuning_control.verbs.bench.inputs import pictures  # noqa: E402
from difftuning_control.verbs.bench.sides import OURS, run  # noqa: E402

GB = 1e9
TOGETHER = re.compile(r"[Tt]ogether some (\d+)\s+(?:#\s+)?GB")
PICTURES, STEPS = 10, 4
FEW = {"bank.size": 8, "bank.steps": 4, "training.sample_every": 2, "training.sample_steps": 4}
FEW |= {"training.validation_size": 4}
OF_CONTROL = {"training.lr_warmup_steps": 0, "control.fidelity.size": 4, "control.fidelity.steps": 4}


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        name: as the table has it.
        model: of `MODELS`.
        recipe: of `examples`; without one all is as it fits the model.
        flags: what differs from the recipe's text.
        draws: `difftune sample` of the run is measured too.
    """

    name: str
    model: str
    recipe: str | None
    flags: dict[str, Any] = field(default_factory=dict)
    draws: bool = False


PLAIN_FILES = {"model.variant": "null"}  # the weights made here have no second precision
CASES = (
    Case("sdxl_lora", "sdxl", "sdxl_lora", PLAIN_FILES, draws=True),
    Case("sdxl, nothing given", "sdxl", None),
    Case("sdxl_controlnet", "sdxl", "sdxl_controlnet", {**PLAIN_FILES, **OF_CONTROL}),
    Case("sdxl, all weights, nothing given", "sdxl", None, {"method": "full"}),
    Case("z_image_lora", "z_image", "z_image_lora", draws=True),
    Case("z_image_lora, float8", "z_image", "z_image_lora", {"model.quantization": "float8"}),
    Case("flux_lora", "flux", "flux_lora", draws=True),
    Case("flux_lora, not quantised", "flux", "flux_lora", {"model.quantization": "null", "model.offload": "false"}),
)


# --- models of the published sizes ------------------------------------------------------------------------------------


def flux(folder: Path, small: bool) -> Path:
    """FLUX.1 dev: transformer 11.9 G weights, T5 4.7 G, CLIP-L 0.1 G, autoencoder 0.1 G."""
    units, layers = (1, 1) if small else (models.FLUX_UNITS, models.T5_LAYERS)
    return models.flux_sized(folder, units, small, layers)


def z_image(folder: Path, small: bool) -> Path:
    """Z-Image: transformer 6.2 G weights, Qwen3 4.0 G, autoencoder 0.1 G."""
    from support.tiny_flow import tiny_z_image
    from support.tiny_language import tiny_qwen_tokenizer

    if small:
        return models.saved(tiny_z_image(), folder)
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    tokenizer = tiny_qwen_tokenizer()
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with models.made_in(torch.bfloat16):
        transformer = ZImageTransformer2DModel()
        encoder = Qwen3Model(Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, **shape, **marks))
        vae = models.vae(16, 0.3611, False, shift_factor=0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return models.saved(ZImagePipeline(scheduler, vae, encoder, tokenizer, transformer), folder)


MODELS: dict[str, Callable[[Path, bool], Path]] = {"sdxl": models.sdxl_sized, "z_image": z_image, "flux": flux}


# --- what each takes --------------------------------------------------------------------------------------------------


def said(recipe: str | None) -> int | None:
    """The gigabytes that a recipe's first lines name."""
    if recipe is None:
        return None
    found = TOGETHER.search((ROOT / "examples" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return int(found.group(1)) if found else None


def measured(case: Case, model: Path, work: Path, small: bool) -> dict[str, Any]:
    """Memory and seconds of a case; `failed` with the last line of what it printed, if it fails."""
    side = 64 if small else 1024
    folder = work / case.name.replace(", ", "-").replace(" ", "-")
    flags = {
        "model.id": model,
        "data.path": pictures(work / "pictures", PICTURES, side),
        "data.cache": folder / "cache",
        "training.max_steps": STEPS,
        **FEW,
        **case.flags,
        "output": folder / "run",
    }
    if small:
        flags |= {"training.mixed_precision": "no", "data.resolution": side}
    config = [f"--config={ROOT / 'examples' / case.recipe}.yaml"] if case.recipe else []
    train = [*OURS, "train", *config, *given(flags), "--overwrite"]
    found: dict[str, Any] = {"name": case.name, "said": said(case.recipe)}
    try:
        timed = run(train, folder / "train", None)
        found |= {"train": timed.device_peak, "seconds": timed.seconds, "step": median(timed.steps)}
        if case.draws:
            words = [str(folder / "run"), "disc 0", "--steps=4", f"--out={folder / 'drawn'}", "--overwrite"]
            found["sample"] = run([*OURS, "sample", *words], folder / "sample", None).device_peak
    except UserError as error:
        found["failed"] = " ".join(str(error).split())
    return found


def given(flags: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in flags.items()]


def table(found: Sequence[dict[str, Any]]) -> str:
    """A row a case: what its recipe says, and what it took."""
    lines = ["| recipe | said | training | sample | s a step | whole command |", "|---" * 6 + "|"]
    for one in found:
        cells = [one["name"], f"{one['said']} GB" if one["said"] else ""]
        cells += [f"{one[k] / GB:.1f} GB" if k in one else "" for k in ("train", "sample")]
        cells += [f"{one['step']:.2f}", f"{one['seconds']:.0f} s"] if "step" in one else ["", ""]
        cells[-1] += f" failed: {one['failed']}" if "failed" in one else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "recipes", help="where models and runs lie")
    parser.add_argument("--output", type=Path, default=Path("recipes.json"))
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="cases")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    asked = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    cases = [case for case in CASES if asked.only is None or case.name in asked.only]
    for name in dict.fromkeys(case.model for case in cases):
        with torch.device("cpu" if asked.small else best_device()):
            model = MODELS[name](asked.work / name, asked.small)
        torch.cuda.empty_cache()
        for case in (case for case in cases if case.model == name):
            found.append(measured(case, model.resolve(), asked.work.resolve(), asked.small))
            asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(table(found[-1:]).splitlines()[-1], flush=True)
        shutil.rmtree(model)
    print(table(found))


if __name__ == "__main__":
    main()
