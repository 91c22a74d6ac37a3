"""Constructed pilots and analyses, shaped as `difftune pilot` and `difftune analyze` write them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from difftuning_control.evaluation.comparison import verdict
from difftuning_control.evaluation.report.pilot import write_pilot_report
from difftuning_control.runs.pilot_record import PilotRecord

U = [0.1, 0.3, 0.5, 0.7, 0.9]
BANK_LOSS = [0.2396, 0.1040, 0.0631, 0.0347, 0.0105]
TARGET_LOSS = [0.5481, 0.3965, 0.2536, 0.1141, 0.0245]
SIDES = {
    # name: (KID at the best length, domain hit rate, rise of the bank loss at low noise)
    "plain": (0.0412, 0.93, 0.52),
    "prior": (0.0405, 0.92, 0.07),
    "difftuning_tau1": (0.0338, 0.94, 0.05),
    "difftuning_measured": (0.0351, 0.93, 0.04),
    "difftuning_tau0.3": (0.0380, 0.92, 0.11),
    "difftuning_budget": (0.0366, 0.94, 0.02),
}
TUNING: dict[str, dict[str, Any]] = {
    "plain": {"schedule": {"kind": "constant", "psi": 1.0, "xi": 0.0}, "retention_ratio": 0.0, "retention_weight": 0.0},
    "prior": {"schedule": {"kind": "constant", "psi": 1.0, "xi": 1.0}},
    "difftuning_measured": {"schedule": {"kind": "measured", "path": "runs/pilot/schedule.json"}},
    "difftuning_tau0.3": {"schedule": {"kind": "power", "tau": 0.3}},
    "difftuning_budget": {"schedule": {"kind": "power", "tau": 1.0}, "forgetting_budget": [0.02] * 5},
}


def pilot(
    kid: dict[str, list[float]] | None = None, hit: dict[str, float] | None = None, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, Any]:
    """A finished pilot.

    Args:
        kid: KID by side, one a seed, at the last length; invented ones when None.
        hit: the domain hit rate of a side, for all its seeds.
    """
    rng = random.Random(0)
    chance = [rng.gauss(0, 0.003) for _ in seeds]
    names = list(SIDES if kid is None else kid)
    sides = []
    for name in names:
        mean, domain, rise = SIDES.get(name, (0.04, 0.92, 0.1))
        runs = []
        for length in (75, 150):
            for i, seed in enumerate(seeds):
                value = mean + chance[i] + rng.gauss(0, 0.0006) if kid is None else kid[name][i]
                losses = {
                    role: {
                        "base": {"u": U, "loss": loss},
                        "tuned": {"u": U, "loss": [v * change(role, rise, u, rng) for v, u in zip(loss, U)]},
                    }
                    for role, loss in (("target", TARGET_LOSS), ("bank", BANK_LOSS))
                }
                means = {r: sum(v["tuned"]["loss"]) / 5 for r, v in losses.items()}
                runs.append(
                    {
                        "seed": seed,
                        "steps": length,
                        "folder": f"{name}/seed-{seed}",
                        "seconds": length * 0.21,
                        **figures(value + (0.006 if length == 75 else 0), (hit or {}).get(name, domain), rng),
                        "target_loss": means["target"],
                        "bank_loss": means["bank"],
                        "losses": losses,
                    }
                )
        rates = (5e-4, 1e-3, 2e-3)
        sides.append(
            {
                "name": name,
                "tuning": TUNING.get(name, {"schedule": {"kind": "power", "tau": 1.0}}),
                "search": [
                    {"learning_rate": r, "steps": n, "seeds": len(seeds) if r == 1e-3 else 1, "target_loss": 0.2}
                    | {"kid": mean + 0.004 * (r != 1e-3) + 0.006 * (n == 75)}
                    for r in rates
                    for n in (75, 150)
                ],
                "learning_rate": 1e-3,
                "runs": runs,
                "summary": {},
                "best_length": 150,
                "guidance": guidance(mean, domain, seeds),
            }
        )
    return {
        "status": "complete",
        "created": "2026-05-11T09:30:12",
        "model": "embedded",
        "data": {"path": "embedded/icons", "pictures": 64, "held_out": 64, "resolution": 64},
        "command": "difftune pilot --config examples/pilot.yaml --output runs/pilot",
        "settings": {
            "method": "lora",
            "steps": 150,
            "lengths": [75, 150],
            "batch_size": 16,
            "seeds": list(seeds),
            "learning_rates": [5e-4, 1e-3, 2e-3],
            "pictures": 64,
            "guidance_scale": 2.0,
            "sampling_steps": 15,
            "features": "lite0",
            "guidance_scales": [1.5, 3.0],
        },
        "primary": "kid",
        "cost": {"seconds": 4512.3, "runs": len(names) * (len(seeds) + 3), "device": "cpu (x86_64, 2 threads)"},
        "versions": {"python": "3.12.3", "difftuning-control": "0.2.0", "torch": "2.13.0", "diffusers": "0.42.0"},
        "recipe": {
            "method": "lora",
            "model": {"id": "embedded", "variant": None},
            "bank": {"size": 256, "steps": 15},
            "adapter": {"kind": "lora", "rank": 16},
            "training": {"max_steps": 150, "seed": 0},
        },
        "base": {**figures(0.0893, 0.12, rng), "target_loss": sum(TARGET_LOSS) / 5, "bank_loss": sum(BANK_LOSS) / 5},
        "sides": sides,
        "analysis": analysis(),
        "pictures": None,
        "budget": {
            "allowed": [0.02] * 5,
            "side": "difftuning_budget",
            "rise": [0.019, 0.015, 0.024, 0.01, 0.004],
            "multipliers": multipliers(),
            "target_cost": 0.012,
        },
    }


def change(role: str, rise: float, u: float, rng: random.Random) -> float:
    return 1 + rise * (1.2 - u) + rng.gauss(0, 0.004) if role == "bank" else 0.62 + 0.3 * u + rng.gauss(0, 0.01)


def figures(kid: float, hit: float, rng: random.Random) -> dict[str, Any]:
    return {
        "kid": kid,
        "kid_spread": 0.004,
        "fid": 148 + 900 * kid + rng.gauss(0, 2),
        "domain_hit": hit,
        "domain_judge": 0.98,
        "pair_similarity": 0.66 - kid + rng.gauss(0, 0.004),
        "memorisation": 0.71 + rng.gauss(0, 0.01),
        "density": 0.62,
        "coverage": 0.71,
        "diversity": None,
        "pictures": 64,
    }


def guidance(kid: float, hit: float, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Domain Guidance 0.002 better than ordinary guidance with every seed."""
    rng = random.Random(1)
    ways = {"ordinary": (3.0, 0.0), "domain": (1.5, -0.002)}
    return {
        "search": [{"way": w, "scale": s, "seeds": 1, "kid": kid, "domain_hit": hit} for w in ways for s in (1.5, 3.0)],
        "ways": {
            way: {
                "scale": scale,
                "summary": {},
                "runs": [{"seed": s, **figures(kid + by + 0.0001 * s, hit, rng)} for s in seeds],
            }
            for way, (scale, by) in ways.items()
        },
    }


