"""The page of a demo: the verdict, the pictures and the figures of a far and of a near target, and what they allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from difftuning_control.evaluation.comparison import verdict
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.page import write_page
from difftuning_control.evaluation.report.pictures import picture_blocks
from difftuning_control.evaluation.report.pilot_run import PilotRun

HEADINGS = {"icons": "demo.icons", "flat": "demo.flat"}
METRICS = ("kid", "domain_hit", "pair_similarity", "bank_loss")


def write_demo_report(pilots: Mapping[str, PilotRun], folder: Path, language: str = "en") -> Path:
    """`report.html` of finished pilots, each in a folder of its name, which is the target's (`icons` or `flat`).

    Raises:
        UserError: if a picture is missing, or the language is unknown.
    """
    parts = [
        {
            "name": name,
            "heading": HEADINGS[name],
            "pilot": pilot,
            "verdict": verdict(pilot),
            "by_name": {side["name"]: side for side in pilot.sides},
            "pictures": picture_blocks(pilot.pictures, folder / name),
        }
        for name, pilot in pilots.items()
    ]
    some = next(iter(pilots.values()))
    return write_page(
        folder,
        "demo.html.j2",
        language,
        load_texts(language),
        parts=parts,
        model=some.model,
        metrics=METRICS,
    )
