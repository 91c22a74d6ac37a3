"""What the base and each side of a pilot draw outside the new domain, kept in the pilot's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from difftuning_control.data.bank_prompts import outside_prompts
from difftuning_control.evaluation.figures import summarise
from difftuning_control.evaluation.outside import Outside
from difftuning_control.families.prompts import cut_note
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.digests import digest_of
from difftuning_control.system.durable import write_json
from difftuning_control.system.tensors import read_tensors, write_tensors
from difftuning_control.verbs.pilot.guidance_search import MIXTURE, ORDINARY, best_way, strengths_of
from difftuning_control.verbs.pilot.judge import SHOWN, Guidance, Judge, drawn, save_pictures
from difftuning_control.verbs.pilot.settings import pilot_identity

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.verbs.pilot.side_runs import SideRuns


def named_prompts(config: PilotConfig, base: Family, tell: Callable[[str], object]) -> list[str]:
    """The prompts outside the new domain that a pilot names.

    Args:
        tell: is given a line where they are cut.
    """
    prompts = outside_prompts(base) if config.outside == "general" else list(config.outside)
    if note := cut_note(base, prompts, "prompts of pilot.outside"):
        tell(note)
    return prompts


def outside_judge(
    config: PilotConfig, base: Family, judge: Judge, output: Path, tell: Callable[[str], object]
) -> Outside | None:
    """The judge of pictures for the prompts that a pilot names; what the base draws for them is drawn once.

    Args:
        tell: as of `named_prompts`.
    """
    if not config.outside:
        return None
    prompts = named_prompts(config, base, tell)
    sampling, features = replace(judge.final, prompts=prompts), judge.reference.features
    path = output / "base" / f"outside-{digest_of(prompts)}.safetensors"
    if (kept := read_tensors(path)) is not None:
        return Outside(sampling, features, kept["before"])
    outside = Outside.of(base, features, sampling)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"before": outside.before})
    return outside


def outside_of_base(base: Family, outside: Outside, output: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Figures of the pretrained model by seed: what is left where nothing was forgotten."""
    rows, folder, identity = [], output / "base", digest_of(outside.sampling.prompts)
    for seed in seeds:
        done = folder / f"outside-{seed}.json"
        if (found := _kept(done, identity)) is None:
            pictures = drawn(base, outside.sampling, seed)
            if seed == seeds[0]:
                save_pictures(pictures[:SHOWN], folder / "pictures-outside")
            found = _judged(outside, pictures, seed, done, identity)
        rows.append(found)
    return {"prompts": len(outside.sampling.prompts), "runs": rows, "summary": summarise(rows)}


def outside_of_side(
    runs: SideRuns, side: str, rate: float, length: int, guidance: dict[str, Any] | None
) -> dict[str, Any]:
    """Figures of a side's runs by seed, at its best length and by its best way of guidance."""
    outside, clock = runs.judge.outside, runs.clock
    assert outside is not None
    way, scale = best_way(guidance) if guidance is not None else (ORDINARY, runs.config.drawn[1])
    strength = strengths_of(runs.config)[way]
    step = None if length == runs.lengths[-1] else length
    rows = []
    for seed in runs.config.seeds:
        recipe = runs.recipe_of(side, rate, seed)
        folder = Path(recipe.output)
        done, asked = folder / "outside.json", [pilot_identity(recipe, runs.config), length, way, scale]
        asked += [strength] if way == MIXTURE else []
        identity = digest_of([*asked, outside.sampling.prompts])
        if (found := _kept(done, identity)) is not None:
            rows.append(found)
            continue
        record, phases = runs.with_weights(recipe, step), clock.phases
        with (
            phases("sampling"),
            tuned_model(runs.family, folder, record, step) as tuned,
            phases.counting(tuned.denoiser),
        ):
            pictures = drawn(tuned, outside.sampling, seed, Guidance(scale, runs.family, strength))
        save_pictures(pictures[:SHOWN], folder / "pictures-outside")
        rows.append(_judged(outside, pictures, seed, done, identity))
        clock.spent()
    return {"steps": length, "way": way, "scale": scale, "runs": rows, "summary": summarise(rows)}


def _kept(done: Path, identity: str) -> dict[str, Any] | None:
    """The figures in a file; None where it is not there, or is of something else."""
    if not done.exists():
        return None
    kept = json.loads(done.read_text(encoding="utf-8"))
    return kept["figures"] if kept["identity"] == identity else None


def _judged(outside: Outside, pictures: list[Image.Image], seed: int, done: Path, identity: str) -> dict[str, Any]:
    """The figures of pictures, which are kept in a file."""
    figures = {"seed": seed} | outside.figures(pictures)
    write_json(done, {"identity": identity, "figures": figures})
    return figures
