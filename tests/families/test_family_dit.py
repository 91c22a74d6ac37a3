"""DiT: classes for prompts, a variance that is predicted, and label spaces that change."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file

from difftuning_control import cli, load_adapter, unload_adapter
from difftuning_control.data.images import fit_square, to_images
from difftuning_control.data.labels import as_pretrained, begin_as
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.tunable import tables_of
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.objective.schedules import ConstantSchedule
from difftuning_control.objective.variance import discretized_log_likelihood, variational_bound
from difftuning_control.pipelines import DiffTuningDiTPipeline
from difftuning_control.pipelines.guidance import hand_over
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.verbs import train as trainer
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.train import train
from support.family_runs import FEW_STEPS
from support.tiny_models import DIT_CLASSES, tiny_dit
from support.trainings import interrupted_after, record, resumed, run_record, trained_once

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SAMPLING = {"steps": 3, "guidance_scale": 3.0, "resolution": 16}
NEW = {"tuning": {"label_space": "new"}, "bank": {"prompts": "empty"}}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generators(seed)[0])


@pytest.fixture(params=[True, False], ids=["learned variance", "fixed variance"])
def pipe(request):
    return tiny_dit(variance=request.param)


@pytest.fixture
def family(pipe):
    return family_of(pipe)


# --- the stock pipeline, piece by piece -----------------------------------------------------------------------------


def test_predict_is_the_transformers_call_in_the_stock_pipeline(family, pipe):
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, kw, out: calls.append((a, kw, out)), with_kwargs=True)
    pipe([2, 0], guidance_scale=3.0, num_inference_steps=3, generator=generators(0, 1))
    hook.remove()
    assert len(calls) == 3
    conditioning = family.encode_prompts(["cat", "ant", "", ""])
    for (noisy,), given, out in calls:
        with torch.no_grad():
            found = family.predict(pipe.transformer, noisy, given["timestep"], conditioning)
        torch.testing.assert_close(found, out.sample, **TOLERANCE)
        assert found.shape[1] == (8 if family.learned_variance else 4)


@pytest.mark.sample("fixed variance-DPMSolverMultistepScheduler-3.0")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", [None, DPMSolverMultistepScheduler])
def test_samples_are_the_stock_pipelines_pictures(pipe, guidance_scale, scheduler):
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    family, settings = family_of(pipe), SAMPLING | {"guidance_scale": guidance_scale}
    expected = pipe(
        [2, 0], guidance_scale=guidance_scale, num_inference_steps=3, generator=generators(0, 1), output_type="np"
    ).images
    pixels = family.decode(family.sample(["cat", "ant"], generators(0, 1), **settings))
    torch.testing.assert_close(pixels / 2 + 0.5, torch.from_numpy(expected).permute(0, 3, 1, 2), **TOLERANCE)
    alone = family.decode(family.sample(["ant"], generators(1), **settings))
    torch.testing.assert_close(alone, pixels[1:], **TOLERANCE)
    assert "decode" not in vars(pipe.vae)


def test_other_sizes_of_table_are_guided_by_their_own_null_class():
    """The stock pipeline takes row 1000 for none, which lies outside of a smaller table."""
    family = family_of(tiny_dit(classes=6))
    found = family.sample(["cat", "ant"], generators(0, 1), **SAMPLING)
    wide = tiny_dit()
    for name, small in tables_of(family.denoiser).items():
        table = tables_of(wide.transformer)[name].data
        table[:6], table[1000] = small.data[:6], small.data[6]
    state = {k: v for k, v in family.denoiser.state_dict().items() if "embedding_table" not in k}
    wide.transformer.load_state_dict(state, strict=False)
    wide.vae.load_state_dict(family.pipe.vae.state_dict())
    torch.testing.assert_close(found, family_of(wide).sample(["cat", "ant"], generators(0, 1), **SAMPLING), **TOLERANCE)
    assert not family.denoiser._forward_pre_hooks


def test_noise_and_target_are_the_schedulers(family, pipe):
    latents, noise = tensor(2, 5, 4, 8, 8)
    levels = torch.tensor([0, 1, 500, 998, 999])
    noisy = family.process.add_noise(latents, noise, levels)
    expected = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, levels)
    torch.testing.assert_close(noisy, expected, **TOLERANCE)
    assert family.process.target(latents, noise, levels) is noise


def test_in_training_the_model_drops_no_label_by_itself(family):
    """diffusers' own dropout would draw again in every block; here labels are dropped in the batch."""
    latents, timesteps, conditioning = tensor(64, 4, 8, 8), torch.full((64,), 500), family.encode_prompts(["cat"] * 64)
    with torch.no_grad():
        evaluated = family.predict(family.denoiser.eval(), latents, timesteps, conditioning)
        trained = family.predict(family.denoiser.train(), latents, timesteps, conditioning)
    torch.testing.assert_close(trained, evaluated, **TOLERANCE)


def test_classes_by_name_by_number_and_none(family):
    labels = family.encode_prompts(["dog", "", "1"])["class_labels"]
    assert labels.tolist() == [3, 1000, 1]
    assert family.class_names == list(DIT_CLASSES)
    nameless = family_of(tiny_dit(names=()))
    assert nameless.class_names[:3] == ["0", "1", "2"]
    assert len(nameless.class_names) == 1000
    for prompt, said in (("dug", "no class 'dug'; did you mean 'dog'"), ("4", "0 to 3"), ("x", "it has ant, bee")):
        with pytest.raises(UserError, match=said):
            family.encode_prompts([prompt])
    with pytest.raises(UserError, match="0 to 999"):
        nameless.encode_prompts(["1000"])


def test_synonyms_are_names_of_one_class(tmp_path):
    pipe = tiny_dit(names=("ant, emmet", "bee"))
    family = family_of(pipe)
    assert family.encode_prompts(["emmet", "ant", "bee"])["class_labels"].tolist() == [0, 0, 1]
    assert len(family.class_names) == 2


def test_a_saved_pipeline_knows_its_classes(family, tmp_path):
    family.save_pipeline(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(stock), stock.labels) == (DiTPipeline, {name: i for i, name in enumerate(DIT_CLASSES)})
    loaded = load_family(str(tmp_path))
    assert loaded.fingerprints == family.fingerprints
    other = family_of(tiny_dit(variance=family.learned_variance, names=("ant", "bee", "cow", "dog")))
    assert [k for k, v in family.fingerprints.items() if other.fingerprints[k] != v] == ["classes"]


