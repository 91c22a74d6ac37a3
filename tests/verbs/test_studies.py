"""`analyze` and `pilot` end to end on a tiny model, and what they refuse."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from difftuning_control.cli import main
from difftuning_control.data.study_inputs import materials
from difftuning_control.errors import UserError
from difftuning_control.evaluation.comparison import verdict
from difftuning_control.objective.budget import spread_budget
from difftuning_control.objective.schedules import schedule_from_dict
from difftuning_control.recipe.inputs import BankConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation, PilotConfig
from difftuning_control.recipe.training import ScheduleConfig, TuningConfig
from difftuning_control.runs import audit
from difftuning_control.runs.record import RunRecord
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.pilot.judge import judge_of
from difftuning_control.verbs.pilot.pilot import Pilot, pilot
from difftuning_control.verbs.pilot.side_tuning import side_bank, side_tuning
from difftuning_control.verbs.train import train
from support.feature_models import save_tiny_dinov2
from support.tiny_pilots import tiny_study

BUDGET = [0.0, 0.05, 0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a vision model of some thousand weights: features that cost nothing."""
    return str(save_tiny_dinov2(tmp_path_factory.mktemp("features") / "tiny"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Recipe:
    """A recipe with held-out pictures, its caches in a folder of its own."""
    root = tmp_path_factory.mktemp("study")
    training = {"max_steps": 4, "learning_rate": 1e-2, "ema_decay": 0.9}
    return tiny_study(root, model_dir, pictures, training, output=str(root / "run"))


@pytest.fixture(scope="module")
def config(features: str) -> PilotConfig:
    return PilotConfig(
        ["plain", "difftuning_measured", "difftuning_budget"],
        learning_rates=[1e-2, 1e-3],
        seeds=[0, 1],
        lengths=[2, 4],
        pictures=6,
        steps=2,
        guidance_scale=2.0,
        features=features,
    )


@pytest.fixture(scope="module")
def done(study: Recipe, config: PilotConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("pilot") / "out"
    return folder, pilot(replace(study, output=str(folder)), config, "ja", False, tell=lambda text: None)


# --- the pilot ------------------------------------------------------------------------------------------------------


def test_every_side_has_every_seed_and_length_and_every_figure(done, config):
    _, result = done
    assert [s["name"] for s in result.sides] == config.sides
    for side in result.sides:
        assert [(r["seed"], r["steps"]) for r in side["runs"]] == [(0, 2), (0, 4), (1, 2), (1, 4)]
        assert side["learning_rate"] in config.learning_rates
        assert {row["learning_rate"] for row in side["search"]} == set(config.learning_rates)
        assert {row["seeds"] for row in side["search"] if row["learning_rate"] == side["learning_rate"]} == {2}
        for run in side["runs"]:
            assert all(isinstance(run[k], float) for k in ("kid", "fid", "domain_hit", "target_loss", "bank_loss"))
            assert run["pictures"] == config.pictures


def test_the_figures_and_pictures_named_are_on_disk(done):
    folder, result = done
    assert json.loads((folder / "pilot.json").read_text())["sides"] == json.loads(json.dumps(result.sides))
    files = [f for row in result.pictures.rows for f in row.files]
    assert len(files) == len(result.pictures.prompts) * (2 + len(result.sides))
    assert {Image.open(folder / f).size for f in files} == {(16, 16)}


def test_a_sides_best_length_is_that_of_the_lowest_mean_kid_on_the_prompts_of_the_search(done):
    for side in done[1].sides:
        found = {n: [r["search"]["kid"] for r in side["runs"] if r["steps"] == n] for n in (2, 4)}
        assert [len(values) for values in found.values()] == [2, 2]
        assert sum(found[side["best_length"]]) == min(sum(values) for values in found.values())


def test_the_learning_rate_is_the_one_whose_search_found_the_lowest_kid(done):
    for side in done[1].sides:
        best = min(side["search"], key=lambda row: row["kid"])
        assert best["learning_rate"] == side["learning_rate"]


def test_sides_differ_in_their_objective_alone(done):
    tunings = [s["tuning"] for s in done[1].sides]
    kinds = [t["schedule"]["kind"] for t in tunings]
    assert kinds == ["constant", "measured", "constant"]
    assert [t["retention_ratio"] for t in tunings] == [0.0, 0.4, 0.4]
    assert [t["forgetting_budget"] for t in tunings] == [None, None, 0.1]


def test_the_budgets_side_is_summed_up(done):
    budget, side = done[1].budget, done[1].sides[-1]
    losses = [r["losses"]["bank"] for r in side["runs"] if r["steps"] == side["best_length"]]
    rises = [sum(x["tuned"]["loss"][0] / x["base"]["loss"][0] - 1 for x in losses) / len(losses)]
    assert budget.rise[:1] == pytest.approx(rises)
    assert budget.allowed == [0.1] * 5
    assert len(budget.multipliers["step"]) == 4


@pytest.mark.wide
def test_the_base_stays_the_base_while_sides_come_and_go(done, study, config, tmp_path):
    """Were an adapter left on, the base drawn afterwards would not be that drawn before."""
    job = Pilot(replace(study, output=str(tmp_path)), config, tmp_path)
    judge = judge_of(config, job.family, job.features, job.conditioner, materials(job.family, job.recipe))
    before = judge.figures(job.family, 0, True)[0]
    job.side_runs(judge).train("plain", 1e-2, 0)
    assert judge.figures(job.family, 0, True)[0] == before
    assert before["kid"] == done[1].base["runs"][0]["kid"]


def test_a_pilot_says_how_its_runs_frame_their_pictures(study, config, tmp_path):
    framed = replace(study, data=replace(study.data, buckets=True), output=str(tmp_path))
    job = Pilot(framed, config, tmp_path)
    run = train(replace(framed, training=replace(study.training, max_steps=1), output=str(tmp_path / "run"))).record
    assert job._buckets(materials(job.family, job.recipe)) == run.data.buckets
    assert Pilot(study, config, tmp_path)._buckets(materials(job.family, study)) is None


def test_the_same_command_goes_on_without_doing_anything_twice(done, study, config):
    folder, result = done
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")}
    given = audit.COMMAND.set(["difftune", "pilot", "--data.path=https://me:pw@host/x"])
    again = pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)
    audit.COMMAND.reset(given)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")} == stamps
    assert again.sides == json.loads(json.dumps(result.sides))
    assert again.command == "difftune pilot '--data.path=https://(secret)@host/x'"  # as the report and the record say


@pytest.mark.wide
def test_a_lost_figure_is_measured_again_with_the_same_result(done, study, config, tmp_path):
    folder, result = tmp_path / "copy", done[1]
    shutil.copytree(done[0], folder)
    shutil.rmtree(folder / "plain" / "lr-0.001")
    again = pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)
    for side, kept in zip(again.sides, result.sides):
        assert [r["kid"] for r in side["runs"]] == [r["kid"] for r in kept["runs"]]


def test_another_pilot_is_not_overwritten(done, study, config):
    folder, _ = done
    other = replace(config, guidance_scale=3.0)
    with pytest.raises(UserError, match="holds a pilot with other settings; give --overwrite"):
        pilot(replace(study, output=str(folder)), other, "en", False)
    assert (folder / "pilot.json").exists()


def test_a_folder_that_holds_something_else_is_left_alone(study, config, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no pilot"):
        pilot(replace(study, output=str(tmp_path)), config, "en", True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_report_is_written_and_its_verdict_is_one_of_the_codes(done):
    folder, result = done
    assert "<html" in (folder / "report.html").read_text()
    assert verdict(result)["code"] in ("winner", "plain", "none")


def test_several_lengths_need_a_constant_learning_rate(study, config, tmp_path):
    decayed = replace(study, training=replace(study.training, lr_scheduler="cosine"))
    with pytest.raises(UserError, match="lr_scheduler cosine ends with it; use constant with an ema_decay"):
        Pilot(decayed, config, tmp_path)
    with pytest.raises(UserError, match=r"lengths ends with 3, training.max_steps is 4"):
        Pilot(study, replace(config, lengths=[1, 3]), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": ["prior", "difftuning_tau1"]}, "expected plain and at least one other"),
        ({"sides": ["plain", "plain"]}, "expected plain and at least one other"),
        ({"sides": ["plain", "difftuning_tau"]}, "names difftuning_tau; expected plain, prior"),
        ({"sides": ["plain", "retention_tau0"]}, "names retention_tau0; expected plain, prior"),
        ({"sides": ["plain", "prior_lambda0.0"]}, "names prior_lambda0.0; expected plain, prior"),
        ({"sides": ["plain", "plain_lambda1"]}, "names plain_lambda1; expected plain, prior"),
        ({"sides": ["plain", "teacher_own_general"]}, "names teacher_own_general; expected plain, prior"),
        ({"sides": ["plain", "prior_lambda1_general"]}, "names prior_lambda1_general; expected plain, prior"),
        ({"seeds": [0]}, "at least 2 different"),
        ({"seeds": [1, 1]}, "at least 2 different"),
        ({"pictures": 4}, "pilot.pictures is 4; expected at least 5"),
        ({"guidance_scale": float("inf")}, "pilot.guidance_scale is inf"),
        ({"learning_rates": [0.0]}, "expected finite numbers above 0"),
    ],
)
def test_a_pilot_that_compares_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PilotConfig(**changes)


def test_a_sides_tuning_keeps_the_rest_of_the_recipes():
    base = TuningConfig(ScheduleConfig("power", tau=2.0), retention_ratio=0.3, prompt_dropout=0.1)
    for side in ("plain", "prior", "difftuning_tau0.3", "difftuning_budget"):
        assert side_tuning(side, base, Path("x.json")).prompt_dropout == 0.1
    assert side_tuning("difftuning_tau0.3", base, Path("x")).schedule == ScheduleConfig("power", tau=0.3)
    assert side_tuning("difftuning_measured", base, Path("x.json")).schedule == ScheduleConfig(
        "measured", path="x.json"
    )


@pytest.mark.parametrize(
    ("side", "schedule", "weight"),
    [
        ("prior", ScheduleConfig("constant", xi=1.0), 0.1),
        ("prior_lambda0.5", ScheduleConfig("constant", xi=1.0), 0.5),
        ("prior_general", ScheduleConfig("constant", xi=1.0), 0.1),
        ("prior_general_lambda0.3", ScheduleConfig("constant", xi=1.0), 0.3),
        ("difftuning_tau0.3_general_lambda1", ScheduleConfig("power", tau=0.3), 1.0),
        ("retention_tau0.3_general", ScheduleConfig("power", tau=0.3, psi=1.0), 0.1),
        ("difftuning_tau0.3_lambda2", ScheduleConfig("power", tau=0.3), 2.0),
        ("retention_tau0.3", ScheduleConfig("power", tau=0.3, psi=1.0), 0.1),
        ("retention_tau1_lambda0.43", ScheduleConfig("power", tau=1.0, psi=1.0), 0.43),
    ],
)
def test_a_side_may_have_a_flat_psi_and_a_weight_of_its_own(side, schedule, weight):
    PilotConfig(sides=["plain", side])
    found = side_tuning(side, TuningConfig(ScheduleConfig("power", tau=2.0)), Path("x"))
    assert (found.schedule, found.retention_weight) == (schedule, weight)
    general = "general" in side
    assert (found.retention_prompts == "own") == general
    assert (side_bank(side, BankConfig(), Path("x")).prompts == "general") == general


# --- auto and budget in a run ---------------------------------------------------------------------------------------


@pytest.mark.wide
def test_auto_measures_records_and_resumes_with_the_same_schedule(study, tmp_path):
    training = replace(study.training, max_steps=60, batch_size=10)
    recipe = replace(
        study,
        tuning=replace(study.tuning, schedule=ScheduleConfig("auto")),
        training=training,
        output=str(tmp_path / "auto"),
    )
    run = train(recipe).record
    kept = json.loads((tmp_path / "auto" / "schedule.json").read_text())
    schedule = schedule_from_dict({k: kept[k] for k in ("kind", "u", "psi", "xi")})
    assert schedule.psi_values[-1] == 1.0
    assert run.schedule.psi == kept["psi"]
    named = replace(
        recipe,
        output=str(tmp_path / "named"),
        tuning=replace(
            recipe.tuning, schedule=ScheduleConfig("measured", path=str(tmp_path / "auto" / "schedule.json"))
        ),
    )
    assert train(named).record.losses == run.losses


def test_auto_without_a_bank_or_time_is_refused(study, tmp_path):
    short = replace(study, tuning=replace(study.tuning, schedule=ScheduleConfig("auto")), output=str(tmp_path / "a"))
    with pytest.raises(UserError, match="a run of 4 steps of 5 rows is too short"):
        train(short)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match=r"schedule\.kind auto measures against the bank"):
        replace(short, tuning=TuningConfig(ScheduleConfig("auto"), retention_ratio=0.0, retention_weight=0.0))


@pytest.fixture(scope="module")
def budgeted(study: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    folder = tmp_path_factory.mktemp("budget") / "run"
    tuning = replace(study.tuning, forgetting_budget=BUDGET)
    return folder, train(replace(study, tuning=tuning, output=str(folder))).record


def test_a_budgeted_run_says_band_by_band_whether_it_was_kept(budgeted):
    budget, losses = budgeted[1].budget, budgeted[1].losses
    assert budget.allowed == spread_budget(BUDGET)
    base, tuned = losses["bank"].base.losses, losses["bank"].tuned.losses
    assert budget.rise == [t / b - 1 for b, t in zip(base, tuned)]
    assert budget.kept == [r <= a for r, a in zip(budget.rise, BUDGET)]


@pytest.mark.parametrize("bad", [-0.1, [0.1, 0.2]])
def test_a_budget_out_of_range_is_refused_by_the_recipe(bad):
    with pytest.raises(UserError, match=r"tuning\.forgetting_budget: .* one number of at least 0, or 5 of them"):
        TuningConfig(forgetting_budget=bad)


def test_a_budget_needs_bank_rows():
    with pytest.raises(UserError, match="for a forgetting budget"):
        TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0, forgetting_budget=0.02)


# --- analyze --------------------------------------------------------------------------------------------------------


def test_an_analysis_of_a_run_has_every_part(budgeted, features, tmp_path, capsys):
    arguments = ["--analysis.staged", "true", "--analysis.pictures", "6", "--analysis.steps", "3"]
    arguments += ["--analysis.u0", "[0, 0.5, 1]", "--analysis.features", features, "--output", str(tmp_path / "a")]
    main(["analyze", "--run", str(budgeted[0]), *arguments])
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert found["forgetting"]["budget"] == BUDGET
    assert len(found["multipliers"]["step"]) == 4
    assert len(found["learnt"]["mean"]) == 5
    staged = found["staged"]
    assert staged["tuned_above"]["kid"][0] == staged["tuned_below"]["kid"][-1]  # the tuned model alone
    assert staged["tuned_above"]["kid"][-1] == staged["tuned_below"]["kid"][0]  # the base alone
    assert (tmp_path / "a" / "report.html").exists()
    assert "forgotten on the bank" in capsys.readouterr().out
    ScheduleConfig("measured", path=str(tmp_path / "a" / "schedule.json")).build(1000)


@pytest.mark.wide
def test_an_analysis_needs_no_run_and_is_not_overwritten(study, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    import yaml

    recipe.write_text(yaml.safe_dump(study.to_dict() | {"output": str(tmp_path / "a"), "analysis": {"rows": 6}}))
    main(["analyze", "--config", str(recipe), "--analysis.rows", "6"])
    stamp = (tmp_path / "a" / "analysis.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", "--config", str(recipe), "--analysis.rows", "6"])
    assert stopped.value.code == 2
    assert (tmp_path / "a" / "analysis.json").stat().st_mtime_ns == stamp
    assert "give --overwrite" in capsys.readouterr().err


@pytest.mark.wide
def test_an_analysis_of_a_run_without_a_bank_draws_one(study, tmp_path):
    plain = TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
    bank = replace(study.bank, path=None)
    train(replace(study, tuning=plain, bank=bank, output=str(tmp_path / "run")))
    found = analyze(Recipe(), AnalysisConfig(rows=6, draws=1), str(tmp_path / "run"))
    assert len(found["forgetting"]["mean"]) == 5


def test_a_run_and_a_recipe_at_once_are_refused(budgeted, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", "--run", str(budgeted[0]), "--method", "full", "--output", str(tmp_path / "a")])
    assert stopped.value.code == 2
    assert "give --run or a recipe, not both" in capsys.readouterr().err


def test_staged_sampling_without_a_run_is_refused(study):
    with pytest.raises(UserError, match="hands over between a tuned model and its base; give --run"):
        analyze(study, AnalysisConfig(staged=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "analysis.rows is 3; expected at least 4"),
        ({"draws": 0}, "analysis.draws is 0; expected at least 1"),
        ({"u0": []}, "expected numbers from 0 to 1"),
        ({"u0": [1.5]}, "expected numbers from 0 to 1"),
    ],
)
def test_an_analysis_out_of_range_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AnalysisConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "give the folders"),
        ({"runs": ["a", "a"]}, "each once"),
        ({"runs": ["a"], "seeds": []}, "at least 1"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Evaluation(**changes)


@pytest.mark.sample("demo")
@pytest.mark.parametrize("verb", ["pilot", "analyze", "demo"])
def test_an_unknown_language_is_said_before_the_work(verb, tmp_path, capsys):
    data = [] if verb == "demo" else ["--data.path", "embedded/icons"]
    with pytest.raises(SystemExit) as stopped:
        main([verb, *data, "--language", "xx", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "the language 'xx' is unknown; choose one of en, ja" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_study_is_documented_key_by_key():
    for study in (AnalysisConfig, Evaluation, PilotConfig):
        documented = "\n".join(kind.__doc__ or "" for kind in study.__mro__)
        assert all(f"        {name}: " in documented for name in (field.name for field in fields(study)))


# --- what a review found ---------------------------------------------------------------------------------------------


def test_a_pilot_of_a_recipe_without_a_bank_is_refused(study, config, tmp_path):
    plain = TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
    with pytest.raises(UserError, match="every side would be plain fine-tuning"):
        Pilot(replace(study, tuning=plain), config, tmp_path)


def test_a_pilot_with_too_few_held_out_pictures_is_refused_before_any_work(study, config, tmp_path):
    few = replace(study, data=replace(study.data, validation_path=None, holdout=0.25), output=str(tmp_path / "p"))
    with pytest.raises(UserError, match=r"at least 6 held-out pictures; there are 2\. Raise data.holdout"):
        pilot(few, config, "en", False)
    assert not (tmp_path / "p").exists()


def test_a_pilot_of_too_few_pictures_to_analyse_goes_without_or_is_refused(study, config, tmp_path):
    own = replace(study.bank, path=None)
    few = replace(study, data=replace(study.data, limit=3), bank=own, output=str(tmp_path / "p"))
    with pytest.raises(UserError, match="difftuning_measured is measured on at least 4 pictures, and there are 3"):
        pilot(few, replace(config, sides=["plain", "difftuning_measured"]), "en", False)
    assert not (tmp_path / "p").exists()
    told: list[str] = []
    result = pilot(few, replace(config, sides=["plain", "prior"]), "en", False, tell=told.append)
    assert (result.analysis, result.data["pictures"]) == (None, 3)
    assert any("too few pictures to analyse" in line for line in told)
    assert "The pretrained model by noise band" not in (tmp_path / "p" / "report.html").read_text(encoding="utf-8")


def test_the_search_and_the_figures_share_no_prompt(done, study, config, tmp_path):
    job = Pilot(replace(study, output=str(tmp_path)), config, tmp_path)
    judge = judge_of(config, job.family, job.features, job.conditioner, materials(job.family, job.recipe))
    assert not set(judge.search.prompts) & set(judge.final.prompts)


def test_a_pilot_does_not_go_on_with_other_pictures(study, config, done, tmp_path, monkeypatch):
    folder, data = tmp_path / "copy", tmp_path / "pictures"
    shutil.copytree(done[0], folder)
    shutil.copytree(study.data.path, data)
    moved = replace(study, data=replace(study.data, path=str(data)), output=str(folder))
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")}
    pilot(moved, config, "en", False, tell=lambda text: None)  # the same pictures, elsewhere
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")} == stamps
    Image.new("RGB", (16, 16), "red").save(data / "0.png")
    monkeypatch.setattr("difftuning_control.verbs.pilot.pilot.materials", None)  # no bank is drawn before it is said
    with pytest.raises(UserError, match=r"the data changed since the pilot in .* began"):
        pilot(moved, config, "en", False, tell=lambda text: None)


@pytest.mark.wide
def test_a_learning_rate_that_diverges_is_left_out_and_all_of_them_are_an_error(study, config, tmp_path, monkeypatch):
    told = []
    job = Pilot(replace(study, output=str(tmp_path)), config, tmp_path, told.append)
    found = materials(job.family, job.recipe)
    runs = job.side_runs(judge_of(config, job.family, job.features, job.conditioner, found))
    runs.rates = [1e-2, 1e30]
    side = runs.side("plain")
    assert (side["learning_rate"], side["diverged"]) == (1e-2, [1e30])
    assert any("diverged at learning rate 1e+30" in line for line in told)
    shown = [line.split(": kid")[0].strip() for line in told if ": kid" in line]
    assert shown == [f"rate 0.01, seed {seed}" for seed in config.seeds]
    assert told[-1].strip() == f"best: rate 0.01, {side['best_length']} steps"
    runs.rates = [1e30, 1e31]
    with pytest.raises(UserError, match="plain diverged at every learning rate"):
        runs.side("plain")


@pytest.mark.wide
def test_lost_weights_are_trained_again_where_the_figures_are_wanted(study, config, done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    rate = done[1].sides[0]["learning_rate"]
    lost = folder / "plain" / f"lr-{rate:g}" / "seed-1"
    before = json.loads((lost / "figures.json").read_text())["rows"]
    (lost / "figures.json").unlink()  # its step-… folders went when the figures were done
    pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)
    after = json.loads((lost / "figures.json").read_text())["rows"]
    assert [row["kid"] for row in after] == [row["kid"] for row in before]


def test_the_cost_counts_every_session_and_no_step_twice(done):
    cost, sides = done[1].cost, done[1].sides
    assert cost.seconds >= cost.training_seconds > 0
    last = [r["seconds"] for s in sides for r in s["runs"] if r["steps"] == 4]
    assert cost.training_seconds >= sum(last)


@pytest.mark.wide
def test_an_untouched_model_is_within_every_budget(study, tmp_path):
    """The base's curve must be fine enough that the base itself rises nowhere, whatever u the rows have."""
    from difftuning_control.data.latents import part_of
    from difftuning_control.evaluation.forgetting import row_validator
    from difftuning_control.families.loading import load_family
    from difftuning_control.training.inputs import prepare_inputs
    from difftuning_control.training.setup import build_objective, make_accelerator, measured_budget

    recipe = replace(
        study,
        model=ModelConfig("embedded"),
        tuning=replace(study.tuning, forgetting_budget=0.02),
        data=replace(study.data, path="embedded/icons", validation_path="embedded/icons-eval", limit=8),
        bank=replace(study.bank, size=40, steps=8, path=str(tmp_path / "bank")),
        output=str(tmp_path),
    )
    family = load_family("embedded")
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, make_accelerator(recipe))
    budget = measured_budget(recipe, family, inputs)
    part = part_of(inputs.bank, [""] * len(inputs.bank))
    rows = row_validator(family, part, inputs.embeddings, len(inputs.bank), 1, 100, seed=5)
    losses = rows.rows(family.denoiser)
    for _ in range(3):  # the running means forget where they began
        budget.update(losses.flatten(), torch.tensor(rows.centres).repeat(len(losses)))
    assert budget.rise == pytest.approx([0.0] * 5, abs=0.08)


def test_a_study_of_a_training_recipe_goes_beside_its_output(tmp_path):
    import yaml

    from difftuning_control.verbs.parse import parse

    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"output": "runs/x"}))
    assert parse(["pilot", "--config", str(recipe)])[1].output == "runs/x-pilot"
    assert parse(["analyze", "--config", str(recipe)])[1].output == "runs/x-analysis"
    assert parse(["analyze", "--config", str(recipe), "--output", "mine"])[1].output == "mine"
    recipe.write_text(yaml.safe_dump({"output": "runs/x", "pilot": {"pictures": 9}}))
    assert parse(["pilot", "--config", str(recipe)])[1].output == "runs/x"


def test_a_study_is_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 2
    assert "demo runs in one process" in capsys.readouterr().err


def test_a_measured_schedule_is_what_its_file_says_wherever_it_lies(study, tmp_path):
    from difftuning_control.runs.identity import recipe_identity
    from difftuning_control.runs.record_sections import Fingerprints

    table = {"u": [0.0, 1.0], "psi": [0.5, 1.0], "xi": [1.0, 0.0]}

    def identity(name: str, values: dict) -> str:
        (tmp_path / name).write_text(json.dumps(values))
        schedule = ScheduleConfig("measured", path=str(tmp_path / name))
        return recipe_identity(replace(study, tuning=replace(study.tuning, schedule=schedule)), Fingerprints(), 1)

    assert identity("a.json", table) == identity("b.json", table)
    assert identity("a.json", table) != identity("a.json", table | {"psi": [0.0, 1.0]})


@pytest.mark.parametrize("changes", [{"sides": ["plain", "difftuning_tau0"]}, {"lengths": [0, 4]}, {"lengths": [4, 4]}])
def test_lengths_and_powers_of_zero_are_refused(changes):
    with pytest.raises(UserError, match=r"pilot\.(sides|lengths)"):
        PilotConfig(**changes)
