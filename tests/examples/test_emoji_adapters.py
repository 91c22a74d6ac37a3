"""The benchmark of LoRA and T-LoRA: its pilots' settings, and the table of what they chose."""

import sys

import pytest

from difftuning_control.verbs.pilot.checks import check_pilot
from support.scripts import emoji_script


@pytest.fixture
def adapters(monkeypatch):
    return emoji_script(monkeypatch, "adapters")


def test_cells_differ_in_adapter_and_number_of_pictures_alone(adapters, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sys.modules["targets"], "pilot", lambda recipe, config, *others: asked.append((recipe, config)))
    for cell in adapters.CELLS:
        adapters.run(cell, tmp_path, ["--pilot.pictures=24"])
    assert {(r.adapter.kind, r.data.limit) for r, _ in asked} == {(k, n) for k in ("lora", "tlora") for n in (1, 4, 8)}
    assert len({r.output for r, _ in asked}) == len(asked)
    first, config = asked[0]
    for recipe, settings in asked:
        check_pilot(recipe, settings)
        assert settings == config
        assert settings.pictures == 24
        assert recipe.adapter.rank == first.adapter.rank == 16
        assert (recipe.bank, recipe.training, recipe.tuning) == (first.bank, first.training, first.tuning)


def test_the_table_has_each_side_at_what_its_search_chose(adapters):
    figures = {"domain_hit": 0.5, "pair_similarity": 0.6, "memorisation": 0.1, "forgetting": 0.2}
    name = {"target": "icons", "n_images": 4, "adapter": "tlora"}
    chosen = {"method": "plain", "learning_rate": 5e-3, "steps": 60, "way": "domain", "guidance": 2.5}
    base = {**name, "method": "base", "seed": None, "kid": 0.3, **figures, "forgetting": None}
    rows = [{**name, **chosen, "seed": seed, "kid": kid, **figures} for seed, kid in ((0, 0.1), (1, 0.12))]
    lines = adapters.table({"rows": [base, *rows]}).splitlines()
    assert lines[2] == "| 4 | base | | | | 300 | 50% | 0.600 | 0.100 |  |"
    assert lines[3] == (
        "| 4 | T-LoRA, plain | 0.005 | 60 | domain 2.5 | 110 ± 14 | 50% ± 0% | 0.600 ± 0.000 | 0.100 ± 0.000 "
        "| +20% ± 0% |"
    )
    assert len(lines) == 4
