"""A recipe checks every value when it is made, and says which key is wrong and what it takes."""

import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.recipe import recipe as recipes
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig

SECTIONS = [c for c in vars(recipes).values() if dataclasses.is_dataclass(c)]
BY_NAME = {
    "data": recipes.DataConfig,
    "tuning": TuningConfig,
    "bank": recipes.BankConfig,
    "adapter": AdapterConfig,
    "training": TrainingConfig,
}
NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = {
    "data.resolution": [0, 7, -64],
    "data.crops": [0, 65],
    "data.holdout": [-0.1, 1.0, NAN],
    "data.limit": [0],
    "tuning.retention_ratio": [-0.1, 1.0, NAN],
    "tuning.retention_weight": [-1.0, INF, NAN],
    "tuning.prompt_dropout": [-0.1, 1.1, NAN],
    "tuning.min_snr_gamma": [0.0, -5.0, INF, NAN],
    "bank.size": [0],
    "bank.steps": [0],
    "bank.batch_size": [0],
    "bank.guidance_scale": [-1.0, INF, NAN],
    "adapter.rank": [0],
    "adapter.alpha": [0.0, INF],
    "adapter.dropout": [-0.1, 1.0, NAN],
    "training.max_steps": [0, -1],
    "training.batch_size": [0],
    "training.gradient_accumulation_steps": [0],
    "training.learning_rate": [0.0, -1e-3, INF, NAN],
    "training.lr_warmup_steps": [-1],
    "training.weight_decay": [-0.1, NAN],
    "training.max_grad_norm": [0.0, INF],
    "training.ema_decay": [0.0, 1.0],
    "training.seed": [-1, 2**31],
    "training.checkpoint_every": [0],
    "training.validate_every": [-1],
    "training.validation_size": [0],
    "training.sample_every": [-1],
    "training.sample_steps": [0],
    "training.sample_guidance_scale": [-1.0, NAN],
}
AT_THE_EDGE = {
    "data.resolution": [8, None],
    "data.crops": [1, 64],
    "data.holdout": [0.0, 0.999],
    "data.limit": [1, None],
    "tuning.prompt_dropout": [0.0, 1.0],
    "tuning.min_snr_gamma": [1e-9, None],
    "bank.size": [1],
    "bank.guidance_scale": [0.0],
    "adapter.rank": [1],
    "adapter.alpha": [1e-9, None],
    "adapter.dropout": [0.0, 0.999],
    "training.max_grad_norm": [None],
    "training.lr_warmup_steps": [0],
    "training.seed": [0, 2**31 - 1],
    "training.validate_every": [0],
    "training.sample_every": [0],
    "training.weight_decay": [0.0],
}


def with_value(key: str, value: object) -> object:
    section, name = key.split(".")
    return BY_NAME[section](**{name: value})


def cases(table: dict[str, list]) -> list:
    return [pytest.param(key, value, id=f"{key}={value}") for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), cases(OUT_OF_RANGE))
def test_a_value_out_of_range_is_refused_by_its_dotted_key(key, value):
    with pytest.raises(UserError, match=rf"^{key} is {value}; expected .*\.$"):
        with_value(key, value)


@pytest.mark.parametrize(("key", "value"), cases(AT_THE_EDGE))
def test_a_value_at_the_edge_of_its_range_is_taken(key, value):
    assert getattr(with_value(key, value), key.split(".")[1]) == value


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_key_is_explained_where_it_is_defined(section):
    documented = []
    for kind in reversed([c for c in section.__mro__ if dataclasses.is_dataclass(c)]):
        lines = inspect.cleandoc(kind.__doc__).partition("Args:\n")[2].splitlines()
        documented += [line.split(":")[0].strip() for line in lines if not line.startswith(" " * 8)]
    assert documented == [f.name for f in dataclasses.fields(section)]


def test_a_recipe_is_plain_values_all_the_way_down():
    values = Recipe().to_dict()
    assert json.loads(json.dumps(values)) == values
    empty = dict.fromkeys(("tau", "retention_tau", "psi", "xi", "path"))
    assert values["tuning"]["schedule"] == {"kind": "power", **empty}


