"""Every family through our trainer: what trains moves, what does not stays, and stock diffusers draws what we draw."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from difftuning_control.data.batches import BatchSource
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.framing import Framing
from difftuning_control.data.images import frame
from difftuning_control.data.sources import load_images
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.flux import Flux
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.transformer import FlowTransformer
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.runs.record_sections import Fingerprints
from difftuning_control.system.digests import digest_of_file
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.setup import attach_controlnet, build_objective, make_accelerator
from difftuning_control.verbs import train as trainer
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.train import train
from support.controls import OUTLINE, write_photos
from support.family_runs import FEW_STEPS
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.tensors import differing
from support.tiny_models import tiny_flux, tiny_sd3, tiny_sdxl
from support.trainings import interrupted_after, recomputed, record, resumed, rows, run_record, trained_once
from support.tuned_pictures import LORA_FILE, PROMPTS, SAMPLING, assert_same_pictures, generators, opened

MODELS = {"sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
COMPONENTS = {"sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
# what leads to the prompt's stream after the last block, which nobody reads
UNUSED = {"sd3": r"blocks.1.attn.(add_q_proj|norm_added_q)"}
WEIGHT = {"tuning": {"estimator": "weight", "retention_prompts": "own", "prompt_dropout": 0.4}}

Maker = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("families")
    (folder / "family_outlines.py").write_text(OUTLINE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("family_outlines", None)


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, str]:
    for name, make in MODELS.items():
        make(sharp=True).save_pretrained(root / "models" / name)
    return {name: str(root / "models" / name) for name in MODELS}


@pytest.fixture(scope="module")
def photos(root: Path) -> Path:
    return write_photos(root / "photos")


@pytest.fixture(scope="module")
def make(root: Path, models: dict[str, str], photos: Path) -> Maker:
    """Makes recipes that train a tiny model of a family for four steps, with one cache for all."""

    def recipe(name: str, family: str, method: str = "lora", **sections: dict[str, Any]) -> Recipe:
        control = {"annotator": "family_outlines:outline", **sections.get("control", {})}
        control["fidelity"] = FidelityConfig(every=4, size=2, steps=2)
        data = {"path": str(photos), "holdout": 0.25, "resolution": 16, "cache": str(root / "cache")}
        return Recipe(
            method,
            ModelConfig(models[family]),
            DataConfig(**data | sections.get("data", {})),
            TuningConfig(**sections.get("tuning", {})),
            BankConfig(**{"size": 10, "steps": 2, "batch_size": 4, **sections.get("bank", {})}),
            AdapterConfig(**sections.get("adapter", {"rank": 2, "alpha": 4.0} if method == "lora" else {})),
            ControlConfig(**control) if method == "controlnet" else ControlConfig(),
            TrainingConfig(**{**FEW_STEPS, **sections.get("training", {})}),
            str(root / name),
        )

    return recipe


@pytest.fixture(scope="module")
def finished(make: Maker) -> Callable[..., Recipe]:
    return trained_once(make)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 gives 16 tokens, which saves time."""
    for family in (FlowTransformer, Flux):
        monkeypatch.setattr(family, "t5_length", 16)


def stock_pictures(pipe: Any, **more: Any) -> list[Image.Image]:
    """What stock diffusers draws for `PROMPTS` with the seeds and settings of `SAMPLING`."""
    return pipe(
        PROMPTS, height=16, width=16, num_inference_steps=2, guidance_scale=3.0, generator=generators(), **more
    ).images


def tuned_pictures(recipe: Recipe, control: Tensor | None = None) -> list[Image.Image]:
    """What this package draws with a finished run."""
    with tuned_model(load_family(recipe.model.id), recipe.output, run_record(recipe)) as tuned:
        return sample_pictures(tuned, PROMPTS, **SAMPLING, control=control)


def used(family: str, names: Any) -> set[str]:
    return {n for n in names if not re.search(UNUSED.get(family, "none"), n)}