def test_a_model_under_its_old_name_loads(tmp_path):
    """The published DiTs call their transformer a Transformer2DModel."""
    family = family_of(tiny_dit())
    family.save_pipeline(tmp_path)
    for path, key, value in (
        (tmp_path / "model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
        (tmp_path / "transformer/config.json", "_class_name", "Transformer2DModel"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert load_family(str(tmp_path)).fingerprints == family.fingerprints


@pytest.mark.parametrize(
    ("config", "said"),
    [({"in_channels": 9}, "takes 9 channels"), ({"out_channels": 12}, "gives 12 channels; expected 4, or 8")],
)
def test_variants_are_refused_by_what_they_take_and_give(config, said):
    pipe = tiny_dit()
    pipe.transformer = type(pipe.transformer)(**dict(pipe.transformer.config) | config)
    with pytest.raises(UserError, match=said):
        family_of(pipe)


def test_schedulers_that_draw_without_a_seed_are_refused():
    pipe = tiny_dit()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UserError, match="DDPMScheduler, draws noise of its own"):
        family_of(pipe)


def test_only_the_models_own_size_is_taken(family):
    family.check_resolution(16, "data.resolution")
    with pytest.raises(UserError, match=r"data.resolution is 32; this model draws at 16 pixels only"):
        family.check_resolution(32, "data.resolution")
    with pytest.raises(UserError, match="no ControlNet for a DiTPipeline here"):
        family.new_controlnet(0)


# --- the loss -------------------------------------------------------------------------------------------------------


def objective_of(process: NoiseProcess, variance: str) -> DiffTuningObjective:
    return DiffTuningObjective(process, ConstantSchedule(), "weight", 0.0, 0.0, variance=variance)


def by_hand(family, latents, noise, level, output):
    """MSE on ε and one term of the bound of one row, as the papers write them, in float64 and in a loop's terms."""
    alphas = family.pipe.scheduler.alphas_cumprod.double()
    now, before = alphas[level], alphas[level - 1] if level else torch.tensor(1.0).double()
    beta = 1 - now / before
    x0, eps, v = latents.double(), output[:4].double(), output[4:].double()
    xt = now.sqrt() * x0 + (1 - now).sqrt() * noise.double()
    mse = (eps - noise.double()).square().mean()
    x0_pred = (xt - (1 - now).sqrt() * eps) / now.sqrt()

    def mean_of(x):
        return before.sqrt() * beta / (1 - now) * x + (now / before).sqrt() * (1 - before) / (1 - now) * xt

    if level:
        tilde = (1 - before) / (1 - now) * beta
    else:
        second = 1 - alphas[1] / alphas[0]
        tilde = (1 - alphas[0]) / (1 - alphas[1]) * second
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()
    if level:
        p = torch.distributions.Normal(mean_of(x0_pred), (log_variance / 2).exp())
        q = torch.distributions.Normal(mean_of(x0), tilde.sqrt() * torch.ones_like(x0))
        term = torch.distributions.kl_divergence(q, p).mean()
    else:
        normal = torch.distributions.Normal(0, 1)
        scale, centred = (log_variance / 2).exp(), x0 - mean_of(x0_pred)
        above, below = normal.cdf((centred + 1 / 255) / scale), normal.cdf((centred - 1 / 255) / scale)
        mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        term = -mass.clamp(min=1e-12).log().mean()
    return mse, term / math.log(2)


@pytest.mark.parametrize("level", [0, 1, 2, 100, 999])
def test_the_losses_are_the_papers(level):
    family = family_of(tiny_dit())
    latents, noise = 0.7 * tensor(2, 3, 4, 8, 8)
    levels, process = torch.full((3,), level), NoiseProcess.from_scheduler(family.pipe.scheduler)
    fixed, hybrid = (objective_of(process, variance) for variance in ("fixed", "hybrid"))
    noised = fixed.add_noise(latents, noise, levels)
    with torch.no_grad():
        output = family.predict(family.denoiser, noised.noisy_model_input, levels, family.encode_prompts(["cat"] * 3))
    if level == 0:  # predictions near the truth, where the mass of a bin is not cut off
        output = torch.cat([noise + 0.3 * tensor(3, 4, 8, 8, seed=5), output[:, 4:]], 1)
    rows = [by_hand(family, latents[i], noise[i], level, output[i]) for i in range(3)]
    mse, bound = (torch.stack(column).float() for column in zip(*rows))
    torch.testing.assert_close(fixed.losses(output, latents, noised), mse, rtol=1e-5, atol=1e-6)
    found = variational_bound(process, latents, noised.noisy_model_input, output[:, :4], output[:, 4:], levels)
    # the schedule in float32, and at t = 0 the papers' approximation of the normal distribution
    torch.testing.assert_close(found, bound, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(hybrid.losses(output, latents, noised), mse + 0.001 * 1000 * found, rtol=1e-5, atol=1e-6)


def test_the_bound_is_least_where_the_variance_is_right():
    """With ε right the KL vanishes at v = −1, where the variance is the posterior's."""
    process = NoiseProcess.from_scheduler(tiny_dit().scheduler)
    latents, noise = tensor(2, 2, 4, 8, 8)
    levels = torch.tensor([1, 20])
    noisy = process.add_noise(latents, noise, levels)
    bounds = [variational_bound(process, latents, noisy, noise, torch.full_like(noise, v), levels) for v in (-1, 0, 1)]
    torch.testing.assert_close(bounds[0], torch.zeros(2), atol=1e-5, rtol=0)
    assert bool((bounds[1] > bounds[0]).all())
    assert bool((bounds[2] > bounds[1]).all())


def test_bins_hold_all_of_the_distribution():
    centres = torch.arange(-255, 256, 2) / 255
    mass = discretized_log_likelihood(centres, torch.tensor(0.3), torch.tensor(-1.0)).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)


def test_the_bound_moves_nothing_but_the_variance():
    process = NoiseProcess.from_scheduler(tiny_dit().scheduler)
    latents, noise = tensor(2, 4, 4, 8, 8)
    levels = torch.tensor([0, 1, 400, 999])
    output = tensor(4, 8, 8, 8, seed=1).requires_grad_(True)
    gradients = {}
    for variance in ("fixed", "hybrid"):
        objective = objective_of(process, variance)
        losses = objective.losses(output, latents, objective.add_noise(latents, noise, levels))
        (gradients[variance],) = torch.autograd.grad(losses.sum(), output)
    torch.testing.assert_close(gradients["hybrid"][:, :4], gradients["fixed"][:, :4], atol=0, rtol=0)
    assert not gradients["fixed"][:, 4:].any()
    assert bool((gradients["hybrid"][:, 4:].flatten(1).abs().sum(1) > 0).all())


def test_hybrid_is_refused_where_nothing_predicts_a_variance(make):
    process = NoiseProcess.from_scheduler(tiny_dit().scheduler)
    objective, rows = objective_of(process, "hybrid"), tensor(1, 4, 8, 8)
    noised = objective.add_noise(rows, rows, torch.tensor([3]))
    with pytest.raises(ValueError, match="gives 4 channels; expected 8"):
        objective.losses(rows, rows, noised)
    with pytest.raises(ValueError, match="defined for epsilon, not for v_prediction"):
        objective_of(replace(process, prediction="v_prediction"), "hybrid")
    silent = DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="alpha is 0 at the last level; say fixed"):
        objective_of(NoiseProcess.from_scheduler(silent), "hybrid")
    with pytest.raises(ValueError, match="expected fixed or hybrid"):
        objective_of(process, "learned")
    with pytest.raises(UserError, match="does not predict its variance"):
        train(make("refused", model="plain", tuning={"variance": "hybrid"}))


# --- classes of the data --------------------------------------------------------------------------------------------


def write_classes(folder: Path, names: tuple[str, ...] = ("bee", "dog"), each: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 255, 3)
        for i in range(each):
            pixels = np.full((16, 16, 3), 255, np.uint8)
            pixels[3 + number : 13, 3 : 9 + i] = colour
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_bank_of_real_pictures_is_read_by_class_folders(tmp_path):
    family, data = family_of(tiny_dit()), DataConfig(cache=str(tmp_path / "cache"))
    folder = write_classes(tmp_path / "real", each=2)
    bank = prepare_bank(family, BankConfig(path=str(folder)), data, [], 16)
    assert bank.retained_prompts("own") == ["bee", "bee", "dog", "dog"]
    assert bank.retained_prompts("empty") == [""] * 4
    bank = prepare_bank(family, BankConfig(path=str(folder / "bee")), data, [], 16)
    assert bank.retained_prompts("own") == ["", ""]


def test_class_folders_name_the_captions(tmp_path):
    folder = write_classes(tmp_path / "data")
    (folder / "dog" / "notes.md").write_text("of dogs")
    data = load_images(str(folder), classes="folders")
    assert [(e.name, e.caption) for e in data.examples][::4] == [("bee/0.png", "bee"), ("dog/0.png", "dog")]
    assert (len(data), data.ignored_files) == (8, 1)


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_classes(folder)
    lines = [json.dumps({"file_name": f"bee/{i}.png", **row}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_column_of_labels_may_hold_names_or_numbers(tmp_path):
    folder = write_metadata(tmp_path / "data", [{"label": "dog"}, {"label": 2}])
    assert [e.caption for e in load_images(str(folder), classes="label").examples] == ["dog", "2"]
    with pytest.raises(UserError, match="has a int for a caption"):
        load_images(str(write_metadata(tmp_path / "text", [{"text": 2}])))


def test_class_labels_of_a_dataset_become_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bee", "dog"])})
    picture = Image.new("RGB", (16, 16), "red")
    datasets.Dataset.from_dict({"image": [picture, picture], "label": [1, 0]}, features).save_to_disk(tmp_path / "set")
    assert [e.caption for e in load_images(str(tmp_path / "set"), classes="label").examples] == ["dog", "bee"]


def spoil(kind: str, folder: Path) -> None:
    picture = (folder / "bee" / "0.png").read_bytes()
    if kind == "loose":
        (folder / "loose.png").write_bytes(picture)
    elif kind == "deep":
        (folder / "bee" / "young").mkdir()
        (folder / "bee" / "young" / "1.png").write_bytes(picture)
    elif kind == "empty":
        (folder / "cow").mkdir()
    elif kind == "metadata":
        (folder / "metadata.csv").write_text("file_name,text\nbee/0.png,a\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loose", "loose.png in .* lies in no class folder; expected data/class/picture"),
        ("deep", "lies deeper than its class folder"),
        ("empty", "the class folder cow in .* has no picture"),
        ("metadata", "has metadata.csv, but data.classes is folders"),
    ],
)
def test_class_folders_that_are_not_in_order_are_told_in_a_sentence(kind, said, tmp_path):
    folder = write_classes(tmp_path / "data")
    spoil(kind, folder)
    with pytest.raises(UserError, match=said):
        load_images(str(folder), classes="folders")
    if kind != "metadata":
        assert len(load_images(str(folder), classes="folders", skip_bad=True)) == 8


def test_class_folders_need_a_folder(tmp_path):
    with pytest.raises(UserError, match="is no folder of pictures"):
        load_images(str(tmp_path / "absent"), classes="folders")
    with pytest.raises(UserError, match="every picture has its caption"):
        DataConfig(classes="folders", default_caption="x")


# --- training -------------------------------------------------------------------------------------------------------

Maker = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    family_of(tiny_dit()).save_pipeline(folder / "models" / "learned")
    family_of(tiny_dit(variance=False)).save_pipeline(folder / "models" / "plain")
    write_classes(folder / "old")
    write_classes(folder / "new", ("owl", "eel", "yak"))
    return folder


@pytest.fixture(scope="module")
def make(root) -> Maker:
    def recipe(name: str, method: str = "lora", model: str = "learned", **sections: dict[str, Any]) -> Recipe:
        tuning = sections.get("tuning", {})
        pictures = "new" if tuning.get("label_space") == "new" else "old"
        data = {"path": str(root / pictures), "holdout": 0.25, "classes": "folders", "cache": str(root / "cache")}
        return Recipe(
            method,
            ModelConfig(str(root / "models" / model)),
            DataConfig(**data | sections.get("data", {})),
            TuningConfig(**tuning),
            BankConfig(**{"size": 10, "steps": 2, "batch_size": 4, **sections.get("bank", {})}),
            AdapterConfig(rank=2, alpha=4.0) if method == "lora" else AdapterConfig(),
            training=TrainingConfig(**{**FEW_STEPS, **sections.get("training", {})}),
            output=str(root / name),
        )

    return recipe


@pytest.fixture(scope="module")
def finished(make) -> Callable[..., Recipe]:
    return trained_once(make)


SETTINGS = {
    "lora": {},
    "lora, new": {"tuning": {"label_space": "new", "variance": "hybrid"}, "bank": {"prompts": "both"}},
    "full": {"method": "full", "tuning": {"variance": "hybrid", "estimator": "weight", "retention_prompts": "own"}},
    "full, new": {"method": "full", **NEW},
}
CLASSES = {"own": ["bee", "dog"], "new": ["eel", "owl", "yak"]}


@pytest.fixture(params=SETTINGS)
def case(request):
    return SETTINGS[request.param]


def classes_of(recipe: Recipe) -> list[str]:
    return CLASSES[recipe.tuning.label_space]


def tuned_pictures(recipe: Recipe) -> list[Image.Image]:
    with tuned_model(load_family(recipe.model.id), recipe.output, run_record(recipe)) as tuned:
        latents = tuned.sample(classes_of(recipe), generators(*range(len(classes_of(recipe)))), **SAMPLING)
        return to_images(tuned.decode(latents))


def stock_pictures(pipe: Any, names: list[str]) -> list[Image.Image]:
    found = pipe.get_label_ids(names)
    return pipe(found, guidance_scale=3.0, num_inference_steps=3, generator=generators(*range(len(names)))).images


def base_pictures(recipe: Recipe) -> list[Image.Image]:
    """What the pretrained model draws of these classes, or of as many of its own, from the same noise."""
    names = classes_of(recipe)
    known = DIT_CLASSES[: len(names)] if recipe.tuning.label_space == "new" else names
    return stock_pictures(DiTPipeline.from_pretrained(recipe.model.id), known)


def farthest(found: list[Image.Image], expected: list[Image.Image]) -> int:
    assert len(found) == len(expected)
    return max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() for a, b in zip(found, expected))


