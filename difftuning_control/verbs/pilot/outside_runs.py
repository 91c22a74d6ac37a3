"""What the base and each side of a pilot draw outside the new domain, kept in the pilot's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.evaluation.figures import summarise
from difftuning_control.evaluation.outside import Outside
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.digests import digest_of
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.judge import DOMAIN, ORDINARY, SHOWN, best_way, drawn, save_pictures
from difftuning_control.verbs.pilot.settings import pilot_identity

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.verbs.pilot.side_runs import SideRuns


def outside_of_base(base: Family, outside: Outside, output: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Figures of the pretrained model by seed: what is left where nothing was forgotten."""
    rows = []
    for seed in seeds:
        folder = output / "base"
        path, identity = folder / f"outside-{seed}.json", digest_of(outside.sampling.prompts)
        if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["identity"] != identity:
            pictures = drawn(base, outside.sampling, seed)
            if seed == seeds[0]:
                save_pictures(pictures[:SHOWN], folder / "pictures-outside")
            write_json(path, {"identity": identity, "figures": {"seed": seed} | outside.figures(pictures)})
        rows.append(json.loads(path.read_text(encoding="utf-8"))["figures"])
    return {"prompts": len(outside.sampling.prompts), "runs": rows, "summary": summarise(rows)}


def outside_of_side(
    runs: SideRuns, side: str, rate: float, length: int, guidance: dict[str, Any] | None
) -> dict[str, Any]:
    """Figures of a side's runs by seed, at its best length and by its best way of guidance."""
    outside, clock = runs.judge.outside, runs.clock
    assert outside is not None
    way, scale = best_way(guidance) if guidance is not None else (ORDINARY, runs.config.drawn[1])
    step = None if length == runs.lengths[-1] else length
    rows = []
    for seed in runs.config.seeds:
        recipe = runs.recipe_of(side, rate, seed)
        folder = Path(recipe.output)
        done, asked = folder / "outside.json", [pilot_identity(recipe, runs.config), length, way, scale]
        identity = digest_of([*asked, outside.sampling.prompts])
        if done.exists() and (kept := json.loads(done.read_text(encoding="utf-8")))["identity"] == identity:
            rows.append(kept["figures"])
            continue
        record, phases = runs.with_weights(recipe, step), clock.phases
        with (
            phases("sampling"),
            tuned_model(runs.family, folder, record, step) as tuned,
            phases.counting(tuned.denoiser),
        ):
            pictures = drawn(tuned, outside.sampling, seed, scale, runs.family if way == DOMAIN else None)
        save_pictures(pictures[:SHOWN], folder / "pictures-outside")
        rows.append({"seed": seed} | outside.figures(pictures))
        write_json(done, {"identity": identity, "figures": rows[-1]})
        clock.spent()
    return {"steps": length, "way": way, "scale": scale, "runs": rows, "summary": summarise(rows)}