# --- LoRA and full weights ------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_a_lora_reloads_in_stock_diffusers_and_draws_the_same(finished, name):
    recipe = finished({"family": name})
    base = DiffusionPipeline.from_pretrained(recipe.model.id)
    before = stock_pictures(base)
    base.load_lora_weights(recipe.output, weight_name="pytorch_lora_weights.safetensors")
    after = stock_pictures(base)
    assert_same_pictures(after, tuned_pictures(recipe))
    assert any(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 3 for a, b in zip(before, after))


@pytest.mark.wide
@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"pipeline": "stock"}, {"pipeline": "stock", "adapter": "fused"}], ids=str)
def test_an_exported_lora_draws_the_same_by_the_lines_of_its_card(finished, name, settings, tmp_path):
    recipe = finished({"family": name})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), **settings))
    pipe = opened(folder)
    stock, ours = {
        "sd3": ("StableDiffusion3Pipeline", "DiffTuningSD3Pipeline"),
        "flux": ("FluxPipeline", "DiffTuningFluxPipeline"),
    }[name]
    assert type(pipe).__name__ == (stock if settings else ours)
    assert_same_pictures(stock_pictures(pipe), tuned_pictures(recipe))
    if not settings:
        pipe.set_extras(domain_guidance=True)
        scale = {"true_cfg_scale": 2.0} if name == "flux" else {}
        pairs = zip(stock_pictures(pipe, **scale), tuned_pictures(recipe))
        assert all((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


@pytest.mark.sample("difference-sd3")
@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
@pytest.mark.parametrize("source", ["whole", "difference"])
def test_exported_weights_have_the_base_beside_them(finished, name, source, tmp_path):
    recipe = finished({"family": name, "method": "full", **WEIGHT})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), source_unet=source))
    assert (folder / "source_transformer").is_dir() == (source == "whole")
    pipe = opened(folder)
    assert pipe.extras.domain_guidance
    base = load_family(recipe.model.id).denoiser.state_dict()
    found = pipe.source_transformer.state_dict()
    assert found.keys() == base.keys()
    assert all(torch.allclose(found[n], t, atol=1e-5) for n, t in base.items())
    pipe.set_extras(domain_guidance=False)
    assert_same_pictures(stock_pictures(pipe), tuned_pictures(recipe))


@pytest.mark.wide
def test_every_factor_of_a_lora_moves_and_nothing_else(make, name, tmp_path, monkeypatch):
    loaded, attached = [], {}

    def load(*args: Any, **options: Any) -> Any:
        loaded.append(load_family(*args, **options))
        return loaded[-1]

    class Watched(trainer.TrainingLoop):
        def __init__(self, *args: Any):
            super().__init__(*args)
            attached.update({n: p.detach().clone() for n, p in self.parameters.items()})

    monkeypatch.setattr("difftuning_control.families.loading.load_family", load)
    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    train(replace(make("", name, **WEIGHT), output=str(tmp_path)))
    (family,) = loaded
    trained = {n: p.detach() for n, p in family.denoiser.named_parameters() if p.requires_grad}
    assert attached
    assert set(trained) == set(attached) == used(name, trained) == differing(trained, attached)
    fresh = load_family(str(make("", name).model.id))
    for part, module in fresh.modules.items():
        state = module.state_dict()
        now = {k.replace(".base_layer.", "."): v for k, v in family.modules[part].state_dict().items()}
        assert all(torch.equal(now[k], v) for k, v in state.items()), part


