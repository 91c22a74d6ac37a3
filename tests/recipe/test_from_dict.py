"""`Recipe.load` and `Recipe.from_dict`: the recipe that the command would make of the same text."""

import dataclasses
import sys

import pytest

import difftuning_control
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse

TEXT = """
method: lora
model: {id: embedded}
data: {path: embedded/icons, limit: 8}
tuning: {schedule: {kind: power, tau: 0.5}, forgetting_budget: [0.1, 0.1, 0.1, 0.1, 0.2]}
training: {learning_rate: 1e-4, max_steps: 30, save_at: [10, 20]}
output: runs/x
"""


def test_a_file_gives_what_the_command_makes_of_it(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    loaded = Recipe.load(tmp_path / "r.yaml")
    command = only(Recipe, parse(["train", "--config", str(tmp_path / "r.yaml")])[1])
    assert loaded == command
    assert loaded.left_open == command.left_open
    assert loaded.training.learning_rate == 1e-4


def test_a_recipe_goes_through_a_dictionary_and_back(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    loaded = Recipe.load(tmp_path / "r.yaml")
    again = Recipe.from_dict(loaded.to_dict())
    assert again == loaded
    assert again.left_open == ()
    assert Recipe.from_dict({"training": loaded.training, "data": {"path": "p"}}).training == loaded.training


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modle": {}}, "there is no key modle; did you mean model"),
        ({"training": {"max_step": 3}}, "there is no key training.max_step; did you mean training.max_steps"),
        ({"training": {"max_steps": "x"}}, "training.max_steps is x; expected a whole number"),
        ({"training": {"max_steps": 2.5}}, "training.max_steps is 2.5; expected a whole number"),
        ({"training": {"max_steps": True}}, "expected a whole number"),
        ({"data": {"flip": 1}}, "data.flip is 1; expected true or false"),
        ({"training": 3}, "training is 3; expected a section with"),
        ({"method": "loar"}, 'method is loar; expected one of "lora"'),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1"),
        ({"adapter": {"rank": "many"}}, "adapter.rank is many; expected a whole number or null"),
    ],
)
def test_a_mistake_is_named_in_full(values, said):
    with pytest.raises(UserError, match=said):
        Recipe.from_dict(values)


def test_data_must_be_named():
    assert Recipe.from_dict({}).data.path == ""
    assert Recipe.from_dict({"data": {"flip": True}}).data.path == ""


def test_the_package_names_the_sections_and_imports_no_torch_for_them():
    names = [f.name for f in dataclasses.fields(Recipe)]
    assert {"model", "training", "gates"} <= set(names)
    for name in ("ModelConfig", "TrainingConfig", "ScheduleConfig", "PilotConfig", "Evaluation"):
        assert dataclasses.is_dataclass(getattr(difftuning_control, name))
    assert set(difftuning_control.__all__) <= set(dir(difftuning_control))
    assert "difftuning_control.recipe.recipe" in sys.modules


def test_a_function_can_be_the_schedule(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def steep(u):\n    return u**2, 1 - u**2\ndef falling(u):\n    return 1 - u, 1.0\nnothing = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def schedule(path: str) -> Recipe:
        return Recipe.from_dict({"tuning": {"schedule": {"kind": "function", "path": path}}})

    recipe = schedule("mine:steep")
    assert "mine" not in sys.modules  # a recipe that is only read runs no code
    built = recipe.tuning.schedule.build(1000)
    import torch  # for these values alone

    u = torch.tensor([0.0, 0.3, 0.77, 1.0])
    torch.testing.assert_close(built.psi(u), u**2, atol=1e-6, rtol=0)
    torch.testing.assert_close(built.xi(u), 1 - u**2, atol=1e-6, rtol=0)
    for path, said in (
        ("mine:falling", "psi must not fall"),
        ("mine:gone", "the schedule mine:gone cannot be imported"),
        ("mine:nothing", "is a int; expected a function"),
        ("os:system", "of Python's own library"),
    ):
        with pytest.raises(UserError, match=said):
            schedule(path).tuning.schedule.build(1000)
    with pytest.raises(UserError, match=r"expected package\.module:function"):
        schedule("mine.steep")
