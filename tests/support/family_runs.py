"""What every family's LoRA run must hold: the recipes, and the assertions on what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.families.loading import load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.system.digests import digest_of_file
from difftuning_control.verbs import train as trainer
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.train import train
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.tensors import differing
from support.trainings import interrupted_after, recomputed, record, resumed, rows, steps_taken
from support.tuned_pictures import LORA_FILE

FEW_STEPS: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 5,
    "checkpoint_every": 2,
    "validate_every": 0,
    "validation_size": 2,
    "sample_every": 0,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
}


def recipe_maker(root: Path, model_of: Callable[[str], Path], side_of: Callable[[str], int]) -> Callable[..., Recipe]:
    """Makes recipes of a few steps for a family's tiny model, on the pictures under `root`."""

    def recipe(name: str, family: str, method: str = "lora", **sections: Any) -> Recipe:
        data = {
            "path": str(root / "pictures"),
            "holdout": 0.25,
            "resolution": side_of(family),
            "cache": str(root / "cache"),
        }
        return Recipe(
            method,
            ModelConfig(str(model_of(family)), **sections.get("model", {})),
            DataConfig(**data),
            TuningConfig(**{"prompt_dropout": 0.4, **sections.get("tuning", {})}),
            BankConfig(size=6, steps=2, batch_size=3, prompts="captions"),
            AdapterConfig(**sections.get("adapter", {"rank": 2, "alpha": 4.0} if method == "lora" else {})),
            training=TrainingConfig(**FEW_STEPS | sections.get("training", {})),
            output=str(root / name),
        )

    return recipe


def assert_every_factor_moves_and_nothing_else(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a LoRA, from the first step on; the pretrained modules stay bit by bit."""
    loaded: list[Any] = []
    attached: dict[str, torch.Tensor] = {}

    def load(*args, **options):
        loaded.append(load_family(*args, **options))
        return loaded[-1]

    class Watched(trainer.TrainingLoop):
        def __init__(self, *args):
            super().__init__(*args)
            attached.update({n: p.detach().clone() for n, p in self.parameters.items()})

    monkeypatch.setattr("difftuning_control.families.loading.load_family", load)
    monkeypatch.setattr(trainer, "TrainingLoop", Watched)
    train(replace(recipe, output=str(tmp_path)))
    (family,) = loaded
    trained = {n: p.detach() for n, p in family.denoiser.named_parameters() if p.requires_grad}
    assert set(trained) == set(attached) == differing(trained, attached)
    fresh = load_family(str(recipe.model.id))
    for part, module in fresh.modules.items():
        now = {k.replace(".base_layer.", "."): v for k, v in family.modules[part].state_dict().items()}
        assert all(torch.equal(now[k].cpu(), v) for k, v in module.state_dict().items()), part


def assert_checkpointed_it_trains_to_the_weights_of(recipe: Recipe, undisturbed: Recipe, tmp_path: Path) -> None:
    """With settings that only spare memory, to rounding; what is computed again is computed in the backward pass."""
    recipe = replace(recipe, output=str(tmp_path))
    with recomputed() as again:
        train(recipe)
    assert "Linear" in again
    found, expected = (load_file(f"{r.output}/{LORA_FILE}") for r in (recipe, undisturbed))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def assert_interrupted_it_ends_as(recipe: Recipe, undisturbed: Recipe, tmp_path: Path) -> None:
    """Bit by bit, after an interruption in its third step; what its checkpoint holds is not done again."""
    recipe = replace(recipe, output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt), interrupted_after(3):
        train(recipe)
    with steps_taken() as taken:
        train(resumed(recipe))
    assert len(taken) == recipe.training.max_steps - recipe.training.checkpoint_every
    assert rows(recipe) == rows(undisturbed)
    assert record(recipe)["losses"] == record(undisturbed)["losses"]
    assert digest_of_file(tmp_path / LORA_FILE) == digest_of_file(Path(undisturbed.output) / LORA_FILE)


def assert_measured_and_judged(make: Callable[..., Recipe], name: str, root: Path, tmp_path: Path) -> None:
    """`auto`, `analyze` with staged sampling, and `evaluate`, each to its end."""
    features = str(save_tiny_dinov2(root / "features" / name))
    held_out = write_pictures(tmp_path / "held", 12, 64, seed=9)
    measured = make("", name, tuning={"schedule": ScheduleConfig("auto")}, training={"max_steps": 30, "batch_size": 20})
    data = replace(measured.data, holdout=0.0, validation_path=str(held_out))
    measured = replace(measured, data=data, bank=replace(measured.bank, size=10), output=str(tmp_path / "run"))
    assert len(train(measured).record.schedule.xi) == 10
    settings = {"pictures": 6, "steps": 2, "guidance_scale": 2.0, "features": features}
    found = analyze(Recipe(), AnalysisConfig(rows=6, draws=1, staged=True, u0=[0.0, 1.0], **settings), measured.output)
    staged = found["staged"]
    assert staged["tuned_above"]["kid"][0] == pytest.approx(staged["tuned_below"]["kid"][-1])
    assert np.isfinite(found["gap"]["mean"]).all()
    result = evaluate(Evaluation([measured.output], seeds=[0], output=str(tmp_path / "judged"), **settings))
    assert np.isfinite(result["sides"][0]["summary"]["kid"]["mean"])


def assert_buckets_have_shapes_that_fit(make: Callable[..., Recipe], name: str, side: int, tmp_path: Path) -> None:
    """Squares, a wide and a tall picture, with buckets of an area of twice the model's side, squared."""
    for i, (width, height) in enumerate([(64, 64), (64, 64), (130, 64), (64, 130)]):
        (tmp_path / "shapes").mkdir(exist_ok=True)
        Image.effect_noise((width, height), 80).convert("RGB").save(tmp_path / "shapes" / f"{i}.png")
        (tmp_path / "shapes" / f"{i}.txt").write_text(f"red {i}")
    recipe = make("", name, tuning={"prompt_dropout": 0.0}, training={"max_steps": 3})
    data = DataConfig(
        str(tmp_path / "shapes"),
        holdout=0.0,
        resolution=2 * side,
        cache=str(tmp_path / "cache"),
        buckets=True,
        bucket_step=side,
        bucket_aspect=4.0,
    )
    run = train(replace(recipe, data=data, output=str(tmp_path / "run"))).record
    assert run.data.buckets["pictures"][f"{2 * side}×{2 * side}"] == 2
    assert len(run.data.buckets["pictures"]) == 3
