"""A bank that grows while training begins: the first step waits for what it needs, and all ends as with a bank that was
drawn ahead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.signals import Interrupted, watched
from difftuning_control.training.run_bank import may_grow
from difftuning_control.verbs.train import train
from support.trainings import interrupted_after, record, resumed, rows

WEIGHTS = "pytorch_lora_weights.safetensors"
FORWARDS = 10 * 2 * 2  # items, steps, and both branches of guidance


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """Four steps without a checkpoint, a bank of five shards of two items, of which a step takes one."""
    training = replace(recipe.training, max_steps=4, checkpoint_every=100)
    return replace(recipe, training=training, bank=replace(recipe.bank, batch_size=2))


def into(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe in a folder of its own, with caches of its own."""
    return replace(recipe, data=replace(recipe.data, cache=str(folder / "cache")), output=str(folder / "run"))


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Trains the recipe with a bank that is drawn before, once for each adapter and precision; gives the recipe."""
    done: dict[tuple[str, ...], Recipe] = {}

    def train_ahead(recipe: Recipe) -> Recipe:
        key = (recipe.method, repr(recipe.adapter), recipe.training.mixed_precision)
        if key not in done:
            there = into(recipe, tmp_path_factory.mktemp("ahead"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("difftuning_control.training.inputs.may_grow", lambda *_: False)
                train(there)
            done[key] = there
        return done[key]

    return train_ahead


@contextmanager
def shards_by_step(recipe: Recipe) -> Iterator[list[int]]:
    """Gives how many shards of the bank lie on the disk after each optimizer step."""
    found: list[int] = []
    banks = Path(recipe.data.cache or "") / "banks"
    hook = register_optimizer_step_post_hook(lambda *_: found.append(len(list(banks.rglob("bank-*.safetensors")))))
    try:
        yield found
    finally:
        hook.remove()


def files(recipe: Recipe) -> dict[str, bytes]:
    """The bank in its cache."""
    (bank,) = (Path(recipe.data.cache or "") / "banks").iterdir()
    return {p.name: p.read_bytes() for p in bank.iterdir()}


def assert_same(found: Recipe, expected: Recipe, weights: str = WEIGHTS, forwards: int | None = FORWARDS) -> None:
    assert (Path(found.output) / weights).read_bytes() == (Path(expected.output) / weights).read_bytes()
    assert files(found) == files(expected)
    assert rows(found) == rows(expected)
    for key in ("identity", "fingerprints", "losses", "status"):
        assert record(found)[key] == record(expected)[key], key
    if forwards is not None:
        assert record(found)["phases"]["bank"]["forwards"] == forwards


@pytest.mark.sample("bf16")
@pytest.mark.parametrize(
    ("adapter", "precision"),
    [
        (AdapterConfig(), "bf16"),
        (AdapterConfig(), "no"),
        (AdapterConfig(kind="dora"), "bf16"),
        (AdapterConfig(kind="difffit"), "no"),
        (AdapterConfig(kind="tlora"), "no"),
        (AdapterConfig(init="pissa"), "no"),
        (AdapterConfig(text_encoder=True), "bf16"),
    ],
    ids=["bf16", "float32", "dora", "difffit", "tlora", "pissa", "text-encoder"],
)
def test_a_bank_that_grows_ends_as_one_drawn_ahead(recipe: Recipe, ahead, tmp_path: Path, adapter, precision):
    """Also in lower precision, for which accelerate replaces the denoiser's forward."""
    recipe = replace(recipe, adapter=adapter, training=replace(recipe.training, mixed_precision=precision))
    there, here = ahead(recipe), into(recipe, tmp_path)
    with shards_by_step(here) as found:
        train(here)
    assert 1 < found[0] < 5  # of validation's shard and the step's
    assert found == sorted(found)
    weights = "difffit.safetensors" if adapter.kind == "difffit" else WEIGHTS
    assert_same(here, there, weights)


