"""Class-conditional transfer: a small DiT learns a new style and a new label space, four ways, three seeds.

    python examples/emoji/dit.py --work build/dit --source                # the DiT that all begin with
    python examples/emoji/dit.py --work build/dit --worker 0 --workers 2  # one of two processes; a cell is a pilot
    python examples/emoji/dit.py --work build/dit --collect examples/emoji/dit.json
    python examples/emoji/dit.py --table examples/emoji/dit.json          # the README's table

The source domain is what the embedded model draws, "<style> emoji <name>" for all names that the package has pictures
of; its classes are the styles' categories. The target is 64 line icons whose classes are the categories alone. Plain
fine-tuning stands against Diff-Tuning, with all weights and with DiffFit; each side's learning rate comes from the same
search. What is done is not done again, and what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import Log, load_state, save_state, step_generator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.sources import embedded_set
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import progress
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.pilot import Pilot

HERE = Path(__file__).parent
STYLES = ("noto", "twemoji", "emojione", "fxemoji")
CELLS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "pilot.learning_rates": [3e-4, 6e-4]},
    "difffit": {"method": "lora", "adapter.kind": "difffit", "pilot.learning_rates": [2e-3, 5e-3]},
}
COLUMNS = ("kid", "fid", "domain_hit", "memorisation", "coverage", "diversity", "target_loss", "bank_loss")


# --- the source -----------------------------------------------------------------------------------------------------


def categories() -> dict[str, str]:
    """Name to category of everything that the package has a picture of."""
    rows = [line for part in ("icons", "icons-eval") for line in (embedded_set(part) / "metadata.jsonl").open()]
    return {row["text"]: row["category"] for row in map(json.loads, rows)}


def source_pictures(work: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Latents (N, C, h, w) that the embedded model draws, the class of each (N,), and the names of the classes."""
    names = categories()
    prompts = {f"{style} emoji {name}": f"{style} {names[name]}" for name in sorted(names) for style in STYLES}
    request = BankRequest(tuple(prompts), size, guidance_scale=3.0, steps=15, resolution=64)
    with progress(size, "pictures of the embedded model") as advance:
        bank = KnowledgeBank.build(load_family("embedded"), work / "source", request, batch_size=64, advance=advance)
    classes = sorted(set(prompts.values()))
    return bank.latents[:], torch.tensor([classes.index(prompts[prompt]) for prompt in bank.prompts]), classes


def new_dit(channels: int, width: int, layers: int) -> DiTTransformer2DModel:
    """A DiT with the variance beside ε, every block of which begins as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train_source(args: argparse.Namespace) -> None:
    """Train the DiT on the source as DiT was: hybrid loss, a tenth of the labels dropped, averaged weights."""
    if (args.work / "model" / "model_index.json").exists():
        return
    latents, labels, classes = source_pictures(args.work, args.pictures)
    torch.manual_seed(0)
    model = new_dit(latents.shape[1], args.width, args.layers)
    pipe = DiTPipeline(
        model,
        load_family("embedded").pipe.vae,
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        id2label=dict(enumerate(classes)),
    )
    family = family_of(pipe)
    objective = DiffTuningObjective.from_scheduler(pipe.scheduler, "plain", variance="hybrid")
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
    state, first = load_state(args.work / "source.ckpt"), 0
    if state is not None:
        first = state["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule"), (ema, "ema")):
            part.load_state_dict(state[name])
    log = Log(args.work / "source.jsonl")
    model.train()
    for step in range(first, args.steps):
        generator = step_generator(0, step)
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        dropped = torch.rand(args.batch_size, generator=generator) < 0.1
        chosen = torch.where(dropped, family.null_class, labels[rows])
        batch = LatentBatch(latents[rows], {"class_labels": chosen}, torch.zeros(args.batch_size, dtype=torch.bool))
        levels = objective.sample_levels(batch.is_retention, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        loss = compute_loss(family, model, objective, batch, noise, levels).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        if (step + 1) % 50 == 0:
            log(step=step + 1, loss=loss.item())
        if (step + 1) % 200 == 0:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
            save_state(args.work / "source.ckpt", step=step + 1, **{n: part.state_dict() for n, part in parts.items()})
    ema.copy_to(model.parameters())
    family.save_pipeline(args.work / "model")


# --- the cells ------------------------------------------------------------------------------------------------------


def run(cell: str, work: Path, overrides: list[str]) -> None:
    flags = {
        **CELLS[cell],
        "model.id": work / "model",
        "data.cache": work / "cache",
        "bank.path": work / "bank",
        "output": work / cell,
    }
    _, command = parse(
        ["pilot", f"--config={HERE / 'dit.yaml'}", *(f"--{k}={v}" for k, v in flags.items()), *overrides]
    )
    recipe = only(Recipe, command)
    Pilot(recipe, command.pilot, Path(recipe.output)).run()


def collect(work: Path) -> dict[str, Any]:
    """Every run of every finished cell as a row."""
    rows, cells, settings = [], {}, {}
    for cell in CELLS:
        path = work / cell / "pilot.json"
        if not path.exists():
            continue
        pilot = json.loads(path.read_text())
        rates = {side["name"]: side["learning_rate"] for side in pilot["sides"]}
        base = {k: pilot["base"].get(k) for k in COLUMNS}
        cells[cell] = {"base": base, "learning_rates": rates, "gap": pilot["analysis"]["gap"], "cost": pilot["cost"]}
        settings = {k: v for k, v in pilot["settings"].items() if k not in ("method", "learning_rates")}
        for side in pilot["sides"]:
            for r in side["runs"]:
                figures = {k: round(r[k], 5) for k in COLUMNS if r.get(k) is not None}
                rows.append({"cell": cell, "side": side["name"], "steps": r["steps"], "seed": r["seed"], **figures})
    if not rows:
        raise SystemExit(f"{work} holds no finished cell; run the cells first.")
    return {"settings": settings, "cells": cells, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """KID (× 1000) by length, mean ± deviation over the seeds, as Markdown."""
    lengths = result["settings"]["lengths"]
    lines = ["| trained | side | " + " | ".join(f"{n} steps" for n in lengths) + " | domain hit | bank loss |"]
    lines.append("|---" * (len(lengths) + 4) + "|")
    for cell, side in dict.fromkeys((r["cell"], r["side"]) for r in result["rows"]):
        found = {
            n: [r for r in result["rows"] if (r["cell"], r["side"], r["steps"]) == (cell, side, n)] for n in lengths
        }
        kid = [[1000 * r["kid"] for r in found[n]] for n in lengths]
        shown = [f"{mean(k):.0f} ± {stdev(k):.0f}" if len(k) > 1 else f"{k[0]:.0f}" for k in kid]
        last = found[lengths[-1]]
        more = [f"{mean(r['domain_hit'] for r in last):.0%}", f"{mean(r['bank_loss'] for r in last):.4f}"]
        lines.append(f"| {cell} | {side} | " + " | ".join([*shown, *more]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/dit"))
    parser.add_argument("--source", action="store_true", help="only train the DiT")
    parser.add_argument("--pictures", type=int, default=2560, help="of the source")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=tuple(CELLS))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the finished cells to this file")
    args, overrides = parser.parse_known_args()  # what is left overrides the recipe: --training.max_steps=6
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
    elif args.collect is not None:
        write_json(args.collect, collect(args.work))
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        train_source(args)
        for cell in () if args.source else args.cells[args.worker :: args.workers]:
            run(cell, args.work, overrides)


if __name__ == "__main__":
    main()