@pytest.mark.sample("lora, new", "full")
def test_what_was_trained_reloads_in_the_stock_pipeline_and_draws_the_same(finished, case):
    recipe = finished(case)
    names = classes_of(recipe)
    if recipe.method == "full":
        pipe = DiTPipeline.from_pretrained(f"{recipe.output}/pipeline")
    else:
        pipe = DiTPipeline.from_pretrained(recipe.model.id)
        state = copy.deepcopy(dict(pipe.transformer.state_dict()))
        load_adapter(pipe, recipe.output)
    drawn = stock_pictures(pipe, names)
    assert farthest(drawn, tuned_pictures(recipe)) <= 1  # of 255: rounding at an edge
    assert farthest(drawn, base_pictures(recipe)) > 3
    known = names if recipe.tuning.label_space == "new" else DIT_CLASSES
    assert pipe.labels == {name: i for i, name in enumerate(known)}
    if recipe.method == "lora":
        unload_adapter(pipe)
        torch.testing.assert_close(dict(pipe.transformer.state_dict()), state, atol=0, rtol=0)
        assert pipe.labels == {name: i for i, name in enumerate(DIT_CLASSES)}


def test_run_json_and_the_card_say_which_class_is_which(finished, case):
    recipe = finished(case)
    found, card = record(recipe)["classes"], (Path(recipe.output) / "README.md").read_text()
    numbers = {"own": {"bee": 1, "dog": 3}, "new": {"eel": 0, "owl": 1, "yak": 2}}[recipe.tuning.label_space]
    assert found == {
        "label_space": recipe.tuning.label_space,
        "classes": numbers,
        "named": True,
        "null_class": 1000,
    }
    assert ", ".join(f"{i} {name}" for name, i in numbers.items()) in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("image = pipe(", "image = pipe(num_inference_steps=1, class_labels=")
    scope: dict[str, Any] = {}
    exec(code, scope)  # what the card tells its reader to run
    assert scope["image"].size == (16, 16)


