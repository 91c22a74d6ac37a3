"""The study of eight targets: rows of a pilot's sides, effects over targets, and the pilots' settings."""

import json
import math

import numpy as np
import pytest

from difftuning_control.families.fitting import fitted
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.pilot_record import PilotRecord
from difftuning_control.verbs.pilot.side_tuning import side_tuning
from support.scripts import EMOJI, emoji_script


@pytest.fixture
def targets(monkeypatch):
    return emoji_script(monkeypatch, "targets")


def row(target: str, method: str, seed: int, kid: float, **others) -> dict:
    figures = {"domain_hit": 0.5, "pair_similarity": 0.6, "memorisation": 0.1, "forgetting": 0.2}
    ways = {"way": "domain", "steps": 120, "guidance": 4.0, "kid_by_way": {"ordinary": 2 * kid, "domain": kid}}
    ways["rise_by_band"] = {"target": [-0.1, 0.3], "bank": [0.2, 0.4]}
    settings = {"n_images": 8, "adapter": "lora", "kid_by_length": {"60": kid, "120": kid}, **figures, **ways}
    return {"target": target, "method": method, "seed": seed, "kid": kid, **settings, **others}


def made(ratio: float, noise: float, count: int = 8) -> list[dict]:
    """Targets of very different KID, on each of which one side has so much of the other's."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        for seed in range(3):
            plain, ours = 0.01 * (number + 1) * np.exp(noise * rng.normal(size=2))
            rows += [row(f"t{number}", "plain", seed, plain), row(f"t{number}", "difftuning", seed, ratio * ours)]
    return rows


def test_an_effect_is_the_mean_ratio_over_targets_whatever_their_size(targets):
    middle, low, high = targets.effect(made(0.75, 0.0), "difftuning", "plain")
    assert np.allclose([middle, low, high], -0.25)
    middle, low, high = targets.effect(made(0.75, 0.1), "difftuning", "plain")
    assert low < middle < high < 0
    assert abs(middle + 0.25) < 0.05
    _, low, high = targets.effect(made(1.0, 0.1), "difftuning", "plain")
    assert low < 0 < high


def test_an_interval_has_the_true_effect_as_often_as_it_says(targets):
    """Of eight targets, and of four; of two there is none."""
    rng, hits = np.random.default_rng(1), {4: 0, 8: 0}
    for count in hits:
        for _ in range(300):
            logs = 0.2 + rng.normal(0, 0.3, count)
            rows = [
                row(f"t{i}", m, 0, k)
                for i, v in enumerate(logs)
                for m, k in (("plain", 1.0), ("difftuning", math.exp(v)))
            ]
            _, low, high = targets.effect(rows, "difftuning", "plain")
            hits[count] += low <= math.expm1(0.2) <= high
    assert all(0.92 <= hit / 300 <= 0.98 for hit in hits.values())
    middle, *ends = targets.effect(made(0.75, 0.1, 2), "difftuning", "plain")
    assert math.isfinite(middle)
    assert all(map(math.isnan, ends))
    assert targets.interval((middle, *ends)) == f"{middle:+.0%}"


def test_a_wider_spread_over_targets_is_a_wider_interval(targets):
    same = [row(f"t{i}", m, s, k) for i in range(8) for s in range(3) for m, k in (("plain", 1.0), ("difftuning", 0.8))]
    mixed = [r | {"kid": r["kid"] * (1.3 if r["target"] < "t4" and r["method"] != "plain" else 1)} for r in same]
    widths = []
    for rows in (same, mixed):
        _, low, high = targets.effect(rows, "difftuning", "plain")
        widths.append(high - low)
    assert widths[0] < 1e-9 < widths[1]


def test_an_absolute_effect_is_a_difference(targets):
    rows = [row("a", "plain", s, 1.0, domain_hit=0.5) for s in range(2)]
    rows += [row("a", "prior", s, 1.0, domain_hit=0.7) for s in range(2)]
    assert targets.effect(rows, "prior", "plain", "domain_hit", ratio=False)[0] == pytest.approx(0.2)
    assert all(map(math.isnan, targets.effect(rows, "difftuning", "plain")))


def test_the_runs_that_are_needed_follow_from_the_spread_over_the_seeds(targets):
    rows = [row("a", "plain", s, 1.0) for s in range(3)]
    rows += [row("a", "prior", s, math.exp(d)) for s, d in enumerate((-0.1, 0.0, 0.1))]
    assert targets.seeds_needed(rows) == pytest.approx(2.8**2 * 0.1**2 / 0.1**2)
    assert targets.seeds_needed(rows, 0.2) == pytest.approx(2.8**2 / 4)


def test_the_gap_says_beforehand_which_side_to_take_where_it_goes_with_the_gain(targets):
    def study(gap_of):
        found = []
        for number in range(8):
            better = number >= 4  # on the far half the side halves KID, on the near half it doubles it
            kinds = (("plain", 1.0), ("difftuning", 0.5 if better else 2.0))
            found += [row(f"t{number}", m, s, k, gap=gap_of(number)) for s in range(3) for m, k in kinds]
        return found

    seen = targets.foresight(study(lambda number: number + 10 * (number >= 4)))
    assert seen == pytest.approx((2**-0.5 - 1, 0.0, 2**-0.5 - 1))
    assert "each target left out of the threshold: KID -29%; difftuning always " in targets.table(
        {
            "settings": {"guidance_scales": [2.0, 4.0]},
            "rows": [row(f"t{i}", "base", None, 1.0) for i in range(8)]
            + study(lambda number: number + 10 * (number >= 4)),
        }
    )
    near = targets.foresight(study(lambda number: -number - 10 * (number >= 4)))  # a small gap may call for it too
    assert tuple(near) == pytest.approx(tuple(seen))
    blind = targets.foresight(study(lambda number: number * 5 % 8))  # a gap that says nothing
    assert blind.foreseen > seen.foreseen + 0.1
    assert targets.foresight(study(lambda number: None)) is None


def side(name: str) -> dict:
    def drawn(kid):
        return [
            {"seed": s, **dict.fromkeys(("domain_hit", "pair_similarity", "memorisation"), 0.4), "kid": kid + s}
            for s in (0, 1)
        ]

    losses = {r: {"base": {"loss": [0.1, 0.3]}, "tuned": {"loss": [0.2, 0.3]}} for r in ("target", "bank")}
    return {
        "name": name,
        "learning_rate": 5e-3,
        "best_length": 60,
        "runs": [{"seed": s, "steps": n, "kid": n / 60, "losses": losses} for s in (0, 1) for n in (60, 120)],
        "guidance": {
            "steps": 60,
            "search": [{"way": "ordinary", "scale": 2.0, "kid": 3.0}, {"way": "domain", "scale": 4.0, "kid": 2.0}],
            "ways": {"ordinary": {"scale": 2.0, "runs": drawn(1.0)}, "domain": {"scale": 4.0, "runs": drawn(7.0)}},
        },
    }


def test_a_row_is_a_side_at_what_its_search_chose(targets):
    """By the prompts of the search, though ordinary guidance has the better figures."""
    base = dict.fromkeys(targets.FIGURES, 0.5)
    record = PilotRecord(settings={"guidance_scale": 2.0}, base=base, sides=[side("plain"), side("prior")])
    rows = list(targets.rows_of(targets.Cell("game", 24, "lora"), record))
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("base", None), ("plain", 0), ("plain", 1), ("difftuning", 0), ("difftuning", 1),
    ]  # fmt: skip
    assert {(r["way"], r["guidance"], r["steps"]) for r in rows[1:]} == {("domain", 4.0, 60)}
    assert [r["kid"] for r in rows] == [0.5, 7.0, 8.0, 7.0, 8.0]
    assert rows[1]["forgetting"] == pytest.approx(0.25)
    assert rows[1]["rise_by_band"]["bank"] == pytest.approx([1.0, 0.0])
    assert rows[2]["kid_by_way"] == {"ordinary": 2.0, "domain": 8.0}
    assert rows[2]["kid_by_length"] == {"60": 1.0, "120": 2.0}
    needed = {"target", "n_images", "method", "adapter", "seed", "steps", "guidance", "kid", "domain_hit"}
    assert needed | {"pair_similarity", "memorisation", "forgetting"} <= set(rows[1])
    assert "| game, 24, lora |  | 500 | 7500 ± 707 D | 7500 ± 707 D |" in targets.table(
        {"settings": {"guidance_scales": [2.0, 4.0]}, "rows": rows}
    )


def test_what_is_still_drawn_is_in_the_rows_and_in_a_table_where_it_was_asked(targets):
    def asked(share, kid):
        return {"runs": [{"seed": s, "still_drawn": share, "outside_kid": kid} for s in (0, 1)]}

    plain, other = side("plain"), side("difftuning_tau0.3_general_lambda1")
    plain["outside"], other["outside"] = asked(0.25, 0.2), asked(0.75, 0.01)
    for run in other["runs"]:
        run["losses"] = {"target": run["losses"]["target"]}  # its bank is another one
    base = dict.fromkeys(targets.FIGURES, 0.5) | {"outside": asked(1.0, -0.01)}
    record = PilotRecord(settings={"guidance_scale": 2.0}, base=base, sides=[plain, other, side("prior")])
    rows = list(targets.rows_of(targets.Cell("game", 8, "lora"), record))
    assert [row["still_drawn"] for row in rows] == [1.0, 0.25, 0.25, 0.75, 0.75, None, None]
    assert rows[3]["forgetting"] is None
    assert [row["outside_kid"] for row in rows[:4]] == [-0.01, 0.2, 0.2, 0.01]
    table = targets.outside_table(rows, ["plain", "difftuning_tau0.3_general_lambda1", "prior"])
    assert table[0] == "| still drawn, % (KID × 1000) | base | plain | difftuning_tau0.3_general_lambda1 |"
    assert table[2] == "| game, 8, lora | 100 (-10) | 25 (200) | 75 (10) |"
    assert table[3] == "| against plain, points |  |  | +50% |"
    assert targets.outside_table([row("game", "plain", 0, 1.0)], ["plain"]) == []


def test_forgetting_is_compared_where_it_was_measured_with_the_same_prompts(targets):
    plain, other = side("plain"), side("teacher_own")
    other["runs"] = [
        {**r, "losses": {**r["losses"], "bank": {"base": {"loss": [0.1, 0.2]}, "tuned": {"loss": [0.2]}}}}
        for r in other["runs"]
    ]
    record = PilotRecord(
        settings={"guidance_scale": 2.0}, base=dict.fromkeys(targets.FIGURES, 0.5), sides=[plain, other]
    )
    rows = list(targets.rows_of(targets.Cell("game", 8, "lora"), record))
    assert [row.get("forgetting") for row in rows] == [None, *[pytest.approx(0.25)] * 2, None, None]
    assert not any("bank" in row["rise_by_band"] for row in rows[3:])
    assert "| teacher_own | +0% | +0% | +0% | +0% |  |" in (targets.plain_table(rows, ["plain", "teacher_own"]))
    assert [line.split(" |")[0] for line in targets.bands_table(rows, ["plain", "teacher_own"])[2:]] == [
        "| plain, target", "| teacher_own, target", "| plain, bank",
    ]  # fmt: skip


def test_every_cell_is_a_pilot_that_can_be_asked_for(targets, tmp_path, monkeypatch):
    """Eight styles with 8 and 24 pictures, and full weights on two; the default schedule is among the sides."""
    asked = []
    monkeypatch.setattr(targets, "pilot", lambda recipe, config, *others: asked.append((recipe, config)))
    monkeypatch.setattr(targets, "data_of", lambda target, work: (f"{work}/{target}/tune", f"{work}/{target}/eval"))
    for cell in targets.CELLS:
        targets.run(cell, tmp_path, ["--pilot.pictures=40"])
    assert len({recipe.output for recipe, _ in asked}) == len(asked) == 30
    assert {(r.method, r.data.limit) for r, _ in asked} == {("lora", 8), ("lora", 24), ("full", 24)}
    assert all(config.pictures == 40 and targets.DEFAULT in config.sides for _, config in asked)
    default = fitted(Recipe.from_dict({"data": {"path": "pics"}})).tuning
    assert default == side_tuning(targets.DEFAULT, default, tmp_path)  # what the rows call difftuning


def test_without_a_finished_pilot_there_is_nothing_to_collect(targets, tmp_path):
    with pytest.raises(SystemExit, match="holds no finished pilot"):
        targets.collect(tmp_path, ["flat"])


def test_ways_of_guidance_are_compared_on_the_same_weights(targets):
    rows = made(0.8, 0.0)
    table = targets.ways_table(rows, ["plain", "difftuning"], 4.0)
    assert "| plain | -50% (-50% to -50%) | -50% (-50% to -50%) | 8 of 8 | 8 of 8 |" in table
    assert "| difftuning | -50% (-50% to -50%) | -60% (-60% to -60%) | 8 of 8 | 8 of 8 |" in table


def test_changes_of_losses_are_means_over_targets_and_seeds(targets):
    found = made(0.75, 0.0)
    found[0]["rise_by_band"] = {"target": [-0.1 - 0.24, 0.3], "bank": [0.2, 0.4]}
    table = targets.bands_table([*found, {"method": "base"}], ["plain", "difftuning"])
    assert table[0] == "| side, loss on | u 0 to 0.5 | 0.5 to 1 |"
    assert table[2:4] == ["| plain, target | -11% | +30% |", "| difftuning, target | -10% | +30% |"]
    assert table[4] == "| plain, bank | +20% | +40% |"


def collection(target: str, *methods: str, **settings) -> dict:
    rows = [{**row(target, m, 0, 0.05), "kid": len(methods)} for m in methods]
    cost = [{"cell": f"{target}-8-lora", "sides": [*methods], "seconds": 1.0, "device": "cpu"}]
    return {"settings": {"steps": 120, "model": "a"} | settings, "versions": {}, "cost": cost, "rows": rows}


def test_a_collection_joins_what_was_collected_before(targets):
    """Other cells and other sides stay, the same sides are replaced, and rows are in the order of the cells."""
    earlier = targets.joined(collection("flat", "plain"), collection("icons", "plain", "prior"))
    found = targets.joined(earlier, collection("icons", "plain", "difftuning", "prior"))
    assert [(r["target"], r["method"], r["kid"]) for r in found["rows"]] == [
        ("icons", "plain", 3), ("icons", "difftuning", 3), ("icons", "prior", 3), ("flat", "plain", 1),
    ]  # fmt: skip
    assert [entry["cell"] for entry in found["cost"]] == ["flat-8-lora", "icons-8-lora"]
    further = targets.joined(found, collection("icons", "teacher_own"))
    assert [r["method"] for r in further["rows"][:4]] == ["plain", "difftuning", "prior", "teacher_own"]
    assert len(further["cost"]) == 3
    with pytest.raises(SystemExit, match=r"other settings .model.; collect into another file"):
        targets.joined(found, collection("icons", "plain", model="b"))


KINDS = ("base", "plain", "difftuning")


def test_other_numbers_of_pictures_have_tables_of_their_own(targets):
    """An effect is over the targets of one number of pictures."""
    few = json.loads((EMOJI / "targets.json").read_text())
    few["rows"] = [row for row in few["rows"] if row["n_images"] == 8 and row["method"] in KINDS]
    more = {**few, "rows": [{**row, "n_images": 24} for row in few["rows"]]}
    both = targets.tables({**few, "rows": few["rows"] + more["rows"]})
    assert targets.tables(few) == targets.table(few)
    assert both == f"**8 pictures, lora**\n\n{targets.table(few)}\n\n**24 pictures, lora**\n\n{targets.table(more)}"


@pytest.mark.slow
def test_a_pilot_on_a_style_gives_rows_and_a_table(targets, tmp_path, monkeypatch):
    tiny = {"max_steps": 2, "batch_size": 5, "validation_size": 4}
    flags = [f"--training.{k}={v}" for k, v in tiny.items()]
    flags += ["--pilot.lengths=[1, 2]", "--pilot.seeds=[0, 1]", "--pilot.pictures=6", "--pilot.steps=1"]
    flags += ["--pilot.guidance_scales=[2.0]", "--pilot.widen=0", '--pilot.sides=["plain", "prior"]']
    flags += ["--bank.size=6", "--bank.steps=1", "--bank.batch_size=4"]
    cell = targets.Cell("flat", 8, "lora")
    targets.run(cell, tmp_path, flags)
    result = targets.collect(tmp_path, ["flat"])
    with pytest.raises(SystemExit, match="holds no finished pilot"):
        targets.collect(tmp_path, ["icons"])
    assert [r["method"] for r in result["rows"]] == ["base", "plain", "plain", "difftuning", "difftuning"]
    assert all(math.isfinite(r["kid"]) for r in result["rows"])
    assert "flat, 8, lora" in targets.table(json.loads(json.dumps(result)))