# --- what fits together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TuningConfig(retention_ratio=0.0), "set both to 0 for plain fine-tuning, or both above 0"),
        (lambda: TuningConfig(retention_weight=0.0), "set both to 0 for plain fine-tuning, or both above 0"),
        (
            lambda: TuningConfig(ScheduleConfig("auto"), retention_ratio=0.0, retention_weight=0.0),
            "auto measures against",
        ),
        (
            lambda: Recipe(
                tuning=TuningConfig(forgetting_budget=0.1), training=TrainingConfig(validation_prompts="own")
            ),
            "validation_prompts is own, but a forgetting budget is kept on the prompts of .*, empty; say retained",
        ),
        (lambda: Recipe("full", adapter=AdapterConfig(rank=4)), "method full trains no adapter"),
        (lambda: Recipe(training=TrainingConfig(shard=True)), "training.shard spreads all weights"),
        (
            lambda: Recipe("full", training=TrainingConfig(shard=True, optimizer="adamw8bit")),
            "optimizer adamw8bit, which does not know sharded weights",
        ),
        (
            lambda: Recipe("full", data=DataConfig(buckets=True), training=TrainingConfig(shard=True)),
            "bank rows take a forward of their own",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("ratio", "weight", "uses"), [(0.2, 0.1, True), (0.0, 0.0, False)])
def test_a_recipe_uses_a_bank_if_rows_come_from_it(ratio, weight, uses):
    assert Recipe(tuning=TuningConfig(retention_ratio=ratio, retention_weight=weight)).uses_bank is uses


# --- schedules ------------------------------------------------------------------------------------------------------

USED = {
    "power": {"tau": 2.0, "psi": 0.5},
    "paper": {"tau": 2.0, "psi": 0.5},
    "constant": {"psi": 0.5, "xi": 0.25},
    "measured": {"path": "x"},
    "auto": {},
    "function": {"path": "package.module:function"},
}
TABLE = {"u": [0.0, 0.5, 1.0], "psi": [0.0, 0.25, 1.0], "xi": [1.0, 0.5, 0.0]}


@pytest.mark.parametrize("kind", typing.get_args(typing.get_type_hints(ScheduleConfig)["kind"]))
def test_a_schedule_takes_its_own_keys_and_no_others(kind):
    ScheduleConfig(kind, **USED[kind])
    for name, value in {k: v for settings in USED.values() for k, v in settings.items()}.items():
        if name not in USED[kind]:
            with pytest.raises(
                UserError, match=rf"tuning.schedule.{name} is given, but a {kind} schedule uses (only|none)"
            ):
                ScheduleConfig(kind, **{**USED[kind], name: value})


@pytest.mark.parametrize(
    ("config", "psi", "xi"),
    [
        (ScheduleConfig(), 0.25**0.3, 1 - 0.25**0.3),
        (ScheduleConfig("power", tau=2.0), 0.0625, 0.9375),
        (ScheduleConfig("paper"), 0.25, 0.751),
        (ScheduleConfig("constant"), 1.0, 0.0),
        (ScheduleConfig("constant", psi=0.5, xi=0.25), 0.5, 0.25),
    ],
)
def test_a_schedule_is_built_with_the_methods_defaults(config, psi, xi):
    schedule, u = config.build(1000), torch.tensor([0.25], dtype=torch.float64)
    assert schedule.psi(u).item() == pytest.approx(psi)
    assert schedule.xi(u).item() == pytest.approx(xi)


def measured(folder: Path, content: bytes) -> ScheduleConfig:
    (folder / "table.json").write_bytes(content)
    return ScheduleConfig("measured", path=str(folder / "table.json"))


def test_a_measured_schedule_is_read_from_its_file(tmp_path):
    schedule = measured(tmp_path, json.dumps({**TABLE, "made": "today"}).encode()).build(1000)
    assert schedule.psi(torch.tensor([0.5])).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"5",
        b"\xff\xfe",
        b'{"u": [0, 1], "psi": [0, 1]}',
        b'{"u": null, "psi": 1, "xi": 1}',
        json.dumps({**TABLE, "psi": [1.0, 0.5, 0.0]}).encode(),
        json.dumps({**TABLE, "xi": [1.0]}).encode(),
    ],
    ids=["empty", "broken", "a list", "a number", "not text", "no xi", "nulls", "ψ falls", "too short"],
)
def test_a_measured_schedule_that_cannot_be_one_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"measured schedule .*table.json cannot be read|^tuning.schedule: "):
        measured(tmp_path, content).build(1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig("measured"), "tuning.schedule.path is empty; name the file"),
        (lambda: ScheduleConfig("measured", path="/no/such.json").build(1000), "/no/such.json cannot be read"),
        (lambda: ScheduleConfig(tau=0.0), "tuning.schedule: tau is 0.0"),
        (lambda: ScheduleConfig("constant", psi=-1.0), "tuning.schedule: "),
    ],
)
def test_a_schedule_out_of_range_or_without_its_file_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_warm_up_of_a_constant_rate_is_refused():
    """diffusers would pass it over."""
    with pytest.raises(UserError, match=r"lr_warmup_steps is 50, but .* constant has no warm-up; say constant_w"):
        TrainingConfig(lr_scheduler="constant", lr_warmup_steps=50)
    assert TrainingConfig(lr_scheduler="constant_with_warmup", lr_warmup_steps=50).lr_warmup_steps == 50
