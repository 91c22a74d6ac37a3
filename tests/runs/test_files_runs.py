"""What is said of a place that holds no run, and of a record that was edited."""

import json

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.finished import finished_run
from difftuning_control.runs.places import places_now
from difftuning_control.runs.record import need_run
from difftuning_control.runs.verify import verify


def test_a_file_is_no_run_to_verify(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"run holds no run \(no readable run\.json\); give the output folder"):
        verify(VerifyRequest(run=str(tmp_path / "run")))


WHOLE = {
    "status": "complete",
    "recipe": Recipe(data=DataConfig("embedded/icons")).to_dict(),
    "places": {"run": "/before"},
    "dtype": "torch.float32",
    "losses": {"target": {"base": {"u": [0.5], "loss": [0.1]}, "tuned": {"u": [0.5], "loss": [0.1]}}},
}


def write_record(folder, key, value):
    record = json.loads(json.dumps(WHOLE))
    *sections, name = key.split(".")
    part = record
    for section in sections:
        part = part[section]
    part[name] = value
    (folder / "run.json").write_text(json.dumps(record))


def test_the_record_is_whole_as_it_stands(tmp_path):
    write_record(tmp_path, "seed", 3)
    assert finished_run(tmp_path).recipe.data.path == "embedded/icons"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dtype", "os.system", r"dtype is 'os\.system', expected one of torch\.float32"),
        ("dtype", "float32", "dtype is 'float32'"),
        ("prompts", [1], r"prompts is \[1\], expected list\[str\] \| None"),
        ("places", {"run": 5}, r"places is \{'run': 5\}"),
        ("seed", "three", "seed is 'three', expected int"),
        ("seed", True, "seed is True, expected int"),
        ("losses.target.base.loss", ["x"], r"losses is \['x'\], expected list\[float\]"),
        ("outputs", {"weights": None}, "outputs is"),
    ],
)
def test_an_edited_record_says_what_is_wrong(key, value, said, tmp_path):
    write_record(tmp_path, key, value)
    with pytest.raises(UserError, match=rf"no readable run\.json: .*{said}.*; give the output folder"):
        finished_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("recipe.method", "dance", "method is 'dance'"),
        ("recipe.model.id", 5, "int"),
        ("recipe.training.sample_prompts", [None], r"training.sample_prompts is \[None\]"),
    ],
)
def test_an_edited_recipe_of_a_record_says_what_is_wrong(key, value, said, tmp_path):
    write_record(tmp_path, key, value)
    with pytest.raises(UserError, match=f"a recorded recipe cannot be read .*{said}.*was edited"):
        _ = finished_run(tmp_path).recipe


def test_a_record_without_its_own_place_is_read_where_it_lies(tmp_path):
    write_record(tmp_path, "places", {"model": str(tmp_path / "base")})
    assert places_now(need_run(tmp_path), tmp_path) == {"model": str(tmp_path / "base")}