def trained_and_began(recipe: Recipe, monkeypatch) -> tuple[Any, dict, Any]:
    """The family of a run once it is trained, its trainable weights as they began, and the base's state then."""
    loaded, began, states = [], {}, {}

    def load(*args: Any, **options: Any) -> Any:
        loaded.append(load_family(*args, **options))
        return loaded[-1]

    class Watched(trainer.TrainingLoop):
        def __init__(self, *args: Any):
            super().__init__(*args)
            began.update({n: p.detach().clone() for n, p in self.parameters.items()})
            states.update({k: v.clone() for k, v in loaded[-1].denoiser.state_dict().items()})

    monkeypatch.setattr("difftuning_control.families.loading.load_family", load)
    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    train(recipe)
    return loaded[0], began, states


@pytest.mark.sample("lora")
def test_every_trainable_weight_moves_and_nothing_else(make, case, tmp_path, monkeypatch):
    recipe = replace(make("", **case), output=str(tmp_path / "run"))
    family, began, states = trained_and_began(recipe, monkeypatch)
    now = dict(family.denoiser.named_parameters())
    assert {n for n, p in now.items() if p.requires_grad} == set(began)
    assert not [n for n, before in began.items() if torch.equal(before, now[n])]
    for name, value in family.denoiser.state_dict().items():
        assert name in began or torch.equal(value, states[name]), name
    tables = [n for n in began if "embedding_table" in n]
    assert len(tables) == (0 if case == {} else 2)
    if recipe.method == "lora":
        assert set(began) - set(tables) == {n for n in now if ".lora_" in n}


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["lora", "difffit"])
def test_the_embeddings_of_new_classes_train_beside_an_adapter_are_saved_exported_and_loaded(
    make, kind, tmp_path, monkeypatch
):
    """In every block, the new rows and the null class, under DiffFit as under LoRA."""
    recipe = replace(make("", **NEW), adapter=AdapterConfig(kind), output=str(tmp_path / "run"))
    family, began, _ = trained_and_began(recipe, monkeypatch)
    tables = tables_of(family.denoiser)
    assert tables.keys() == {n for n in began if "embedding_table" in n}
    for name, table in tables.items():
        moved = (table != began[name]).all(1)
        assert moved[:3].all()
        assert moved[-1]
        assert not moved[3:-1].any()
    own = {n: torch.cat([t.detach()[:3], t.detach()[-1:]]) for n, t in tables.items()}
    monkeypatch.undo()
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), pipeline="stock"))
    for place in (recipe.output, folder):
        torch.testing.assert_close(load_file(f"{place}/class_embeddings.safetensors"), own, atol=0, rtol=0)
        pipe = DiTPipeline.from_pretrained(recipe.model.id)
        load_adapter(pipe, place)
        for name, table in tables_of(pipe.transformer).items():
            torch.testing.assert_close(torch.cat([table[:3], table[-1:]]), own[name], atol=0, rtol=0)
    assert farthest(stock_pictures(pipe, classes_of(recipe)), tuned_pictures(recipe)) <= 1