@pytest.mark.wide
def test_full_weights_reload_in_stock_diffusers_and_draw_the_same(finished, name):
    recipe = finished({"family": name, "method": "full", **WEIGHT})
    pipe = DiffusionPipeline.from_pretrained(f"{recipe.output}/pipeline")
    assert_same_pictures(stock_pictures(pipe), tuned_pictures(recipe))
    base = DiffusionPipeline.from_pretrained(recipe.model.id)
    assert pipe.config == base.config or dict(pipe.config) | {"_name_or_path": ""} == dict(base.config) | {
        "_name_or_path": ""
    }
    changed = {
        part: differing(module.state_dict(), getattr(base, part).state_dict())
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    trained = {n for n, _ in getattr(base, COMPONENTS[name]).named_parameters()}
    assert changed.pop(COMPONENTS[name]) == used(name, trained)
    assert not any(changed.values())


@pytest.mark.sample("sd3")
def test_gradient_checkpointing_changes_no_weight(make, finished, name, tmp_path):
    recipe = replace(make("", name, training={"gradient_checkpointing": True}), output=str(tmp_path))
    with recomputed() as again:
        train(recipe)
    assert "Linear" in again
    found, expected = (load_file(f"{r.output}/{LORA_FILE}") for r in (recipe, finished({"family": name})))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.wide
def test_a_run_in_bf16_is_one_whose_loss_is_near(make, finished, name, tmp_path):
    recipe = replace(make("", name, training={"mixed_precision": "bf16"}), output=str(tmp_path))
    train(recipe)
    found, expected = (rows(r)[0]["target_loss"] for r in (recipe, finished({"family": name})))
    assert found != expected
    assert abs(found / expected - 1) < 0.1


@pytest.mark.wide
@pytest.mark.parametrize(
    ("family", "method"), [("sd3", "lora"), ("flux", "full"), ("sdxl", "lora"), ("sd3", "controlnet")]
)
def test_an_interrupted_run_ends_bit_by_bit_as_an_undisturbed_one(make, finished, family, method, tmp_path):
    recipe = replace(make("", family, method), output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt), interrupted_after(3):
        train(recipe)
    train(resumed(recipe))
    whole = finished({"family": family, "method": method})
    files = sorted(p.relative_to(whole.output) for p in Path(whole.output).rglob("*.safetensors"))
    assert files
    for file in files:
        assert digest_of_file(tmp_path / file) == digest_of_file(Path(whole.output) / file)
    assert rows(recipe) == rows(whole)
    assert record(recipe)["losses"] == record(whole)["losses"]


# --- ControlNets ----------------------------------------------------------------------------------------------------


@pytest.mark.sample("sd3")
def test_a_controlnet_reloads_in_stock_diffusers_and_draws_the_same(finished, photos, name):
    recipe = finished({"family": name, "method": "controlnet"})
    run = record(recipe)
    assert run["frozen"]["denoiser_before"] == run["frozen"]["denoiser_after"]
    controlnet_class, pipeline_class = (getattr(diffusers, n) for n in run["control"]["classes"])
    controlnet = controlnet_class.from_pretrained(f"{recipe.output}/controlnet")
    pipe = pipeline_class.from_pretrained(recipe.model.id, controlnet=controlnet)
    conditioner = Conditioner(ControlSpec.load(f"{recipe.output}/controlnet"))
    pictures = [conditioner.prepare(e.load()) for e in load_images(str(photos)).examples[: len(PROMPTS)]]
    control = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    found = stock_pictures(pipe, **{run["control"]["argument"]: pictures})
    assert_same_pictures(found, tuned_pictures(recipe, control))
    words = (Path(recipe.output) / "README.md").read_text()
    assert f"from diffusers import {controlnet_class.__name__}, {pipeline_class.__name__}" in words
    assert f"{run['control']['argument']}=condition" in words


@pytest.mark.wide
def test_every_weight_of_a_controlnet_moves_once_its_zeros_have(make, name, tmp_path):
    recipe = replace(make("", name, "controlnet", training={"max_steps": 5}), output=str(tmp_path))
    train(recipe)
    start = load_family(recipe.model.id).new_controlnet(recipe.training.seed).state_dict()
    found = load_file(tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors")
    still = set(start) - differing(found, start)
    last = {"sd3": 0, "flux": 1}.get(name)
    streams = r"(attn\.(add_q_proj|norm_added_q|to_add_out)|ff_context)\."
    expected = {
        n for n in start if re.match(rf"transformer_blocks\.{last}\.{streams}", n) or n == "pos_embed.pos_embed"
    }
    assert still == expected


@pytest.mark.wide
def test_a_lora_of_a_controlnet_trains_its_targets_its_input_and_its_zeros(make, name, tmp_path):
    adapter = {"on": "controlnet", "rank": 2, "alpha": 4.0}
    recipe = replace(make("", name, "controlnet", adapter=adapter, training={"max_steps": 5}), output=str(tmp_path))
    train(recipe)
    family = load_family(recipe.model.id)
    start = family.new_controlnet(recipe.training.seed).state_dict()
    found = load_file(tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors")
    adapted = tuple(f".{target}.weight" for target in family.lora_targets)
    unread = family.unused_parameters(family.new_controlnet(0)) or "none"
    expected = {n for n in start if n.endswith(adapted) or n.startswith(family.controlnet_whole)}
    expected = {n for n in expected if not n.startswith(unread)}
    assert differing(found, start) == expected


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_conditions_are_encoded_once_before_training(make, family, monkeypatch, tmp_path):
    recipe = make("", family, "controlnet", control={"dropout": 0.5, "bank_condition": "blank"}, data={"flip": True})
    model = load_family(recipe.model.id)
    conditioner = attach_controlnet(recipe, model, Fingerprints())
    objective = build_objective(recipe, model.process)
    inputs = prepare_inputs(recipe, model, objective, make_accelerator(recipe), conditioner)
    assert inputs.control is not None
    source = BatchSource(
        model, objective, inputs.targets, inputs.embeddings, inputs.bank, "empty", 0.0, 5, 0, condition_dropout=0.5
    )
    black = model.encode_control(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0]
    views = [
        model.encode_control(torch.from_numpy(np.array(conditioner.condition(view)))[None].permute(0, 3, 1, 2))[0]
        for e in inputs.data.examples
        for view in Framing(16, flip=True).pictures(e)
    ]
    monkeypatch.setattr(model.pipe.vae, "encode", None)  # from here on nothing may be encoded
    seen = torch.cat([source.rows(step).batch.conditioning["control"] for step in range(6)])
    blank = [torch.allclose(row, black, atol=1e-5) for row in seen]
    assert 6 <= sum(blank) < len(seen)
    for row, empty in zip(seen, blank):
        assert empty or any(torch.allclose(row, view, atol=1e-5) for view in views)
    again = prepare_inputs(recipe, model, objective, make_accelerator(recipe), conditioner)  # all from the cache
    assert torch.equal(again.targets.conditions.shards[0][:], inputs.targets.conditions.shards[0][:])


# --- sizes of SDXL --------------------------------------------------------------------------------------------------


def test_sdxl_is_told_what_was_done_to_each_view(make, photos):
    recipe = make("", "sdxl", data={"flip": True, "crops": 3, "holdout": 0.0})
    family = load_family(recipe.model.id)
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, make_accelerator(recipe))
    framing = Framing(16, flip=True, crops=3)
    assert inputs.targets.sizes is not None
    for example, sizes in zip(inputs.data.examples, inputs.targets.sizes):
        image = example.load()
        scale = max(16 / image.width, 16 / image.height)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        for i, (view, size) in enumerate(zip(framing.pictures(example), sizes.tolist())):
            height, width, top, left, *target = size
            assert ((height, width), target) == ((image.height, image.width), [16, 16])
            whole = np.asarray(resized)[:, ::-1] if i >= 3 else np.asarray(resized)
            assert np.array_equal(whole[top : top + 16, left : left + 16], view)
            assert example.size == image.size
    assert len({tuple(s) for s in inputs.targets.sizes.flatten(0, 1).tolist()}) > 12
    batch = (
        BatchSource(family, objective, inputs.targets, inputs.embeddings, inputs.bank, "empty", 0.0, 10, 0)
        .rows(0)
        .batch
    )
    told = batch.conditioning["sizes"]
    assert told[batch.is_retention].tolist() == [[16, 16, 0, 0, 16, 16]] * 2  # as the stock pipeline drew them
    known = inputs.targets.sizes.flatten(0, 1)
    assert all((row == known).all(1).any() for row in told[~batch.is_retention])


def test_validation_and_a_bank_of_pictures_are_told_sizes_too(make, photos):
    recipe = make("", "sdxl", bank={"path": str(photos)})
    family = load_family(recipe.model.id)
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, make_accelerator(recipe))
    told = inputs.validation["target"].batch.conditioning["sizes"]
    assert told.tolist() == [Framing(16).sizes(e)[0].tolist() for e in inputs.held_out.examples]
    assert inputs.bank is not None
    assert inputs.bank.sizes is not None
    examples = load_images(str(photos)).examples
    expected = [Framing(16).sizes(e)[0].tolist() for e in examples]
    kept = inputs.validation["bank"].batch.conditioning["sizes"].tolist()
    assert inputs.bank.sizes.tolist() + kept == expected
    assert frame(examples[0].load(), 16, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_other_families_are_told_none(make, family):
    recipe = make("", family)
    model = load_family(recipe.model.id)
    inputs = prepare_inputs(recipe, model, build_objective(recipe, model.process), make_accelerator(recipe))
    assert inputs.targets.sizes is None
    assert set(inputs.validation["target"].batch.conditioning) == {"prompt_embeds", "pooled_prompt_embeds"}


# --- what it is for -------------------------------------------------------------------------------------------------


def stock_loss(pipe: Any, name: str, latents: Tensor, captions: list[str]) -> float:
    """The loss of diffusers' own training scripts, at fixed noise and timesteps, with a pipeline's modules."""
    generator = torch.Generator().manual_seed(11)
    total = []
    for index in (100, 300, 500, 700, 900):
        noise = torch.randn(latents.shape, generator=generator)
        if name == "sdxl":
            scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
            embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
            timesteps = torch.full((len(latents),), index)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(latents))}
            pred, target = pipe.unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample, noise
        else:
            sigma = pipe.scheduler.sigmas[index]
            noisy, target = (1.0 - sigma) * latents + sigma * noise, noise - latents
            timesteps = pipe.scheduler.timesteps[index].expand(len(latents))
            if name == "sd3":
                embeds, _, pooled, _ = pipe.encode_prompt(
                    captions, None, None, do_classifier_free_guidance=False, max_sequence_length=16
                )
                pred = pipe.transformer(noisy, embeds, pooled, timesteps).sample
            else:
                embeds, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=16)
                packed = pipe._pack_latents(noisy, *noisy.shape)
                ids = pipe._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
                pred = pipe.transformer(
                    packed, embeds, pooled, timesteps / 1000, ids, text_ids, torch.ones(len(latents))
                ).sample
                pred = pipe._unpack_latents(pred, 16, 16, 2)
        total.append(torch.nn.functional.mse_loss(pred, target))
    return float(torch.stack(total).mean())


