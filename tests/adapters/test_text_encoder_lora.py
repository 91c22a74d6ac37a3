"""A LoRA on the text encoder: prompts are encoded in the step, by the encoder as it is, wherever losses are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difftuning_control import load_adapter, unload_adapter
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.studies import AnalysisConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.train import train
from support.tiny_sd import tiny_pipeline
from support.tuning import picture, weights

PROMPTS = ["red 1", "a blue square", ""]


def config(**changes) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "alpha": 3.0, "text_encoder": True} | changes)


def losses(family, conditioning) -> torch.Tensor:
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "plain")
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = LatentBatch(latents, conditioning, torch.zeros(3, dtype=torch.bool))
    return compute_loss(family, family.model, objective, batch, noise, torch.tensor([900, 500, 20]))


def tuned(recipe, name: str, **changes):
    training = replace(recipe.training, max_steps=4, validate_every=0, save_at=[2], ema_decay=0.9)
    return replace(recipe, adapter=config(**changes), training=training, output=f"{recipe.output}-{name}")


def test_encoding_in_the_step_is_what_the_stock_pipeline_encodes(family):
    expected = losses(family, family.encode_prompts(PROMPTS))
    family.encodes_in_step = True
    torch.testing.assert_close(losses(family, family.tokenize(PROMPTS)), expected, atol=1e-6, rtol=1e-6)


def test_gradients_reach_both_models_and_only_their_adapters(family):
    tuning = AdapterTuning(family, config())
    family.encodes_in_step = True
    names = set(tuning.parameters())
    assert {n.startswith("text_encoder.") for n in names} == {True, False}
    losses(family, family.tokenize(PROMPTS)).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters().values())
    assert all(
        p.grad is None
        for m in (family.denoiser, family.pipe.text_encoder)
        for p in m.parameters()
        if not p.requires_grad
    )
    ups = [p for n, p in tuning.parameters().items() if n.startswith("text_encoder.") and ".lora_B." in n]
    assert all((p.grad != 0).any() for p in ups)


def test_no_prompt_is_cached(family, tmp_path):
    family.encodes_in_step = True
    found = cached_embeddings(family, PROMPTS, tmp_path, lambda count: None)
    assert list(tmp_path.iterdir()) == []
    rows = found.rows(["red 1", "", "red 1"])
    assert set(rows) == {"prompt_ids"}
    assert torch.equal(rows["prompt_ids"], family.tokenize(["red 1", "", "red 1"])["prompt_ids"])


def test_its_learning_rate_is_its_own(family, recipe):
    tuning = AdapterTuning(family, config(text_encoder_learning_rate=5e-5))
    groups = tuning.groups(recipe.training)
    assert [g["lr"] for g in groups] == [recipe.training.learning_rate, 5e-5]
    text = {id(p) for n, p in tuning.parameters().items() if n.startswith("text_encoder.")}
    assert {id(p) for p in groups[1]["params"]} == text
    assert [g["lr"] for g in AdapterTuning(family_of(tiny_pipeline()), config()).groups(recipe.training)] == [
        recipe.training.learning_rate
    ] * 2


@pytest.mark.sample("changes0")
@pytest.mark.parametrize("changes", [{}, {"kind": "dora"}, {"init": "pissa"}, {"rslora": True}])
def test_a_run_moves_both_and_loads_in_a_stock_pipeline(recipe, changes):
    run = tuned(recipe, "run", **changes)
    record = train(run).record
    named = load_file(Path(run.output) / "pytorch_lora_weights.safetensors")
    of_encoder = [key for key in named if key.startswith("text_encoder.")]
    assert of_encoder
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in of_encoder)  # as all tools read
    family = load_family(recipe.model.id)
    before = picture(family.pipe)
    with tuned_model(family, run.output, finished_run(run.output)) as found:
        trained = picture(found.pipe)
    np.testing.assert_array_equal(picture(family.pipe), before)
    stock = load_family(recipe.model.id).pipe
    base = weights(stock)
    stock.load_lora_weights(run.output, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(picture(stock), trained, atol=1e-5)
    stock.unload_lora_weights()
    torch.testing.assert_close(weights(stock), base, atol=0, rtol=0)
    load_adapter(stock, run.output, "style")
    np.testing.assert_allclose(picture(stock), trained, atol=1e-5)
    unload_adapter(stock, "style")
    with torch.no_grad():
        np.testing.assert_array_equal(picture(stock), before)

    # the pictures change with the text encoder's part alone
    load_adapter(stock, run.output)
    stock.unet.disable_adapters()
    assert np.abs(picture(stock) - before).max() > 1e-5
    assert record.losses["bank"].tuned != record.losses["bank"].base


@pytest.mark.wide
def test_it_trains_on_an_encoder_in_lower_precision(recipe):
    run = tuned(recipe, "run")
    run = replace(run, training=replace(run.training, mixed_precision="bf16"))
    record = train(run).record
    assert np.isfinite(record.losses["bank"].tuned.losses).all()
    stock = load_family(recipe.model.id).pipe
    before = picture(stock)
    load_adapter(stock, run.output)
    assert {p.dtype for p in stock.text_encoder.parameters()} == {torch.float32}
    assert np.abs(picture(stock) - before).max() > 1e-4


@pytest.mark.wide
def test_resuming_is_exact(recipe, monkeypatch):
    whole = train(tuned(recipe, "whole")).record
    broken, advance = tuned(recipe, "broken"), TrainingLoop.advance

    def stop(self, number, more=True):
        if number == 3:
            raise KeyboardInterrupt
        return advance(self, number, more)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    again = train(replace(broken, training=replace(broken.training, resume=True))).record
    assert again.outputs == whole.outputs
    assert again.losses == whole.losses


@pytest.mark.wide
def test_an_analysis_measures_with_the_tuned_encoder(recipe):
    run = tuned(recipe, "run")
    record = train(run).record
    found = analyze(run, AnalysisConfig(rows=4, draws=1), run.output)
    np.testing.assert_allclose(found["forgetting"]["mean"], record.losses["bank"].rises, atol=1e-4)
    with pytest.raises(UserError, match=r"tuned the text encoder too; leave out analysis\.staged"):
        analyze(run, AnalysisConfig(staged=True), run.output)


def test_a_lora_for_another_text_encoder_is_refused(family, tmp_path):
    tuning = AdapterTuning(family, config())
    tuning.save(tmp_path)
    other = tiny_pipeline()
    from transformers import CLIPTextConfig, CLIPTextModel

    other.text_encoder = CLIPTextModel(CLIPTextConfig(**other.text_encoder.config.to_dict() | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"it was made for text_encoder\.\S+ of 16 × 16, here it is 32 × 32"):
        load_adapter(other, tmp_path)