def test_a_new_label_space_keeps_the_null_class_and_draws_its_rows_from_the_seed():
    family, base = family_of(tiny_dit()), family_of(tiny_dit())
    known = family.fingerprint
    family.set_classes(["eel", "owl", "yak"], 7)
    assert family.encode_prompts(["owl", "", "2"])["class_labels"].tolist() == [1, 1000, 2]
    rows = []
    for name, table in tables_of(family.denoiser).items():
        before = tables_of(base.denoiser)[name]
        torch.testing.assert_close(table[3:], before[3:], atol=0, rtol=0)
        assert not torch.isclose(table[:3], before[:3]).any()
        rows.append(table[:3])
    assert torch.equal(rows[0], rows[1])
    for seed, same in ((7, True), (8, False)):
        other = family_of(tiny_dit())
        other.set_classes(["eel", "owl", "yak"], seed)
        assert torch.equal(next(iter(tables_of(other.denoiser).values()))[:3], rows[0]) is same
    assert family.fingerprint == known  # of the pretrained model
    with pytest.raises(UserError, match="has no class 'cat'"):
        family.encode_prompts(["cat"])
    null = {"class_labels": torch.tensor([1000])}
    latents, timesteps = tensor(1, 4, 8, 8), torch.tensor([400])
    with torch.no_grad():
        found, expected = (f.predict(f.denoiser, latents, timesteps, null) for f in (family, base))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["owl"], "have 1 classes; expected 2 to 1000"),
        ([str(i) for i in range(1001)], "have 1001"),
        (["eel, moray", "owl"], "has a comma"),
    ],
)
def test_label_spaces_that_have_no_place_are_refused(names, said):
    with pytest.raises(UserError, match=said):
        family_of(tiny_dit()).set_classes(names, 0)


@pytest.mark.wide
def test_bank_rows_train_with_the_old_null_class(make, tmp_path, monkeypatch):
    """Whatever the bank was drawn for: its classes are gone, and with them the rows of the tables."""
    seen = []

    class Watched(trainer.TrainingLoop):
        def advance(self, number, more=True):
            batch = self.source.rows(number).batch
            seen.extend(zip(batch.is_retention.tolist(), batch.conditioning["class_labels"].tolist()))
            return super().advance(number, more)

    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    train(replace(make("", **SETTINGS["lora, new"]), output=str(tmp_path / "run")))
    assert {label for is_bank, label in seen if is_bank} == {1000}
    assert {label for is_bank, label in seen if not is_bank} == {0, 1, 2}


@pytest.mark.sample("both-expected3")
@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("empty", [""]),
        ("captions", ["bee", "dog"]),
        ("classes", list(DIT_CLASSES)),
        ("both", ["ant", "", "bee", "", "cat", "", "dog", ""]),
    ],
)
def test_a_bank_is_drawn_by_class_by_the_empty_class_or_both(finished, prompts, expected):
    recipe = finished({"bank": {"prompts": prompts}})
    lines = (Path(record(recipe)["bank"]["folder"]) / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [expected[i % len(expected)] for i in range(10)]


@pytest.mark.wide
def test_labels_are_dropped_at_their_share(make, tmp_path, monkeypatch):
    counts = []

    class Watched(trainer.TrainingLoop):
        def run(self, *told):
            for step in range(200):
                batch = self.source.rows(step).batch
                counts.extend((batch.conditioning["class_labels"] == 1000)[~batch.is_retention].tolist())
            return super().run(*told)

    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    recipe = make("", tuning={"prompt_dropout": 0.1}, training={"max_steps": 1})
    train(replace(recipe, output=str(tmp_path / "run")))
    spread = math.sqrt(0.1 * 0.9 / len(counts))
    assert np.mean(counts) == pytest.approx(0.1, abs=4 * spread)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["lora, new", "full"])
def test_a_resumed_run_ends_bit_equal(make, finished, name, tmp_path):
    undisturbed = finished(SETTINGS[name])
    recipe = replace(make("", **SETTINGS[name]), output=str(tmp_path / "run"))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    train(resumed(recipe))
    files = record(undisturbed)["outputs"]
    assert files
    assert record(recipe)["outputs"] == files


def test_beside_an_adapter_lie_the_new_classes_and_the_null_class(finished):
    recipe = finished(SETTINGS["lora, new"])
    tables = load_file(f"{recipe.output}/class_embeddings.safetensors")
    before = tables_of(load_family(recipe.model.id).denoiser)
    assert {name: len(rows) for name, rows in tables.items()} == dict.fromkeys(before, 4)
    for name, rows in tables.items():
        torch.testing.assert_close(rows[-1], before[name][1000], atol=0.1, rtol=0)
        assert not torch.equal(rows[-1], before[name][1000])
    assert "class_embeddings.safetensors" in record(recipe)["outputs"]
    assert not (Path(finished({}).output) / "class_embeddings.safetensors").exists()


