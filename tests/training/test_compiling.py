"""Training with compiled blocks against the same training without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.training import compiling
from difftuning_control.verbs.train import train
from support.tiny_models import tiny_flux
from support.trainings import interrupted_after, resumed

SLOW = pytest.mark.slow
RATE = 1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiling")
    tiny_flux().save_pretrained(folder / "flux")
    return folder


@pytest.fixture(scope="module")
def make(root: Path, model_dir: Path, pictures: Path):
    def recipe(name: str, method: str = "lora", model: str | None = None, **sections: Any) -> Recipe:
        return Recipe(
            method=method,
            model=ModelConfig(model or str(model_dir)),
            data=DataConfig(str(pictures), holdout=0.25, resolution=16, cache=str(root / "cache")),
            tuning=TuningConfig(retention_ratio=0.4),
            bank=BankConfig(size=8, steps=2, batch_size=4),
            adapter=sections.get("adapter", AdapterConfig(rank=2) if method == "lora" else AdapterConfig()),
            control=ControlConfig(annotator="canny", fidelity=FidelityConfig(every=2, size=2, steps=2))
            if method == "controlnet"
            else ControlConfig(),
            training=TrainingConfig(
                **{
                    "max_steps": 3,
                    "batch_size": 4,
                    "validate_every": 2,
                    "validation_size": 2,
                    "sample_every": 2,
                    "sample_steps": 2,
                    "learning_rate": RATE,
                    "lr_scheduler": "constant",
                    "ema_decay": 0.9,
                }
                | sections.get("training", {})
            ),
            output=str(root / name),
        )

    return recipe


def weights(run: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(run).rglob("*.safetensors")):
        if not str(path.relative_to(run)).startswith("checkpoint"):
            found |= {f"{path.relative_to(run)}:{k}": v for k, v in load_file(path).items()}
    return found


def assert_same_training(recipe: Recipe, backend: str, atol: float = 5e-6) -> None:
    """Equal weights up to rounding, by a run of which compiled graphs were made.

    AdamW divides by the size of a gradient, so where that is nearly zero its rounding moves a weight by a part of the
    learning rate.
    """
    eager = train(replace(recipe, output=recipe.output + "-eager")).record
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    changed = replace(recipe, training=replace(recipe.training, compile=backend), output=recipe.output + "-compiled")
    compiled = train(changed).record
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    before, after = weights(recipe.output + "-eager"), weights(recipe.output + "-compiled")
    assert list(before) == list(after)
    assert before
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for role, losses in eager.losses.items():
        assert compiled.losses[role].tuned.losses == pytest.approx(losses.tuned.losses, rel=1e-4)


@pytest.mark.wide
@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora", "rank": 2},
        {"kind": "tlora", "rank": 2},
        pytest.param({"kind": "dora", "rank": 2}, marks=SLOW),
        pytest.param({"kind": "oft", "block_size": 8}, marks=SLOW),
        pytest.param({"kind": "difffit"}, marks=SLOW),
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_adapters_train_compiled_as_without(make, adapter):
    assert_same_training(make(adapter["kind"], adapter=AdapterConfig(**adapter)), "aot_eager")


@pytest.mark.wide
@pytest.mark.parametrize("method", [pytest.param("full", marks=SLOW), "controlnet"])
def test_whole_weights_train_compiled_as_without(make, method):
    assert_same_training(make(method, method), "aot_eager")


@pytest.mark.slow
def test_checkpointed_gradients_train_compiled_as_without(make):
    assert_same_training(make("checkpointed", training={"gradient_checkpointing": True}), "aot_eager")


@pytest.mark.wide
def test_a_transformer_trains_compiled_as_without(make, root):
    assert_same_training(make("flux-run", model=str(root / "flux")), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_real_compiler_trains_as_without(make, method):
    assert_same_training(make(f"inductor-{method}", method), "inductor", atol=0.1 * RATE)


@pytest.mark.slow
def test_a_compiled_run_goes_on_where_it_stopped(make):
    recipe = make("whole", training={"compile": "aot_eager", "max_steps": 4, "checkpoint_every": 2})
    train(recipe)
    parted = replace(recipe, output=recipe.output + "-parted")
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(parted)
    train(resumed(parted))
    ours, theirs = weights(recipe.output), weights(parted.output)
    assert ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_block_that_repeats_is_compiled_and_no_weight_is_renamed():
    model = tiny_flux().transformer
    names = list(model.state_dict())
    assert compiling.compile_blocks(model, "aot_eager") == len(model.transformer_blocks) + len(
        model.single_transformer_blocks
    )
    assert list(model.state_dict()) == names


def test_a_compiler_that_does_not_work_is_told_in_a_sentence(monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match="does not work here \\(no C\\+\\+ compiler was found\\); install"):
        compiling.check_compiler("inductor", torch.device("cpu"))


def test_sharding_and_compiling_are_refused_together():
    with pytest.raises(UserError, match=r"training\.compile and training\.shard do not go together"):
        TrainingConfig(compile="inductor", shard=True)