@pytest.mark.wide
def test_a_model_trained_here_lowers_the_loss_of_the_stock_formulas(make, name, short_prompts, tmp_path):
    training = {"max_steps": 40, "learning_rate": 1e-2, "lr_scheduler": "constant", "checkpoint_every": 100}
    plain = {"retention_ratio": 0.0, "retention_weight": 0.0, "schedule": ScheduleConfig("constant")}
    recipe = make("", name, "full", training=training, tuning=plain, data={"holdout": 0.0})
    recipe = replace(recipe, output=str(tmp_path))
    train(recipe)
    base, tuned = (DiffusionPipeline.from_pretrained(p) for p in (recipe.model.id, f"{recipe.output}/pipeline"))
    family, examples = load_family(recipe.model.id), load_images(recipe.data.path).examples
    with torch.no_grad():
        moments = family.encode_moments(torch.cat([Framing(16).pixels(e) for e in examples]))[0]
        latents, captions = family.scale_latents(moments), [e.caption for e in examples]
        before, after = (stock_loss(p, name, latents, captions) for p in (base, tuned))
    assert after < 0.95 * before


@pytest.mark.wide
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_four_pictures_are_learnt_by_heart(make, family, short_prompts, tmp_path):
    """Loss, and the error of what the stock pipeline draws for each caption against the four pictures' variance."""
    folder = write_pictures(tmp_path / "four", 4, seed=2)
    examples = load_images(str(folder)).examples
    pixels = torch.cat([Framing(16).pixels(e) for e in examples])
    pipe = MODELS[family](sharp=True)
    moments = family_of(pipe).encode_moments(pixels)[0]
    pipe.vae.register_to_config(scaling_factor=1 / moments.std().item(), shift_factor=moments.mean().item())
    pipe.save_pretrained(tmp_path / "model")
    training = {"max_steps": 300, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 1000}
    plain = {"retention_ratio": 0.0, "retention_weight": 0.0, "schedule": ScheduleConfig("constant")}
    recipe = make("", family, "full", training=training, tuning=plain, data={"path": str(folder), "holdout": 0.0})
    recipe = replace(recipe, model=ModelConfig(str(tmp_path / "model")), output=str(tmp_path / "run"))
    train(recipe)
    losses = [row["target_loss"] for row in rows(recipe) if "target_loss" in row]
    assert sum(losses[-30:]) < 0.1 * sum(losses[:30])
    tuned = load_family(f"{recipe.output}/pipeline")
    true = tuned.decode(tuned.scale_latents(moments))  # as good as the autoencoder can show them
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    drawn = tuned.decode(
        tuned.sample([e.caption for e in examples], seeds, steps=20, guidance_scale=1.0, resolution=16)
    )
    variance = (true - true.mean(0)).square().mean()
    assert (drawn - true).square().mean() < 0.5 * variance


