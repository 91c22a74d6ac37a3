"""Aspect-ratio buckets: each picture in the frame that crops least, its condition and sizes alike, a step of one."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.data.batches import BatchSource, TargetSet
from difftuning_control.data.buckets import BucketSource, bucket_line, bucket_shapes, into_buckets, kept
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.framing import Framing
from difftuning_control.data.images import placed
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.forgetting import measure_schedule
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.loss import compute_loss
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.identity import write_recipe
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.setup import auto_schedule, build_objective, make_accelerator
from difftuning_control.verbs.train import train
from support.family_runs import FEW_STEPS
from support.tiny_models import tiny_dit, tiny_flux, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline
from support.trainings import recomputed

MODELS = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SIZES = {"square": (16, 16), "wide": (34, 9), "tall": (8, 30)}  # width and height
COUNTS = {"square": 5, "wide": 3, "tall": 2}


def write_shapes(folder: Path) -> Path:
    """Ten pictures of three shapes, red by column and green by row, each with itself as its condition."""
    (folder / "conditions").mkdir(parents=True)
    rows, number = [], 0
    for name, count in COUNTS.items():
        width, height = SIZES[name]
        for _ in range(count):
            pixels = np.full((height, width, 3), 20 * number, np.uint8)
            pixels[..., 0] = np.linspace(0, 255, width)[None]
            pixels[..., 1] = np.linspace(0, 255, height)[:, None]
            Image.fromarray(pixels).save(folder / f"{number}.png")
            Image.fromarray(pixels).save(folder / "conditions" / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": f"{name} {number}"}))
            number += 1
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "pictures")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, make in (MODELS | {"dit": tiny_dit}).items():
        make().save_pretrained(root / name)
    return {name: str(root / name) for name in (*MODELS, "dit")}


@pytest.fixture
def make(tmp_path: Path, models: dict[str, str], shapes: Path):
    def recipe(name: str, family: str = "sd", method: str = "lora", **changes: dict[str, Any]) -> Recipe:
        data = {
            "path": str(shapes),
            "resolution": 16,
            "holdout": 0.0,
            "cache": str(tmp_path / "cache"),
            "buckets": True,
            "bucket_step": 8,
            "bucket_aspect": 4.0,
        }
        control = ControlConfig(
            annotator="supplied", path=f"{shapes}/conditions", bank_condition="blank", fidelity=FidelityConfig(every=0)
        )
        return Recipe(
            method,
            ModelConfig(models[family]),
            DataConfig(**data | changes.get("data", {})),
            TuningConfig(**changes.get("tuning", {})),
            BankConfig(size=10, steps=2, batch_size=4),
            AdapterConfig(rank=2) if method == "lora" else AdapterConfig(),
            control if method == "controlnet" else ControlConfig(),
            TrainingConfig(**FEW_STEPS | changes.get("training", {})),
            str(tmp_path / name),
        )

    return recipe


def loop_of(recipe: Recipe) -> TrainingLoop:
    family, accelerator = load_family(recipe.model.id), make_accelerator(recipe)
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, accelerator)
    return TrainingLoop(recipe, family, objective, inputs, accelerator, "identity")


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(1024, 64, 2.0), (512, 64, 4.0), (768, 8, 1.5)])
def test_buckets_have_about_the_squares_area_and_sides_of_the_step(resolution, step, aspect):
    found = bucket_shapes(resolution, step, aspect)
    assert (resolution, resolution) in found
    assert {(width, height) for height, width in found} == set(found)
    for height, width in found:
        assert height % step == width % step == 0
        assert max(height, width) <= aspect * min(height, width)
        assert height * width <= resolution**2 < (min(height, width) + step) * max(height, width)


def test_the_usual_buckets_of_sdxl_are_there():
    assert {(832, 1216), (896, 1152), (768, 1344)} <= set(bucket_shapes(1024, 64, 2.0))


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (33, 33), (500, 123)])
def test_what_is_kept_is_the_area_of_the_frame_in_the_resized_picture(size):
    for shape in bucket_shapes(64, 8, 4.0):
        resized, _, _ = placed(size, *shape)
        assert kept(size, shape) == pytest.approx(shape[0] * shape[1] / (resized[0] * resized[1]), rel=0.05)
        assert kept(size, shape) <= 1 + 1e-9


def test_each_picture_is_in_the_bucket_that_crops_least_of_it(shapes, models):
    family, data = load_family(models["sd"]), load_images(str(shapes))
    config = DataConfig(str(shapes), resolution=16, buckets=True, bucket_step=8, bucket_aspect=4.0)
    found = into_buckets(family, config, data, Framing.of(config, 16))
    assert [len(bucket.data) for bucket in found] == sorted(COUNTS.values(), reverse=True)
    assert sorted(e.name for b in found for e in b.data.examples) == sorted(e.name for e in data.examples)
    for bucket in found:
        for example in bucket.data.examples:
            best = max(kept(example.size, shape) for shape in bucket_shapes(16, 8, 4.0))
            assert kept(example.size, bucket.shape) == pytest.approx(best)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_step_that_the_model_cannot_take_is_refused(make, family):
    with pytest.raises(UserError, match=r"bucket_step is 9; this model takes sides that are multiples of"):
        loop_of(make("refused", family, data={"bucket_step": 9}))


def test_a_model_of_one_size_is_refused(shapes, models):
    config = DataConfig(str(shapes), buckets=True, bucket_step=16, bucket_aspect=4.0)
    with pytest.raises(UserError, match=r"a side of data.buckets is \d+; this model draws at 16 pixels only"):
        into_buckets(load_family(models["dit"]), config, load_images(str(shapes)), Framing.of(config, 32))


@pytest.mark.parametrize(
    "data",
    [
        {"bucket_step": 8},
        {"bucket_aspect": 3.0},
        {"buckets": True, "bucket_aspect": 0.5},
        {"buckets": True, "bucket_step": 1},
        {"buckets": True, "stream": True},
    ],
)
def test_settings_that_make_no_sense_are_refused(data):
    with pytest.raises(UserError, match="bucket"):
        Recipe(data=DataConfig(**data))


# --- picture, condition and sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", [Framing(16, True, 3, shape=(8, 32)), Framing(16, True, 2, 5, (24, 8))])
def test_a_condition_is_cropped_and_mirrored_as_its_picture_and_the_sizes_say_how(shapes, framing):
    from difftuning_control.data.conditions import _views
    from difftuning_control.data.control_spec import Conditioner, ControlSpec

    data = load_images(str(shapes), condition_path=str(shapes / "conditions"))
    conditioner = Conditioner(ControlSpec("supplied", resolution=16))
    for example in data.examples:
        pictures, sizes = framing.pictures(example), framing.sizes(example)
        assert pictures.shape[1:] == (framing.height, framing.width, 3)
        assert np.array_equal(pictures, _views(conditioner, example, framing))
        for picture, row in zip(pictures, sizes.tolist()):
            height, width, top, left, *frame = row
            assert (width, height) == example.size
            assert frame == [framing.height, framing.width]
            resized, _, _ = placed(example.size, framing.height, framing.width)
            whole = np.array(example.load().convert("RGB").resize(resized, Image.Resampling.LANCZOS))
            is_mirrored = picture[0, 0, 0] > picture[0, -1, 0]
            whole = whole[:, ::-1] if is_mirrored else whole
            assert np.array_equal(whole[top : top + framing.height, left : left + framing.width], picture)


@pytest.mark.wide
def test_the_denoiser_of_sdxl_is_told_what_the_stock_pipeline_would_tell_it(make):
    loop = loop_of(make("sizes", "sdxl"))
    pipe = loop.family.pipe
    for step in range(6):
        for part in loop.source.rows(step).parts:
            given = loop.family.denoiser_inputs(part.batch.latents, part.levels, part.batch.conditioning)
            frame = [2 * side for side in part.batch.latents.shape[2:]]
            for row, ids in zip(part.batch.conditioning["sizes"].tolist(), given["added_cond_kwargs"]["time_ids"]):
                assert row[4:] == frame
                stock = pipe._get_add_time_ids(
                    tuple(row[:2]),
                    tuple(row[2:4]),
                    tuple(row[4:]),
                    torch.float32,
                    pipe.text_encoder_2.config.projection_dim,
                )
                assert torch.equal(ids, stock[0])


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BucketSource:
    """Buckets of 7, 4 and 1 pictures, and a bank of squares."""
    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.data.latents import LatentMoments
    from difftuning_control.objective.difftuning import DiffTuningObjective

    family, generator = family_of(tiny_pipeline()), torch.Generator().manual_seed(0)
    buckets = []
    for count, shape in ((7, (4, 8, 8)), (4, (4, 4, 16)), (1, (4, 12, 4))):
        mean, std = torch.randn(2, count, 1, *shape, generator=generator)
        names = [f"{shape[1]}×{shape[2]} {i}" for i in range(count)]
        buckets.append(TargetSet(LatentMoments(mean, std.exp()), names, names))
    captions = [c for b in buckets for c in b.captions]
    embeddings = cached_embeddings(family, captions, tmp_path_factory.mktemp("prompts"), lambda count: None)
    bank = KnowledgeBank.from_latents(torch.randn(5, 4, 8, 8, generator=generator), [""] * 5, "here", "0")
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "paper", stratified=True)
    objective = replace(objective, retention_ratio=0.25, retention_weight=0.1)
    return BucketSource(BatchSource(family, objective, buckets[0], embeddings, bank, "empty", 0.0, 4, 3), buckets)


def test_every_bucket_has_its_share_of_the_steps_after_any_number_of_them(source):
    taken = Counter()
    for step in range(60):
        number, turn = source.turn(step)
        assert turn == taken[number]
        taken[number] += 1
        for bucket, targets in enumerate(source.buckets):
            assert abs(taken[bucket] - (step + 1) * len(targets) / 12) < 1


def test_within_a_bucket_every_picture_comes_once_before_any_comes_again(source):
    seen: Counter[str] = Counter()
    for step in range(48):  # 4 × 12 pictures at 3 rows a step: 12 times each
        part = source.rows(step).parts[0]
        names = [name for name, bank in zip(part.batch.ids, part.batch.is_retention) if not bank]
        assert len({name.split()[0] for name in names}) == 1
        seen.update(names)
        for bucket in source.buckets:
            counts = [seen[name] for name in bucket.names]
            assert max(counts) - min(counts) <= 1
    assert set(seen.values()) == {12}


def test_what_a_step_holds_depends_on_nothing_before_it(source):
    fresh = BucketSource(source.plain, source.buckets)
    for step in (13, 2, 40):
        for one, other in zip(fresh.rows(step).parts, source.rows(step).parts, strict=True):
            assert one.batch.ids == other.batch.ids
            assert torch.equal(one.batch.latents, other.batch.latents)
            assert torch.equal(one.noise, other.noise)


@pytest.mark.parametrize("step", range(5))
def test_processes_and_forwards_share_the_rows_of_a_step(source, step):
    def rows(plain: BatchSource, forward: int) -> dict[str, torch.Tensor]:
        parts = BucketSource(plain, source.buckets).rows(step, forward).parts
        return {
            f"{name} {level}": row for p in parts for name, row, level in zip(p.batch.ids, p.batch.latents, p.levels)
        }

    whole = rows(source.plain, 0)
    apart: dict[str, torch.Tensor] = {}
    for process in range(2):
        for forward in range(2):
            apart |= rows(replace(source.plain, size=1, process_index=process, num_processes=2, forwards=2), forward)
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[name], apart[name]) for name in whole)


# --- training -------------------------------------------------------------------------------------------------------


def test_bank_rows_of_another_shape_count_as_much_as_in_one_forward(make):
    loop = loop_of(make("loss", tuning={"retention_ratio": 0.4}))
    step = next(s for s in range(9) if loop.source.rows(s).apart is not None)
    rows = loop.source.rows(step)
    assert [p.batch.is_retention.tolist() for p in rows.parts] == [[False] * 3, [True] * 2]
    expected = 0.0
    for part in rows.parts:
        for row in range(len(part.batch)):  # each alone
            batch = part.batch.rows(slice(row, row + 1)).to(loop.accelerator.device, part.noise.dtype)
            noise, level = part.noise[row : row + 1].to(batch.latents), part.levels[row : row + 1]
            with torch.no_grad():
                loss = compute_loss(loop.family, loop.denoiser, loop.objective, batch, noise, level)
            weight = loop.objective.row_weights(level, batch.is_retention)
            expected += float(loss * weight) / (2 if batch.is_retention else 3)
    assert loop.step(step)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.wide
@pytest.mark.parametrize("family", MODELS)
def test_training_on_three_shapes_moves_every_weight_and_is_recorded(make, family):
    recipe = make("trained", family)
    run = train(recipe).record
    trained = load_file(Path(recipe.output) / "pytorch_lora_weights.safetensors")
    family_of_run = load_family(recipe.model.id)
    unused = family_of_run.unused_parameters(family_of_run.denoiser)
    ups = {name.split(".", 1)[1]: t for name, t in trained.items() if ".lora_B." in name}
    assert ups
    assert [name for name, t in ups.items() if not t.any() and not name.startswith(unused)] == []
    assert sorted(run.data.buckets["pictures"].values()) == sorted(COUNTS.values())
    assert 0 < run.data.buckets["cropped"] < 0.2


@pytest.mark.wide
def test_an_interrupted_run_ends_as_an_undisturbed_one(make, monkeypatch):
    whole, broken = make("whole"), make("broken")
    train(whole)
    advance = TrainingLoop.advance

    def stop(loop: TrainingLoop, number: int, more: bool = True) -> None:
        if number == 3:
            raise KeyboardInterrupt
        advance(loop, number, more)

    monkeypatch.setattr(TrainingLoop, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    train(replace(broken, training=replace(broken.training, resume=True)))
    one, other = (load_file(Path(r.output) / "pytorch_lora_weights.safetensors") for r in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.sample("sd")
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_controlnet_trains_on_three_shapes(make, family):
    lines: list[str] = []
    recipe = make("control", family, "controlnet")
    run = train(recipe, tell=lines.append).record
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    found = run.data.buckets
    assert sorted(found["pictures"].values()) == sorted(COUNTS.values())
    (line,) = (line for line in lines if line.startswith("pictures in"))
    assert line.startswith(f"pictures in {len(COUNTS)} frames")
    page = html.unescape((Path(recipe.output) / "report.html").read_text())
    for shape, count in found["pictures"].items():
        assert f"{count} of {shape}" in line
        assert f"{count} of {shape}" in page
    assert f"{found['cropped']:.0%} of a picture is cropped" in line
    assert f"{found['cropped']:.0%} of a picture cropped" in page


@pytest.mark.wide
def test_a_training_says_how_its_pictures_are_framed(make, tmp_path, capsys):
    recipe = make("told")
    write_recipe(tmp_path, recipe)
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--training.max_steps", "1"]
    main(["train", *flags])
    assert "\npictures in 3 frames (height×width): 5 of 16×16, " in capsys.readouterr().out
    plain = {"data.buckets": "false", "data.bucket_step": "null", "data.bucket_aspect": "2.0"}
    main(["train", *flags, "--overwrite", *(f"--{key}={value}" for key, value in plain.items())])
    assert "frames" not in capsys.readouterr().out


def test_many_frames_are_told_in_a_line():
    counts = {f"{side}×64": 100 - side for side in range(16, 64, 4)}
    line = bucket_line({"pictures": counts, "cropped": 0.034})
    assert line.count("×") == 1 + 8
    assert line.endswith("and 4 more; on average 3% of a picture is cropped away")


@pytest.mark.wide
def test_squares_are_in_one_bucket_and_encoded_as_without_buckets(make, pictures):
    with_buckets = make("with", data={"path": str(pictures)})
    without = make("without", data={"path": str(pictures), "buckets": False, "bucket_step": None, "bucket_aspect": 2.0})
    one, other = (loop_of(recipe).inputs for recipe in (with_buckets, without))
    assert one.bucketing == {"pictures": {"16×16": len(one.data)}, "cropped": 0.0}
    assert other.bucketing is None
    assert torch.equal(one.targets.moments.mean[:], other.targets.moments.mean[:])


@pytest.mark.wide
def test_layers_masked_by_noise_level_are_recomputed_as_they_were(make):
    """T-LoRA's mask is the last forward's, and a checkpointed forward is done again in its backward."""
    rows = {"tuning": {"retention_ratio": 0.4}, "training": {"max_steps": 3, "weight_decay": 0.0}}
    plain, checkpointed = (make(name, **rows) for name in ("plain", "checkpointed"))
    found = []
    for recipe, checkpointing in ((plain, False), (checkpointed, True)):
        settings = replace(recipe.training, gradient_checkpointing=checkpointing)
        with recomputed() as again:
            train(replace(recipe, adapter=AdapterConfig("tlora", rank=4), training=settings))
        assert bool(again) == checkpointing
        found.append(load_file(Path(recipe.output) / "pytorch_lora_weights.safetensors"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_a_schedule_is_measured_on_pictures_of_all_shapes(make, tmp_path, monkeypatch):
    recipe = make("auto", tuning={"schedule": ScheduleConfig("auto")}, training={"max_steps": 4000})
    loop = loop_of(replace(recipe, tuning=TuningConfig()))
    loop.family.to(loop.accelerator.device)
    asked: list[str] = []

    def watched(family, target, *others):
        asked.extend(target.prompts)
        return measure_schedule(family, target, *others)

    monkeypatch.setattr("difftuning_control.training.setup.measure_schedule", watched)
    measured = auto_schedule(recipe, loop.family, loop.inputs, tmp_path, 1)
    assert {prompt.split()[0] for prompt in asked} == set(SIZES)
    assert measured.rows == len(loop.inputs.bank)
    assert len(measured.psi) == len(measured.u)
