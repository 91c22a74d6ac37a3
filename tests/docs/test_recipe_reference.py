"""docs/recipe.md is what the dataclasses say, and what they say of ranges is what they check."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from difftuning_control.errors import UserError
from support.documents import NAMES
from support.scripts import loaded

SCRIPT = Path(__file__).parents[2] / "docs" / "generate_recipe_reference.py"
generate: Any = loaded(SCRIPT)

SECTIONS = generate.sections()
KEYS = {key.name: key for name, section in SECTIONS.items() for key in generate.keys(name, section)}
NUMBERS = [name for name, key in KEYS.items() if "number" in key.kind]
BESIDE: dict[str, dict[str, Any]] = {  # what a key cannot do without
    "data.bucket_step": {"buckets": True},
    "data.bucket_aspect": {"buckets": True},
    "data.outside_mask": {"masks": "alpha"},
    "adapter.min_rank": {"kind": "tlora"},
    "adapter.factor": {"kind": "lokr"},
    "adapter.block_size": {"kind": "oft"},
    "adapter.text_encoder_learning_rate": {"text_encoder": True},
    "tuning.schedule.psi": {"kind": "constant"},
    "tuning.schedule.xi": {"kind": "constant"},
    "pilot.unconditional_strength": {"guidance_scales": [2.0]},
    "training.stop_after": {"stop_when": "converged"},
    **{f"gates.{name}": {"kid": 0.1} for name in ("pictures", "steps", "guidance_scale", "seeds")},
}
AT_ZERO = {"tuning.retention_ratio": {"retention_weight": 0.0}, "tuning.retention_weight": {"retention_ratio": 0.0}}
BOUND = re.compile(r"([≥≤><]) (-?[\d.]+)")


def test_the_page_is_current():
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run `make recipe-reference`"


def test_every_key_has_a_sentence_and_every_number_a_range():
    assert {name for name, key in KEYS.items() if len(key.meaning) < 15 or key.meaning[-1] != "."} == set()
    assert {name for name in NUMBERS if not key_bounds(name)} == set()
    assert {name for name, key in KEYS.items() if key.range and name not in NUMBERS} == set()
    assert {name for name, key in KEYS.items() if "<" in re.sub("`[^`]*`", "", key.meaning)} == set()  # lost in HTML


def key_bounds(name: str) -> list[tuple[str, float]]:
    """The bounds of a key's range, such as [("≥", 0.0), ("<", 1.0)]."""
    text = re.sub(r"^(-?[\d.]+) to (-?[\d.]+)$", r"≥ \1 and ≤ \2", KEYS[name].range)
    bounds = [(sign, float(value)) for sign, value in BOUND.findall(text)]
    return bounds if " and ".join(f"{sign} {value:g}" for sign, value in bounds) == _plain(text) else []


def _plain(text: str) -> str:
    return re.sub(r"-?[\d.]+", lambda found: f"{float(found[0]):g}", text)


def build(name: str, value: float) -> None:
    section, _, key = name.rpartition(".")
    many = "list" in KEYS[name].kind and "or list" not in KEYS[name].kind
    values = [value] if not many else [value, value + 1] if key in ("seeds", "u0") and value < 1 else [value]
    beside = BESIDE.get(name, {}) if value else AT_ZERO.get(name, BESIDE.get(name, {}))
    SECTIONS[section](**beside, **{key: values if many else value})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_range_is_what_is_checked(name):
    step = 1 if KEYS[name].kind.startswith(("whole", "list of whole")) else 2.0**-10
    inside = [value + {"≥": 0, "≤": 0, ">": step, "<": -step}[sign] for sign, value in key_bounds(name)]
    outside = [value + {"≥": -step, "≤": step, ">": 0, "<": 0}[sign] for sign, value in key_bounds(name)]
    whole = isinstance(step, int)
    for value in inside:
        build(name, int(value) if whole else value)
    for value in outside if whole else [*outside, math.inf, math.nan]:
        with pytest.raises(UserError, match=rf"{name.rpartition('.')[2]}\b|forgetting budget"):
            build(name, int(value) if whole else value)


def test_a_stale_page_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "PAGE", tmp_path / "recipe.md")
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    generate.PAGE.write_text(generate.page(), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^False$"):
        generate.main()
    generate.PAGE.write_text("old", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^True$"):
        generate.main()
    monkeypatch.setattr(sys, "argv", ["generate"])
    generate.main()
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page()


@pytest.mark.parametrize("page", NAMES)
def test_keys_that_pages_name_are_there(page):
    sections = "|".join(name for name in SECTIONS if name and "." not in name)
    text = NAMES[page].read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:`|--)((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?=[`:= ])", text))
    assert named - KEYS.keys() - SECTIONS.keys() == set()