@pytest.mark.wide
def test_schedule_measured_and_runs_judged(make, name, root, short_prompts, tmp_path):
    """`auto`, `analyze` with staged sampling, and `evaluate`, each to its end."""
    features = str(save_tiny_dinov2(root / "features" / name))
    if name == "sdxl":
        auto = make("", name, tuning={"schedule": ScheduleConfig("auto")}, training={"max_steps": 30, "batch_size": 20})
        assert len(train(replace(auto, output=str(tmp_path / "auto"))).record.schedule.xi) == 10
    held_out = write_photos(root / "held", 12, seed=9)
    plain = make("", name, data={"holdout": 0.0, "validation_path": str(held_out)})
    plain = replace(plain, output=str(tmp_path / "plain"))
    train(plain)
    config = AnalysisConfig(
        rows=6, draws=1, staged=True, u0=[0.0, 0.5, 1.0], pictures=6, steps=2, guidance_scale=2.0, features=features
    )
    found = analyze(Recipe(), config, plain.output)
    assert found["staged"]["tuned_above"]["kid"][0] == found["staged"]["tuned_below"]["kid"][-1]
    assert np.isfinite(found["gap"]["mean"]).all()
    request = Evaluation(
        [plain.output],
        features=features,
        pictures=6,
        seeds=[0],
        steps=2,
        guidance_scale=2.0,
        output=str(tmp_path / "evaluation"),
    )
    result = evaluate(request)
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["sides"]
    (side,) = result["sides"]
    assert [run["seed"] for run in side["runs"]] == [0]
    kids = [found["summary"]["kid"]["mean"] for found in (result["base"], side)]
    assert np.isfinite(kids).all()
    assert kids[0] != kids[1]
