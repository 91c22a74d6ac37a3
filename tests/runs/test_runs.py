"""What a finished run left loads again, and `evaluate` judges runs and base alike."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.tables import table
from difftuning_control.families.loading import family_of, load_base, load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.finished import check_base, finished_run, tuned_model
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.evaluated_pictures import judged_pictures
from difftuning_control.verbs.train import train
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.refusals import assert_refused, refusal
from support.tiny_sd import tiny_pipeline

PLAIN = TuningConfig(retention_ratio=0.0, retention_weight=0.0)
FIGURES = {"kid", "kid_spread", "fid", "domain_hit", "domain_judge", "memorisation", "density", "coverage"}
OUTSIDE = ["a red car", "a dog", "a cup", "the sea", "an old man"]

Maker = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make(root: Path, model_dir: Path) -> Maker:
    """Makes recipes that train the tiny model for four steps: `make(name, method, tuning=…, max_steps=…)`."""
    data = write_pictures(root / "data", count=12)

    def recipe(name: str, method: str = "lora", tuning: TuningConfig | None = None, **training: Any) -> Recipe:
        return Recipe(
            method,
            ModelConfig(str(model_dir)),
            DataConfig(str(data), holdout=0.45, cache=str(root / "cache")),
            tuning or TuningConfig(),
            BankConfig(size=10, steps=2, batch_size=4),
            AdapterConfig(rank=2) if method == "lora" else AdapterConfig(),
            training=TrainingConfig(
                **{
                    "max_steps": 4,
                    "batch_size": 5,
                    "validate_every": 0,
                    "validation_size": 2,
                    "sample_every": 0,
                    "learning_rate": 1e-1 if method == "lora" else 1e-2,
                    "lr_scheduler": "constant",
                    **training,
                }
            ),
            output=str(root / name),
        )

    return recipe


@pytest.fixture(scope="module")
def lora(make: Maker) -> Recipe:
    """The recipe of a finished LoRA run that kept its weights after two steps."""
    recipe = make("lora", save_at=[2])
    train(recipe)
    return recipe


@pytest.fixture(scope="module")
def full(make: Maker) -> Recipe:
    recipe = make("full", "full", save_at=[2])
    train(recipe)
    return recipe


@pytest.fixture(params=["lora", "full"])
def trained(request: pytest.FixtureRequest) -> Recipe:
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(model_dir: Path) -> StableDiffusion:
    return load_family(str(model_dir))


def draw(family: StableDiffusion) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return family.sample(["red 1", "red 2"], generators, steps=2, guidance_scale=2.0, resolution=16)


# --- records --------------------------------------------------------------------------------------------------------


def test_the_recipe_of_a_record_is_the_recipe(trained):
    assert finished_run(trained.output).recipe == replace(trained, data=replace(trained.data, resolution=16))


def test_every_part_of_a_recipe_survives_its_record(make):
    recipe = make(
        "any", "full", TuningConfig(ScheduleConfig("constant", psi=0.5, xi=0.25), forgetting_budget=[0.1] * 5)
    )
    recipe.training = replace(recipe.training, sample_prompts=["żółw"], trackers=["wandb"], ema_decay=0.9)
    recipe.model.variant, recipe.data.limit = "fp16", 5
    read = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert read == recipe
    assert isinstance(read.tuning.schedule, ScheduleConfig)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        finished_run(tmp_path)
    with pytest.raises(
        UserError, match=rf"there is no folder {tmp_path}/nowhere \(looked for at .*if the run was moved"
    ):
        finished_run(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"no readable run\.json"):
        finished_run(tmp_path)


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_unfinished_run_is_refused(tmp_path, status):
    write_json(tmp_path / "run.json", {"status": status})
    with pytest.raises(UserError, match=f"the run {tmp_path} is {status}, not complete"):
        finished_run(tmp_path)


def test_another_base_is_refused_with_what_differs(lora, base):
    record = finished_run(lora.output)
    check_base(base, record, lora.output)
    with pytest.raises(UserError, match=r"another base \(its denoiser, vae, text_encoder differ from"):
        check_base(family_of(tiny_pipeline(seed=1)), record, lora.output)
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias += 1
    del base.fingerprints
    with pytest.raises(UserError, match=rf"the run {lora.output} was .* \(its vae differ from {lora.model.id} as"):
        check_base(base, record, lora.output)


# --- tuned models ---------------------------------------------------------------------------------------------------


def test_a_tuned_model_draws_otherwise_and_leaves_the_base_as_it_was(trained, base):
    before, modules = draw(base), [n for n, _ in base.denoiser.named_modules()]
    weights = {n: p.clone() for n, p in base.denoiser.named_parameters()}
    with tuned_model(base, trained.output, finished_run(trained.output)) as tuned:
        assert (tuned is base) == (trained.method == "lora")
        assert not torch.allclose(draw(tuned), before, atol=1e-3)
    assert torch.equal(draw(base), before)
    assert [n for n, _ in base.denoiser.named_modules()] == modules
    assert all(torch.equal(p, weights[n]) for n, p in base.denoiser.named_parameters())


def test_the_base_comes_back_after_an_exception_too(lora, base):
    before = draw(base)
    with pytest.raises(KeyboardInterrupt), tuned_model(base, lora.output, finished_run(lora.output)):
        raise KeyboardInterrupt
    assert torch.equal(draw(base), before)


def test_a_tuned_model_draws_what_the_saved_files_draw(trained, base, model_dir):
    own = load_family(str(model_dir if trained.method == "lora" else Path(trained.output) / "pipeline"))
    if trained.method == "lora":
        own.pipe.load_lora_weights(trained.output, weight_name="pytorch_lora_weights.safetensors")
    with tuned_model(base, trained.output, finished_run(trained.output)) as tuned:
        assert torch.equal(draw(tuned), draw(own))


@pytest.mark.wide
def test_one_run_after_another_on_one_base_do_not_mix(lora, make, base):
    other = make("lora, other seed", seed=1)
    train(other)
    found = []
    for recipe in (lora, other, lora):
        with tuned_model(base, recipe.output, finished_run(recipe.output)) as tuned:
            found.append(draw(tuned))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.wide
def test_weights_kept_after_some_steps_are_those_of_a_run_that_stopped_there(trained, make, base):
    short = make(f"{trained.method}, two steps", trained.method, max_steps=2)
    train(short)
    file = "pytorch_lora_weights" if trained.method == "lora" else "unet/diffusion_pytorch_model"
    result = Path(short.output) / ("" if trained.method == "lora" else "pipeline")
    kept, ended = (load_file(f / f"{file}.safetensors") for f in (Path(trained.output) / "step-000002", result))
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[k], ended[k]) for k in ended)
    drawn = []
    for recipe, step in ((trained, 2), (trained, None), (short, None)):
        with tuned_model(base, recipe.output, finished_run(recipe.output), step) as tuned:
            drawn.append(draw(tuned))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_step_that_was_not_kept_is_refused(trained, base):
    record = finished_run(trained.output)
    with pytest.raises(UserError, match="kept no weights after 3 steps; name a step of its"):
        tuned_model(base, trained.output, record, 3).__enter__()


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(root: Path) -> Path:
    """A directory of a tiny model, which is cheaper than lite0."""
    return save_tiny_dinov2(root / "tiny-dinov2")


@pytest.fixture(scope="module")
def words(features: Path) -> Callable[..., list[str]]:
    """The words of an evaluation: `words(output, runs, seeds=[0])`."""

    def command(output: Path, *runs: str, **changes: object) -> list[str]:
        values: dict[str, object] = {
            "runs": json.dumps(runs),
            "output": output,
            "features": features,
            "pictures": 6,
            "seeds": [0, 1],
            "steps": 2,
            "outside": json.dumps(OUTSIDE),
            **changes,
        }
        return ["evaluate", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]

    return command


@pytest.fixture(scope="module")
def evaluated(lora, full, words, root) -> Path:
    """An evaluation of a LoRA run, a copy of it under another name, and a full run."""
    shutil.copytree(lora.output, root / "copy")
    main(words(root / "evaluation", lora.output, str(root / "copy"), full.output))
    return root / "evaluation"


@pytest.fixture
def result(evaluated: Path) -> dict[str, Any]:
    return json.loads((evaluated / "evaluation.json").read_text())


def test_an_evaluation_holds_base_and_sides_with_their_settings(result, lora, full, root):
    assert [s["name"] for s in (result["base"], *result["sides"])] == [
        "base",
        lora.output,
        str(root / "copy"),
        full.output,
    ]
    assert (result["status"], result["model"]) == ("complete", lora.model.id)
    assert result["settings"] == {
        "features": "tiny-dinov2",
        "pictures": 6,
        "real": 6,
        "seeds": [0, 1],
        "steps": 2,
        "guidance_scale": 4.0,
        "domain_guidance_scale": None,
        "unconditional_strength": None,
        "outside": OUTSIDE,
    }


def test_every_side_has_its_figures_for_every_seed(result):
    for side in (result["base"], *result["sides"]):
        assert [run["seed"] for run in side["runs"]] == [0, 1]
        for run in side["runs"]:
            assert FIGURES | {"pair_similarity"} <= run.keys()
            assert all(math.isfinite(run[name]) for name in FIGURES)
            assert run["diversity"] is None
            assert all(0 <= run[name] <= 1 for name in ("domain_hit", "domain_judge", "coverage"))


def test_the_spread_is_over_seeds(result):
    for side in (result["base"], *result["sides"]):
        assert side["summary"].keys() >= FIGURES
        assert {"seed", "diversity"}.isdisjoint(side["summary"])
        for name, found in side["summary"].items():
            one, two = (run[name] for run in side["runs"])
            assert found["mean"] == pytest.approx((one + two) / 2)
            assert found["spread"] == pytest.approx(abs(one - two) / math.sqrt(2))
            assert found["runs"] == 2


def test_the_bank_tells_what_a_side_forgot(result):
    assert "forgetting" not in result["base"]
    for side in result["sides"]:
        curve = side["forgetting"]
        assert curve["u"] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
        assert all(low <= mean <= high for low, mean, high in zip(curve["low"], curve["mean"], curve["high"]))
        assert max(map(abs, curve["mean"])) > 1e-4


def test_tuning_moves_what_is_drawn_outside_the_domain(result):
    assert "outside" not in result["base"]
    assert all(0 < side["outside"] < 1 for side in result["sides"])
    assert all(5 * side["still_drawn"] in range(6) for side in result["sides"])


def test_few_pictures_give_the_warning(result):
    (warning,) = result["warnings"]
    assert warning.startswith("FID of 6 pictures in 16 dimensions is biased upwards")


def test_equal_runs_have_equal_figures_and_others_have_not(result):
    one, copy, other = ({k: v for k, v in side.items() if k != "name"} for side in result["sides"])
    assert one == copy
    assert one["summary"]["kid"] != other["summary"]["kid"]
    assert one["summary"]["kid"] != result["base"]["summary"]["kid"]


def test_the_grid_has_a_row_for_every_side(evaluated):
    with Image.open(evaluated / "grid.png") as grid:
        assert grid.height >= 4 * 96
        assert grid.width >= 6 * 96
    assert sorted(p.name for p in evaluated.iterdir()) == ["evaluation.json", "grid.png"]


@pytest.mark.wide
def test_runs_of_one_name_in_two_places_keep_their_rows(lora, words, root, tmp_path):
    again = Path(shutil.copytree(lora.output, tmp_path / "lora"))
    main(words(tmp_path / "two", lora.output, str(again), seeds=[0]))
    main(words(tmp_path / "one", lora.output, seeds=[0]))
    heights = [Image.open(tmp_path / name / "grid.png").height for name in ("one", "two")]
    assert heights[1] - heights[0] == 100


def test_the_table_has_a_line_for_every_side(result, capsys):
    lines = table(result).split("\n")
    head, rows = lines[0].split(), lines[1:]
    assert head == [
        "kid",
        "×1000",
        "fid",
        "domain_hit",
        "pair_similarity",
        "memorisation",
        "coverage",
        "diversity",
        "bank",
        "loss",
        "apart",
        "still",
        "drawn",
    ]
    assert [row.split()[0] for row in rows] == [s["name"] for s in (result["base"], *result["sides"])]
    assert len({len(line.rstrip()) for line in lines[2:]}) == 1
    side = result["sides"][0]
    kid, mean = side["summary"]["kid"], side["forgetting"]["mean"]
    assert f"{1000 * kid['mean']:.1f} ±{1000 * kid['spread']:.1f}" in rows[1]
    assert rows[1].endswith(f"{sum(mean) / len(mean):+.1%}  {side['outside']:.3f}  {side['still_drawn']:>11.0%}")


@pytest.mark.wide
def test_one_seed_has_no_spread_and_real_pictures_can_stand_for_the_old_domain(make, words, root, tmp_path, capsys):
    plain = make("plain", tuning=PLAIN, max_steps=1)
    train(plain)
    source = write_pictures(tmp_path / "source", count=5, seed=3)
    (source / "metadata.jsonl").unlink()
    real = write_pictures(tmp_path / "real", count=7, seed=4)
    main(words(tmp_path / "out", plain.output, seeds=[3], source=source, data=real, pictures=5))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["settings"]["real"], found["settings"]["pictures"]) == (7, 5)
    (side,) = found["sides"]
    assert side["summary"]["kid"]["spread"] is None
    assert "forgetting" not in side
    shown = capsys.readouterr().out
    assert "note: FID of 5 pictures" in shown
    assert "±" not in shown
    assert f"done: {tmp_path / 'out'}/evaluation.json" in shown


def test_other_pictures_are_read_by_the_columns_of_the_run(make, words, tmp_path):
    data, real = (write_pictures(tmp_path / name, count=7, seed=seed) for name, seed in (("mine", 1), ("real", 2)))
    for folder in (data, real):
        rows = [json.dumps({"file_name": f"{i}.png", "title": f"red {i}", "text": "nonsense"}) for i in range(7)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    run = make("titled", max_steps=1)
    run = replace(run, data=replace(run.data, path=str(data), caption_column="title"), output=str(tmp_path / "run"))
    train(run)
    request = Evaluation([run.output], data=str(real))
    records = {run.output: finished_run(run.output)}
    recipes = {run.output: records[run.output].recipe}
    _, judged = judged_pictures(request, records, recipes, lambda line: None)
    assert [e.caption for e in judged.examples] == [f"red {i}" for i in range(7)]


def test_captions_that_several_pictures_bear_have_no_counterpart(lora, words, tmp_path):
    real = write_pictures(tmp_path / "real", count=6, seed=21)
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"red {i % 2}"}) for i in range(6)]
    (real / "metadata.jsonl").write_text("\n".join(rows))
    main(words(tmp_path / "out", lora.output, data=real, seeds=[0]))
    (run,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sides"][0]["runs"]
    assert run["pair_similarity"] is None
    assert 0 < run["diversity"] < 2


@pytest.mark.wide
def test_a_run_in_lower_precision_is_evaluated_in_it(make, words, tmp_path, monkeypatch):
    low = make("bf16", mixed_precision="bf16", max_steps=1)
    train(low)
    loaded = []

    def load(*given, **settings):
        loaded.append(load_base(*given, **settings))
        return loaded[-1]

    monkeypatch.setattr("difftuning_control.verbs.evaluate.load_base", load)
    main(words(tmp_path / "out", low.output, seeds=[0]))
    (side,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sides"]
    assert math.isfinite(side["summary"]["kid"]["mean"])
    assert "forgetting" in side
    assert {family.dtype for family in loaded} == {torch.bfloat16}


@pytest.mark.wide
def test_overwrite_replaces_an_evaluation(evaluated, lora, words, tmp_path):
    folder = Path(shutil.copytree(evaluated, tmp_path / "out"))
    main([*words(folder, lora.output, seeds=[0]), "--overwrite"])
    assert len(json.loads((folder / "evaluation.json").read_text())["sides"]) == 1


# --- what evaluate refuses ------------------------------------------------------------------------------------------


def test_an_evaluation_is_not_overwritten_unasked(evaluated, lora, words, tmp_path, capsys):
    folder = shutil.copytree(evaluated, tmp_path / "out")
    assert_refused(words(folder, lora.output), capsys, tmp_path, f"{folder} already holds evaluation.json", "--overwr")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_an_output_that_holds_something_else_is_refused(lora, words, tmp_path, capsys, more):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    expected = "is not empty and holds no evaluation.json; choose another folder"
    assert_refused([*words(tmp_path / "out", lora.output), *more], capsys, tmp_path, expected)


def test_without_a_bank_something_must_stand_for_the_old_domain(make, words, tmp_path, capsys):
    plain = make("plain, one step", tuning=PLAIN, max_steps=1)
    train(plain)
    expected = "so nothing stands for the old domain; give --source, a folder of pictures as the base draws them"
    assert_refused(words(tmp_path / "out", plain.output), capsys, tmp_path, expected)


def test_an_unfinished_run_is_not_evaluated(lora, words, tmp_path, capsys):
    write_json(tmp_path / "cut" / "run.json", finished_run(lora.output).to_dict() | {"status": "running"})
    shown = refusal(words(tmp_path / "out", lora.output, str(tmp_path / "cut")), capsys, tmp_path)
    assert (
        shown == f"the run {tmp_path / 'cut'} is running, not complete; go on with difftune resume {tmp_path / 'cut'}."
    )


@pytest.mark.wide
def test_runs_of_different_bases_are_not_compared(lora, make, words, tmp_path, capsys):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other base")
    other = replace(
        make("", max_steps=1), model=ModelConfig(str(tmp_path / "other base")), output=str(tmp_path / "of another")
    )
    train(other)
    shown = refusal(words(tmp_path / "out", lora.output, other.output), capsys, tmp_path)
    assert shown.startswith(f"the run {other.output} was tuned from another base (its denoiser, vae, text_encoder diff")


def test_runs_of_different_resolutions_are_not_compared(lora, words, tmp_path, capsys):
    record = finished_run(lora.output)
    record.data.resolution = 32
    write_json(tmp_path / "larger" / "run.json", record.to_dict())
    expected = f"{tmp_path / 'larger'} was tuned at another resolution than {lora.output}; evaluate them apart."
    assert_refused(words(tmp_path / "out", lora.output, str(tmp_path / "larger")), capsys, tmp_path, expected)


def test_too_few_held_out_pictures_are_refused(lora, words, tmp_path, capsys):
    real = write_pictures(tmp_path / "real", count=5, seed=9)
    shown = refusal(words(tmp_path / "out", lora.output, data=real), capsys, tmp_path)
    assert shown.startswith("an evaluation needs at least 6 held-out pictures; there are 5.")


def test_pictures_that_were_tuned_on_do_not_judge(lora, words, tmp_path, capsys):
    shown = refusal(words(tmp_path / "out", lora.output, data=lora.data.path), capsys, tmp_path)
    assert "pictures to judge with were tuned on; give pictures that were not" in shown


def test_a_run_whose_pictures_have_changed_since_is_not_judged(make, words, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", count=16)
    run = make("", max_steps=1)
    run = replace(run, data=replace(run.data, path=str(data)), output=str(tmp_path / "run"))
    train(run)
    write_pictures(data, count=16, seed=11)
    shown = refusal(words(tmp_path / "out", run.output), capsys, tmp_path)
    assert "its pictures have changed since" in shown


def test_too_few_source_pictures_are_refused(lora, words, tmp_path, capsys):
    source = write_pictures(tmp_path / "source", count=4)
    shown = refusal(words(tmp_path / "out", lora.output, source=source), capsys, tmp_path)
    assert shown == "an evaluation needs at least 5 source pictures; there are 4."


@pytest.mark.sample("{'runs': '[[]\"nowhere\"]'}-there is no folder nowhere (looked for at")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"runs": "[]"}, "runs is []; give the folders of finished runs, each once."),
        ({"runs": '["a", "a"]'}, "runs is ['a', 'a']; give the folders of finished runs, each once."),
        ({"runs": '["nowhere"]'}, "there is no folder nowhere (looked for at"),
        ({"pictures": 4}, "pictures is 4; expected at least 5."),
        ({"seeds": "[]"}, "seeds is []; expected at least 1 different whole numbers of at least 0."),
        ({"seeds": "[1, 1]"}, "seeds is [1, 1]; expected"),
        ({"seeds": "[-1]"}, "seeds is [-1]; expected"),
        ({"steps": 0}, "steps is 0; expected at least 1."),
        ({"guidance_scale": -1}, "guidance_scale is -1.0; expected at least 0."),
        ({"features": "resnet"}, "features is 'resnet'; expected one of lite0, dinov2, clip, inception"),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_meant_is_refused(lora, words, tmp_path, monkeypatch, capsys, changes, expected):
    monkeypatch.chdir(tmp_path)
    assert_refused(words(tmp_path / "out", lora.output, **changes), capsys, tmp_path, expected)


def test_an_evaluation_without_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(["evaluate"], capsys, tmp_path, "runs")