def test_adapters_that_do_not_fit_are_refused_and_leave_the_pipeline_alone(finished, tmp_path):
    recipe = finished(SETTINGS["lora, new"])
    for pipe, said in ((tiny_dit(classes=2), "its 3 classes have no place"), (wide_dit(), "does not fit this model")):
        before, labels = copy.deepcopy(dict(pipe.transformer.state_dict())), pipe.labels
        with pytest.raises(UserError, match=said):
            load_adapter(pipe, recipe.output)
        torch.testing.assert_close(dict(pipe.transformer.state_dict()), before, atol=0, rtol=0)
        assert pipe.labels == labels
    damaged = tmp_path / "copy"
    shutil.copytree(recipe.output, damaged)
    (damaged / "class_embeddings.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="is damaged, or its header names no classes"):
        load_adapter(tiny_dit(), damaged)


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["dora", "tlora", "loha", "lokr", "oft", "boft", "ia3", "difffit"])
def test_every_kind_of_adapter_takes_its_classes_along(make, kind, tmp_path):
    recipe = make("", tuning={"label_space": "new"}, bank={"prompts": "empty"}, training={"max_steps": 2})
    block = {"oft": 8, "boft": 4}.get(kind)
    recipe = replace(recipe, adapter=AdapterConfig(kind, block_size=block), output=str(tmp_path / "run"))
    train(recipe)
    pipe = DiTPipeline.from_pretrained(recipe.model.id)
    state, labels = copy.deepcopy(dict(pipe.transformer.state_dict())), pipe.labels
    load_adapter(pipe, recipe.output)
    assert list(pipe.labels) == classes_of(recipe)
    assert farthest(stock_pictures(pipe, classes_of(recipe)), tuned_pictures(recipe)) <= 1
    family = load_family(recipe.model.id)
    base = family.sample([""], generators(0), **SAMPLING)
    family.set_classes(classes_of(recipe), 0)
    with tuned_model(family, recipe.output, run_record(recipe)) as tuned, hand_over(tuned, 1.0):
        torch.testing.assert_close(tuned.sample(["owl"], generators(0), **SAMPLING), base, **TOLERANCE)
    unload_adapter(pipe)
    torch.testing.assert_close(dict(pipe.transformer.state_dict()), state, atol=0, rtol=0)
    assert pipe.labels == labels


def wide_dit() -> DiTPipeline:
    pipe = tiny_dit()
    pipe.transformer = type(pipe.transformer)(**dict(pipe.transformer.config) | {"attention_head_dim": 16})
    return pipe


@pytest.mark.sample("lora, new")
@pytest.mark.parametrize("name", ["lora, new", "full, new"])
def test_below_u0_the_pretrained_model_is_told_the_empty_class_for_a_new_one(finished, name):
    """Of the new label space it knows nothing, and the numbers of its classes meant others in its own."""
    recipe = finished(SETTINGS[name])
    family, pretrained = load_family(recipe.model.id), load_family(recipe.model.id)
    base = family.sample([""], generators(0), **SAMPLING)
    begin_as(family, run_record(recipe).classes, recipe.training.seed)
    began = family.sample(["owl"], generators(0), **SAMPLING)
    seen = []
    with (
        as_pretrained(family, run_record(recipe).classes),
        tuned_model(family, recipe.output, run_record(recipe)) as tuned,
    ):
        other = family.denoiser if tuned is not family else None
        whole = tuned.sample(["owl"], generators(0), **SAMPLING)
        for u0, expected in ((1.0, base), (0.0, whole)):
            with hand_over(tuned, u0, base=other):
                found = tuned.sample(["owl"], generators(0), **SAMPLING)
            torch.testing.assert_close(found, expected, **TOLERANCE)
        handle = tuned.denoiser.register_forward_hook(
            lambda m, a, k, out: seen.append((a[0], k["timestep"], k["class_labels"], out[0])), with_kwargs=True
        )
        with hand_over(tuned, 0.5, base=other):
            tuned.sample(["owl"], generators(0), **SAMPLING)
        handle.remove()
        late = []
        for noisy, timestep, labels, out in seen:
            late.append(tuned.process.u_at(timestep) <= 0.5)
            with torch.no_grad():
                if late[-1]:
                    labels = torch.full_like(labels, 1000)
                model = pretrained if late[-1] else tuned
                expected = model.predict(model.denoiser, noisy, timestep, {"class_labels": labels})
            torch.testing.assert_close(out, expected, **TOLERANCE)
        assert (any(late), all(late)) == (True, False)
    assert not torch.allclose(base, whole, atol=1e-3)
    torch.testing.assert_close(family.sample(["owl"], generators(0), **SAMPLING), began, atol=0, rtol=0)


# --- what users are told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"path": "new"}}, "the class of eel/0.png: the model has no class 'eel'.*label_space new"),
        ({**NEW, "tuning": {"label_space": "new", "retention_prompts": "own"}}, "bank was drawn for are gone"),
        ({**NEW, "training": {"validation_prompts": "own"}}, "drawn for are gone; say retained or empty"),
        ({"tuning": {"label_space": "new"}}, "bank.prompts is captions, but with tuning.label_space new"),
        ({**NEW, "data": {"limit": 4}}, "have 1 classes; expected 2 to 1000"),
        ({**NEW, "data": {"holdout": 0.9}}, "has only held-out pictures"),
        ({"data": {"resolution": 32}}, "data.resolution is 32; this model draws at 16 pixels only"),
        ({"bank": {"prompts": "nothing.txt"}}, "expected captions, empty, classes, both, or a text file"),
        ({"data": {"classes": None}}, "has no caption"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(make, root, sections, said):
    recipe = make("refused", **sections)
    if recipe.data.path == "new":
        recipe = replace(recipe, data=replace(recipe.data, path=str(root / "new")))
    with pytest.raises(UserError, match=said):
        train(recipe)
    assert not (root / "refused").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tuning": {"label_space": "new"}}, "tuning.label_space is new, but this model is told prompts"),
        ({"bank": {"prompts": "both"}}, "bank.prompts is both, but this model is told prompts"),
    ],
)
def test_models_that_are_told_prompts_have_no_classes(recipe, sections, said):
    tuning, bank = TuningConfig(**sections.get("tuning", {})), replace(recipe.bank, **sections.get("bank", {}))
    with pytest.raises(UserError, match=said):
        train(replace(recipe, tuning=tuning, bank=bank))