def multipliers() -> dict[str, Any]:
    return {
        "step": list(range(0, 151, 10)),
        "values": [[0.1 + 0.02 * i * (5 - b) for b in range(5)] for i in range(16)],
    }


def analysis(run: bool = False) -> dict[str, Any]:
    """A finished analysis, of the base alone or also of a tuned model."""
    gap = [0.28, 0.62, 1.05, 1.40, 1.62]
    values: dict[str, Any] = {
        "status": "complete",
        "created": "2026-05-11T09:12:45",
        "model": "embedded",
        "data": {"path": "embedded/icons", "pictures": 64},
        "run": "runs/icons" if run else None,
        "u": U,
        "target": {"loss": TARGET_LOSS},
        "bank": {"loss": BANK_LOSS},
        "rows": {"target": 64, "bank": 64},
        "draws": 4,
        "gap": {"mean": gap, "low": [g - 0.12 for g in gap], "high": [g + 0.15 for g in gap]},
        "forgetting": None,
        "learnt": None,
        "staged": None,
        "multipliers": None,
        "advice": ["rising"],
        "seconds": 72.3,
        "schedule": {
            "kind": "measured",
            "u": U,
            "psi": [0.35, 0.62, 0.83, 0.94, 1.0],
            "xi": [0.78, 0.62, 0.49, 0.42, 0.38],
        },
    }
    if run:
        rise, fall = [0.031, 0.022, 0.018, 0.012, 0.006], [0.38, 0.45, 0.40, 0.25, 0.11]
        rising = {"mean": rise, "low": [v - 0.006 for v in rise], "high": [v + 0.007 for v in rise]}
        falling = {"mean": fall, "low": [v - 0.05 for v in fall], "high": [v + 0.04 for v in fall]}
        values["forgetting"] = {"u": U, **rising, "budget": [0.02] * 5}
        values["learnt"] = {"u": U, "held_out": False, **falling}
        values["multipliers"] = multipliers() | {"u": U}
        values["staged"] = {
            "u0": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
            "tuned_above": {
                "kid": [0.034, 0.036, 0.040, 0.051, 0.074, 0.089],
                "pair_similarity": [None] * 6,
                "domain_hit": [0.94, 0.93, 0.9, 0.7, 0.3, 0.12],
            },
            "tuned_below": {
                "kid": [0.089, 0.088, 0.081, 0.066, 0.042, 0.034],
                "pair_similarity": [None] * 6,
                "domain_hit": [0.12, 0.14, 0.25, 0.6, 0.9, 0.94],
            },
        }
    return values


def draw_pictures(folder: Path, result: dict[str, Any], prompts: list[str], size: int = 64) -> None:
    """Write a picture for each prompt and row, and name them in the result."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(1), []
    for name in ("truth", "base", *(s["name"] for s in result["sides"])):
        files = []
        for i in range(len(prompts)):
            picture = Image.new("RGB", (size, size), "white")
            draw = ImageDraw.Draw(picture)
            colour = tuple(rng.randrange(60, 230) for _ in range(3)) if name == "base" else (20, 20, 20)
            for _ in range(3):
                x, y = rng.randrange(4, size // 2), rng.randrange(4, size // 2)
                draw.ellipse((x, y, x + size // 2 - 6, y + size // 2 - 6), outline=colour, width=3)
            picture.save(folder / f"pictures/{name}-{i}.png")
            files.append(f"pictures/{name}-{i}.png")
        rows.append({"name": name, "files": files})
    result["pictures"] = {"prompts": prompts, "rows": rows}


def pilot_report(result: dict[str, Any], folder: Path, language: str = "en") -> Path:
    """The report of a pilot by what its `pilot.json` holds."""
    return write_pilot_report(PilotRecord.from_dict(result), folder, language)


def verdict_of(result: dict[str, Any]) -> dict[str, Any]:
    return verdict(PilotRecord.from_dict(result))
