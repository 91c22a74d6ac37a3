"""`bank.solver`: samples are those of the stock pipeline with diffusers' scheduler of that solver, and a bank says by
what it was drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from support.tiny_models import tiny_dit, tiny_pixart, tiny_sd3
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline

REQUEST = BankRequest(("red 1", "a blue square"), size=3, steps=4, resolution=16, solver="dpmsolver++")


@pytest.mark.parametrize(
    "pipe",
    [tiny_pipeline, lambda: tiny_pipeline(prediction_type="v_prediction"), tiny_xl_pipeline],
    ids=["epsilon", "v", "xl"],
)
def test_samples_are_those_of_the_stock_pipeline_with_that_scheduler(tmp_path, pipe):
    family, stock = family_of(pipe()), pipe()
    bank = KnowledgeBank.build(family, tmp_path / "bank", REQUEST)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        [REQUEST.prompt_of(i) for i in range(3)],
        generator=[torch.Generator().manual_seed(REQUEST.seed_of(i)) for i in range(3)],
        num_inference_steps=4,
        guidance_scale=1.5,
        height=16,
        width=16,
        output_type="latent",
    ).images
    assert torch.equal(bank.latents[:], drawn)
    assert bank.manifest["identity"]["scheduler"]["class"] == "DPMSolverMultistepScheduler"
    assert type(family.pipe.scheduler) is type(pipe().scheduler)  # the model's own again
    own = KnowledgeBank.build(family, tmp_path / "own", replace(REQUEST, solver="own"))
    assert not torch.allclose(own.latents[:], drawn, atol=1e-2)


def test_the_models_own_scheduler_is_the_default_and_what_it_was_for_the_cache():
    """Banks that were drawn before there was a choice are found again."""
    family = family_of(tiny_pipeline())
    identity = replace(REQUEST, solver="own").identity(family)
    assert identity["scheduler"] == family.sampler_settings()
    assert identity["scheduler"]["class"] == "DDIMScheduler"
    assert "solver" not in identity
    assert BankConfig().solver == "own"


def test_a_scheduler_that_draws_noise_of_its_own_gives_way():
    pipe = tiny_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    scheduler = family_of(pipe).scheduler_of("dpmsolver++")
    assert scheduler.config.algorithm_type == "dpmsolver++"


@pytest.mark.wide
@pytest.mark.parametrize(("pipe", "prompts"), [(tiny_dit, ["1", "2"]), (tiny_pixart, ["red 1", ""])])
def test_a_model_that_predicts_its_variance_is_drawn_too(tmp_path, pipe, prompts):
    family = family_of(pipe())
    side = family.native_resolution
    bank = KnowledgeBank.build(
        family, tmp_path / "bank", replace(REQUEST, prompts=tuple(prompts), size=2, resolution=side)
    )
    assert bank.latents[:].isfinite().all()
    assert bank.manifest["identity"]["scheduler"]["variance_type"] is None


def test_flow_matching_is_refused_before_anything_is_drawn(tmp_path):
    family = family_of(tiny_sd3())
    with pytest.raises(UserError, match=r"bank\.solver is dpmsolver\+\+, which is for models that predict noise or v"):
        KnowledgeBank.build(family, tmp_path / "bank", REQUEST)
    assert not list(tmp_path.iterdir())


def test_a_bank_of_another_solver_is_another_bank(tmp_path):
    family, data = family_of(tiny_pipeline()), DataConfig(cache=str(tmp_path))
    config = BankConfig(size=2, steps=2, prompts="empty")
    folders = [prepare_bank(family, replace(config, solver=s), data, [], 16).folder for s in ("own", "dpmsolver++")]
    assert folders[0] != folders[1]
    with pytest.raises(UserError, match="holds a bank with another scheduler"):
        prepare_bank(family, replace(config, solver="dpmsolver++", path=str(folders[0])), data, [], 16)


def test_a_solver_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="solver is 'euler'; expected any of own, dpmsolver"):
        replace(REQUEST, solver="euler")


@pytest.mark.parametrize(("side", "count"), [(64, 32), (256, 32), (512, 8), (768, 3), (1024, 2), (2048, 1)])
def test_samples_that_are_drawn_at_once_have_two_megapixels(side, count):
    assert BankConfig().batch_for(side) == count
    assert BankConfig(batch_size=5).batch_for(side) == 5