def difftune(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        cli.main(list(arguments))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_sample_takes_classes_for_prompts(finished, capsys, tmp_path):
    recipe = finished(SETTINGS["lora, new"])
    flags = ["--run", recipe.output, "--steps", "2", "--compare", "--output"]
    code, out, _ = difftune(capsys, "sample", *flags, str(tmp_path / "a"), "--prompts", '["yak", ""]')
    assert (code, "2 pictures" in out) == (0, True)
    written = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert written == ["000-yak.png", "001-empty.png", "grid.png", "samples.json"]
    with tuned_model(load_family(recipe.model.id), recipe.output, run_record(recipe)) as tuned:
        expected = sample_pictures(tuned, ["yak", ""], seed=0, steps=2, guidance_scale=4.0, resolution=16)
    assert farthest([Image.open(tmp_path / "a" / "000-yak.png")], expected[:1]) == 0
    code, _, err = difftune(capsys, "sample", *flags, str(tmp_path / "b"), "--prompts", '["zebu"]')
    assert code == 2
    assert "the model has no class 'zebu'; it has eel, owl, yak" in err
    assert not (tmp_path / "b").exists()


@pytest.mark.wide
def test_the_recipe_in_examples_runs_at_tiny_size(root, capsys, tmp_path):
    example = Path(__file__).parents[2] / "examples" / "dit_transfer.yaml"
    overrides = {
        "model.id": root / "models/learned",
        "data.path": root / "new",
        "data.resolution": 16,
        "data.cache": tmp_path / "cache",
        "bank.size": 8,
        "bank.steps": 2,
        "training.max_steps": 2,
        "training.batch_size": 5,
        "training.mixed_precision": "no",
        "training.sample_every": 0,
        "training.gradient_accumulation_steps": 1,
        "training.ema_decay": "null",  # of two steps the average would be the base
        "training.ema_warmup": "true",
        "output": tmp_path / "run",
    }
    flags = [f"--{k}={v}" for k, v in overrides.items()]
    code, _, err = difftune(capsys, "train", f"--config={example}", *flags)
    assert (code, err if code else "") == (0, "")
    pipe = DiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.labels == {"eel": 0, "owl": 1, "yak": 2}
    code, _, err = difftune(
        capsys,
        "train",
        f"--config={example}",
        *flags,
        "--method=lora",
        f"--output={tmp_path / 'lora'}",
        "--training.gradient_checkpointing=true",
        "--training.mixed_precision=bf16",
    )
    assert (code, err if code else "") == (0, "")
    pipe = DiTPipeline.from_pretrained(root / "models/learned")
    before = stock_pictures(pipe, ["bee"])
    load_adapter(pipe, tmp_path / "lora")
    assert pipe.labels == {"eel": 0, "owl": 1, "yak": 2}
    assert farthest(stock_pictures(pipe, ["owl"]), before) > 0


@pytest.mark.wide
@pytest.mark.parametrize("pipeline", ["stock", "difftuning"])
@pytest.mark.parametrize("name", ["full, new", "lora, new", "lora", "fused"])
def test_a_run_is_exported_and_draws_the_same(finished, capsys, tmp_path, name, pipeline):
    """An adapter beside the base's modules, by the lines of the card, or fused into them with its classes."""
    recipe = finished(SETTINGS["lora, new" if name == "fused" else name])
    flags = [f"--pipeline={pipeline}", *(["--adapter=fused"] if name == "fused" else [])]
    code, _, err = difftune(capsys, "export", f"--run={recipe.output}", f"--to={tmp_path / 'export'}", *flags)
    assert (code, err if code else "") == (0, "")
    code = (tmp_path / "export" / "README.md").read_text().split("```python")[1].split("```")[0]
    lines: dict[str, Any] = {}
    exec(code.replace("image = pipe(", "labels = (").replace(").images[0]", ")"), lines)
    pipe = lines["pipe"]
    assert type(pipe) is (DiffTuningDiTPipeline if pipeline == "difftuning" else DiTPipeline)
    assert (tmp_path / "export" / "difftuning_dit.py").exists() == (pipeline == "difftuning")
    pipe.set_progress_bar_config(disable=True)
    drawn = stock_pictures(pipe, classes_of(recipe))
    assert farthest(drawn, tuned_pictures(recipe)) <= 1
    assert farthest(drawn, base_pictures(recipe)) > 3
    assert set(lines["labels"]) <= set(pipe.labels.values())


def test_domain_guidance_leaves_the_null_class_to_the_pretrained_model(finished):
    """With new classes, whose embeddings the adapter brought; they are off for the unconditional rows only."""
    recipe = finished(SETTINGS["lora, new"])
    pipe = DiffTuningDiTPipeline.from_pretrained(recipe.model.id, domain_guidance=True)
    pipe.set_progress_bar_config(disable=True)
    base = DiTPipeline.from_pretrained(recipe.model.id).transformer
    load_adapter(pipe, recipe.output)
    before, seen = {n: t.detach().clone() for n, t in tables_of(pipe.transformer).items()}, []
    handle = pipe.transformer.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out[0])), with_kwargs=True)
    pipe(pipe.get_label_ids(["yak"]), guidance_scale=3.0, num_inference_steps=2, generator=generators(0))
    handle.remove()
    with torch.no_grad():
        for args, kwargs, answer in seen:
            tuned, pretrained = pipe.transformer(*args, **kwargs)[0], base(*args, **kwargs)[0]
            assert (answer - torch.cat([tuned[:1], pretrained[1:]])).abs().max() < 1e-5
            assert (tuned[0] - pretrained[0]).abs().max() > 1e-3
    assert all(torch.equal(before[n], t) for n, t in tables_of(pipe.transformer).items())


def handed_over(pipe: Any, number: int, u0: float) -> np.ndarray:
    pipe.set_extras(domain_guidance=False, hand_over=u0)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "np"}
    return pipe([number], generator=generators(0), **settings).images


