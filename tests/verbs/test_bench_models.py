"""The models that `difftune bench` makes, and what it adds up of them."""

from __future__ import annotations

import pytest

from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family
from difftuning_control.verbs.bench.layers import added_up
from difftuning_control.verbs.bench.models import flux_sized, sd15_sized, sdxl_sized
from difftuning_control.verbs.bench.settings import PEERS_XL, Bench
from difftuning_control.verbs.bench.sides import ours, peer
from difftuning_control.verbs.parse import parse
from support.drawing import generators


@pytest.mark.wide
@pytest.mark.parametrize(
    ("make", "side"),
    [(sd15_sized, 64), (sdxl_sized, 128), (lambda folder, small: flux_sized(folder, 1, small), 64)],
    ids=["sd15", "sdxl", "flux"],
)
def test_a_small_one_of_each_kind_loads_and_draws(tmp_path, make, side):
    folder = make(tmp_path / "model", True)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    family = load_family(str(folder))
    drawn = family.sample(["disc 1"], generators(0)[:1], steps=1, guidance_scale=1.5, resolution=side)
    assert drawn.isfinite().all()
    make(tmp_path / "model", True)  # made once
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_layers_are_added_up_by_what_one_more_unit_takes():
    assert added_up(19, 1, 3.0, 2, 5.0) == 3 + 18 * 2
    assert added_up(2, 1, 3.0, 2, 5.0) == 5


def test_sdxl_is_compared_with_its_own_scripts(tmp_path):
    for name in PEERS_XL.values():
        (tmp_path / name).touch()
    bench = Bench(parts=["lora", "controlnet"], size="sdxl", peers=str(tmp_path))
    assert [bench.script(part) for part in (*bench.parts, "bank")] == [*PEERS_XL.values(), None]
    with pytest.raises(UserError, match=r"holds no train_text_to_image_lora\.py"):
        Bench(parts=["lora"], peers=str(tmp_path))


def test_both_sides_are_given_the_same_precision(tmp_path):
    shared = ("embedded", tmp_path, tmp_path, 64, 5, 2)
    _, recipe = parse(ours("lora", *shared, training__mixed_precision="bf16", training__compile=None)[2:])
    assert (recipe.training.mixed_precision, recipe.training.compile) == ("bf16", None)
    assert "--mixed_precision=bf16" in peer("lora", tmp_path / "script.py", *shared, "bf16")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parts": ["bank"], "small": True}, "small is of sizes sd15 and sdxl"),
        ({"parts": ["bank"], "quantization": "nf4"}, "quantization is of the part flux"),
    ],
)
def test_settings_that_nothing_uses_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Bench(**settings)