@pytest.mark.wide
def test_a_run_killed_while_its_bank_grows_begins_again_with_what_was_drawn(recipe: Recipe, ahead, tmp_path: Path):
    recipe.training.mixed_precision = "bf16"  # as the one above
    there, here = ahead(recipe), into(recipe, tmp_path)
    with interrupted_after(2), shards_by_step(here) as found, pytest.raises(KeyboardInterrupt):
        train(here)
    assert found[-1] < 5
    assert record(here)["fingerprints"]["bank"] is None
    with shards_by_step(here) as again:
        train(resumed(here))
    assert again[0] >= found[-1]
    assert len(again) == 4
    assert_same(here, there, forwards=None)


@pytest.mark.wide
def test_a_checkpoint_waits_for_the_whole_bank_and_the_run_goes_on_from_it(recipe: Recipe, ahead, tmp_path: Path):
    """Its identity is that of a run whose bank was drawn ahead."""
    recipe.training.mixed_precision = "bf16"
    there, here = ahead(recipe), into(recipe, tmp_path)
    here.training.checkpoint_every = 2
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(here)
    assert (Path(here.output) / "checkpoint-2").is_dir()
    assert record(here)["identity"] == record(there)["identity"]
    assert files(here) == files(there)
    with shards_by_step(here) as steps:
        train(resumed(here))
    assert len(steps) == 2
    assert_same(here, there)


@pytest.mark.wide
def test_a_controlnet_draws_its_bank_beside_its_steps_too(recipe: Recipe, ahead, tmp_path: Path):
    """Of blank conditions for bank rows, as its own are made of the whole bank."""
    control = ControlConfig(annotator="canny", bank_condition="blank", fidelity=FidelityConfig(every=0))
    recipe = replace(recipe, method="controlnet", control=control)
    there, here = ahead(recipe), into(recipe, tmp_path)
    with shards_by_step(here) as found:
        train(here)
    assert 1 < found[0] < 5
    assert_same(here, there, "controlnet/diffusion_pytorch_model.safetensors")


def test_a_signal_ends_a_run_at_once_while_its_bank_grows(recipe: Recipe, tmp_path: Path):
    here = into(recipe, tmp_path / "stopped")
    hook = register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with watched(), pytest.raises(Interrupted) as stopped:
            train(here)
    finally:
        hook.remove()
    assert stopped.value.saved is None
    assert not [p.name for p in (tmp_path / "stopped" / "cache" / "banks").iterdir() if p.name.endswith(".lock")]


@pytest.mark.wide
def test_another_recipe_is_refused_also_where_the_bank_was_not_whole(recipe: Recipe, tmp_path: Path):
    here = into(recipe, tmp_path / "killed")
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        train(here)
    other = replace(here, tuning=TuningConfig(retention_weight=0.3))
    with pytest.raises(UserError, match=r"tuning\.retention_weight was 0\.1 and is 0\.3; only"):
        train(resumed(other))


def test_a_bank_that_is_not_whole_has_no_fingerprint():
    class Growing:
        is_whole = False

    bank = KnowledgeBank(torch.zeros(2, 4, 8, 8), ["", ""], growing=Growing())
    with pytest.raises(RuntimeError, match="before it is whole"):
        bank.fingerprint  # noqa: B018


def test_what_cannot_draw_while_it_trains_draws_ahead(recipe: Recipe, tmp_path: Path):
    """Other weights than the pretrained ones, other classes, several processes, and a run with a checkpoint."""
    assert may_grow(recipe, 1)
    assert not may_grow(recipe, 2)
    for change in (
        {"method": "full"},
        {"model": ModelConfig("embedded", offload=True)},
        {"training": replace(recipe.training, compile="aot_eager")},
        {"tuning": TuningConfig(label_space="new")},
    ):
        assert not may_grow(replace(recipe, **change), 1), change
    going = resumed(recipe)
    assert may_grow(going, 1)
    Path(recipe.output).mkdir()
    RunRecord(status="running", recipe_values=recipe.to_dict()).write(Path(recipe.output))
    assert may_grow(going, 1)
    checkpoint = Path(recipe.output) / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    assert not may_grow(going, 1)