@pytest.mark.wide
@pytest.mark.parametrize("source", ["adapter", "whole", "difference"])
def test_the_drop_in_hands_over_to_the_pretrained_model_and_its_empty_class(finished, tmp_path, source):
    recipe = finished(SETTINGS["lora, new" if source == "adapter" else "full, new"])
    base = DiTPipeline.from_pretrained(recipe.model.id)
    base.set_progress_bar_config(disable=True)
    empty = base([1000], guidance_scale=3.0, num_inference_steps=3, generator=generators(0), output_type="np").images
    if source == "adapter":
        pipe = DiffTuningDiTPipeline.from_pretrained(recipe.model.id)
        load_adapter(pipe, recipe.output)
    else:
        folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), source_unet=source))
        code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
        lines: dict[str, Any] = {}
        exec(code.rpartition("image = pipe(")[0], lines)
        pipe = lines["pipe"]
    pipe.set_progress_bar_config(disable=True)
    own, between, other = (handed_over(pipe, 1, u0) for u0 in (0.0, 0.5, 1.0))
    tolerance = 2e-3 if source == "difference" else 1e-5  # whose numbers have 16 bits
    np.testing.assert_allclose(other, empty, atol=tolerance)
    assert np.abs(own - other).max() > 1e-2
    assert np.abs(between - own).max() > 1e-3
    assert np.abs(between - other).max() > 1e-3
    if source == "adapter":
        pipe.set_extras(hand_over=None, adapter_schedule={"kind": "table", "u": [0, 1], "strength": [0.0, 0.0]})
        found = pipe([1], guidance_scale=3.0, num_inference_steps=3, generator=generators(0), output_type="np").images
        np.testing.assert_allclose(found, empty, atol=1e-5)
        half = DiffTuningDiTPipeline.from_pretrained(recipe.model.id)
        load_adapter(half, recipe.output, strength=0.5)
        for name, table in tables_of(half.transformer).items():
            old, new = base.transformer.get_parameter(name)[-1], tables_of(pipe.transformer)[name][:3]
            torch.testing.assert_close(table[:3], (old + new) / 2, **TOLERANCE)


def test_other_tools_have_no_names_for_a_dit(finished, capsys, tmp_path):
    lora = finished(SETTINGS["lora"]).output
    code, _, err = difftune(capsys, "export", f"--run={lora}", f"--to={tmp_path / 'lora'}", "--format=kohya")
    assert code == 2
    assert "sd-scripts has no DiTTransformer2DModel" in err


@pytest.mark.wide
@pytest.mark.parametrize("name", ["lora, new", "full, new", "lora"])
def test_a_run_is_analysed_and_handed_over(finished, name):
    recipe = finished(SETTINGS[name] | {"data": {"holdout": 0.5}, "training": {"max_steps": 2}})
    config = AnalysisConfig(rows=4, staged=name != "lora", u0=[0.0, 1.0], pictures=6, steps=2)
    if config.staged:
        result = analyze(recipe, config, recipe.output)
        assert len(result["staged"]["tuned_above"]["kid"]) == 2
    else:
        result = analyze(recipe, replace(config, staged=False), recipe.output)
    assert all(math.isfinite(v) for v in result["forgetting"]["mean"] + result["gap"]["mean"])


@pytest.mark.wide
def test_runs_are_evaluated_against_their_base(finished, tmp_path):
    runs = [
        finished(SETTINGS[n] | {"data": {"holdout": 0.5}, "training": {"max_steps": 2}})
        for n in ("lora, new", "full, new")
    ]
    request = Evaluation([r.output for r in runs], pictures=6, steps=2, seeds=[0], output=str(tmp_path / "judged"))
    result = evaluate(request)
    assert result["settings"]["outside"] == [""]
    assert [s["name"] for s in result["sides"]] == [r.output for r in runs]
    assert all(math.isfinite(s["summary"]["kid"]["mean"]) for s in result["sides"])


@pytest.mark.wide
def test_a_budget_is_compared_with_the_loss_that_is_trained(make, tmp_path, monkeypatch):
    found = {}

    class Watched(trainer.TrainingLoop):
        def __init__(self, recipe, *args):
            super().__init__(recipe, *args)
            found[recipe.tuning.variance] = self.budget.base_losses

    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    for variance in ("fixed", "hybrid"):
        recipe = make("", tuning={"variance": variance, "forgetting_budget": 0.5}, training={"max_steps": 1})
        train(replace(recipe, output=str(tmp_path / variance)))
    assert bool((torch.as_tensor(found["hybrid"]) > torch.as_tensor(found["fixed"])).all())


@pytest.mark.slow
def test_it_overfits_to_four_pictures_of_two_classes(make, tmp_path):
    """And, told the one class or the other, draws the pictures of that class. With the embedded autoencoder, whose
    latents have the scale of noise."""
    icons = load_images("embedded/icons").examples
    for i, example in enumerate(icons[:4]):
        (tmp_path / "data" / ("eel", "owl")[i // 2]).mkdir(parents=True, exist_ok=True)
        example.load().save(tmp_path / "data" / ("eel", "owl")[i // 2] / f"{i}.png")
    vae = load_family("embedded").pipe.vae
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=40,
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    for block in transformer.transformer_blocks:  # each begins as the identity, as in the paper
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    pipe = DiTPipeline(transformer, vae, tiny_dit().scheduler)
    family_of(pipe).save_pipeline(tmp_path / "model")
    recipe = make(
        "",
        method="full",
        tuning={
            "label_space": "new",
            "retention_ratio": 0.0,
            "retention_weight": 0.0,
            "schedule": ScheduleConfig("constant"),
            "variance": "hybrid",
        },
        bank={"prompts": "empty"},
        data={"path": str(tmp_path / "data"), "holdout": 0.0},
        training={"max_steps": 1500, "batch_size": 16, "learning_rate": 3e-3, "checkpoint_every": 2000},
    )
    recipe = replace(recipe, model=ModelConfig(str(tmp_path / "model")), output=str(tmp_path / "run"))
    train(recipe)
    family, data = load_family(recipe.model.id), load_images(str(tmp_path / "data"), classes="folders")
    pixels = torch.from_numpy(np.stack([fit_square(e.load(), 64) for e in data.examples]))
    eels, owls = family.scale_latents(family.encode_moments(pixels)[0]).split(2)
    settings = {"steps": 20, "guidance_scale": 1.0, "resolution": 64}
    with tuned_model(family, recipe.output, run_record(recipe)) as tuned:
        drawn = {n: tuned.sample([n] * 4, generators(*range(4)), **settings) for n in ("eel", "owl")}

    def distance(pictures: torch.Tensor, to: torch.Tensor) -> float:
        return float(torch.cdist(pictures.flatten(1), to.flatten(1)).min(1).values.mean())

    assert distance(drawn["eel"], eels) < 0.8 * distance(drawn["eel"], owls)
    assert distance(drawn["owl"], owls) < 0.8 * distance(drawn["owl"], eels)
    assert max(distance(drawn["eel"], eels), distance(drawn["owl"], owls)) < 0.8 * distance(eels, owls)
