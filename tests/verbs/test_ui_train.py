"""The form of a training, its command, what is shown while it trains, and the table of runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from difftuning_control.errors import UserError
from difftuning_control.recipe.reading import keys_of, section_of
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.ui import form
from difftuning_control.verbs.ui.folders import picture_folders, training_folders
from difftuning_control.verbs.ui.jobs import Job, Jobs
from difftuning_control.verbs.ui.live import changed, chosen_job, jobs_table, log, pictures, progress, stopping
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.runs_view import delete_run, export_words, run_details, runs_of, runs_table, what_goes

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "mine").mkdir()
    return Places.of(tmp_path / "mine")


def begun(places: Places, name: str = "runs/one", status: str = "running", **more: object) -> Path:
    """A run's folder as it is while it trains."""
    folder = places.folder / name
    folder.mkdir(parents=True)
    RunRecord(status=status, **{"recipe_values": Recipe().to_dict()} | more).write(folder)  # type: ignore[arg-type]
    rows = [{"step": s, "loss": 0.5, "target_loss": 0.5 / s, "bank_loss": 0.2} for s in (1, 2, 3)]
    rows.append({"step": 3, "validation/target_0.1": 0.3, "validation/target_0.5": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    return folder


# --- the form -------------------------------------------------------------------------------------------------------


def test_every_key_of_the_recipe_has_a_place_in_the_form_with_what_it_is():
    leaves = {key for key, hint in keys_of(Recipe).items() if section_of(hint) is None}
    others = [field for fields in form.sections().values() for field in fields]
    assert {f.key for f in others} | {*form.FIRST.values(), *form.UNUSED} == leaves
    assert [f.key for f in others if not f.about] == []
    by_key = {f.key: f for f in others}
    assert by_key["tuning.estimator"].choices == ["sample", "weight"]
    assert by_key["data.flip"].choices == ["true", "false"]
    assert by_key["model.quantization"].choices == ["float8", "int8", "nf4"]
    assert by_key["training.save_at"].choices is None


def test_the_form_makes_the_command_that_a_person_would_give(places):
    fields = {
        "pictures": "embedded/icons",
        "trigger": "zbx dog",
        "trains": "dora",
        "rank": "8",
        "rate": "2e-4",
        "prompts": "a cat\n a dog \n",
    }
    words, output = form.train_words(
        places, form.NO_PRESET, fields, {"data.flip": "true", "bank.size": " ", "data.masks": "alpha"}
    )
    verb, command = parse(words)
    assert (verb, output) == ("train", places.folder / "runs" / "mine")
    assert (command.adapter.kind, command.adapter.rank, command.training.learning_rate) == ("dora", 8, 2e-4)
    assert command.training.sample_prompts == ["a cat", "a dog"]
    assert (command.data.trigger, "trigger" in form.preset_values("sdxl_lora")) == ("zbx dog", False)
    assert command.data.masks == "alpha"
    assert (command.data.flip, command.bank.size) == (True, Recipe().bank.size)
    assert "training.max_steps" in command.left_open


def test_a_preset_is_a_recipe_of_the_package_that_the_fields_override(places):
    values = form.preset_values("sdxl_lora")
    assert values["model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    words, _ = form.train_words(places, "sdxl_lora", values | {"pictures": "embedded/icons", "steps": "7"}, {})
    command = parse(words)[1]
    assert (command.model.id, command.training.max_steps) == (values["model"], 7)


@pytest.mark.sample("flux_lora")
@pytest.mark.parametrize("name", form.presets())
def test_every_preset_makes_a_command(places, name):
    words, _ = form.train_words(places, name, form.preset_values(name) | {"pictures": "embedded/icons"}, {})
    assert parse(words)[1].model.id == form.preset_values(name)["model"]


@pytest.mark.parametrize(
    ("fields", "others", "said"),
    [
        ({}, {}, "no pictures are named"),
        ({"pictures": "../other"}, {}, "leads out of the folders"),
        ({"pictures": "/etc"}, {}, "leads out of the folders"),
        ({"pictures": "nothing"}, {}, "nothing is no folder"),
        ({"steps": "many"}, {}, "training.max_steps is many"),
        ({"name": "../../x"}, {}, "a name without slashes"),
        ({"name": ".."}, {}, "a name without slashes"),
        ({"trains": "magic"}, {}, "what trains is 'magic'"),
        ({}, {"data.cache": "/tmp"}, "no pictures"),
        ({"pictures": "embedded/icons"}, {"bank.path": "/var"}, "leads out of the folders"),
        ({"pictures": "embedded/icons"}, {"data.masks": "/etc"}, "leads out of the folders"),
        ({"pictures": "embedded/icons"}, {"control.path": "/etc"}, "leads out of the folders"),
        (
            {"pictures": "embedded/icons"},
            {"tuning.schedule.kind": "function", "tuning.schedule.path": "mine.here:psi"},
            r"tuning.schedule.path is code that runs \(mine.here:psi\)",
        ),
        ({"trains": "controlnet"}, {"control.annotator": "mine.here:f"}, "control.annotator is code that runs"),
        ({"pictures": "embedded/icons"}, {"data.holdout": "2"}, "data.holdout is 2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_command_would_refuse_is_refused_on_the_page(places, fields, others, said):
    with pytest.raises(UserError, match=said):
        form.train_words(places, form.NO_PRESET, fields and {"pictures": "embedded/icons"} | fields, others)


def test_code_in_the_recipe_that_training_begins_from_is_refused(places):
    tuning = {"schedule": {"kind": "function", "path": "mine.here:psi"}}
    values = Recipe().to_dict() | {"data": {"path": "embedded/icons"}, "tuning": tuning}
    run = begun(places, "runs/coded", "complete", recipe_values=values)
    (run / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tuning.schedule.path is code that runs \(mine.here:psi\)"):
        form.train_words(places, form.NO_PRESET, {"pictures": "embedded/icons"}, {"training.begin_from": "runs/coded"})


def test_relative_places_are_those_of_the_pages_folder_wherever_it_was_started(places, monkeypatch, tmp_path):
    (places.folder / "models" / "mine").mkdir(parents=True)
    (places.folder / "prompts.txt").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    given = {"bank.prompts": "prompts.txt", "tuning.schedule.path": "measured.json", "tuning.schedule.kind": "measured"}
    fields = {"pictures": "embedded/icons", "model": "models/mine"}
    words, _ = form.train_words(places, form.NO_PRESET, fields, given)
    assert f"--model.id={places.folder / 'models' / 'mine'}" in words
    assert f"--bank.prompts={places.folder / 'prompts.txt'}" in words
    assert f"--tuning.schedule.path={places.folder / 'measured.json'}" in words
    words, _ = form.train_words(
        places, form.NO_PRESET, {"pictures": "embedded/icons", "model": "some/model"}, {"bank.prompts": "empty"}
    )
    assert {"--model.id=some/model", "--bank.prompts=empty"} <= set(words)


def test_pictures_among_which_the_page_would_write_are_offered_last_and_refused(places, tmp_path):
    (places.folder / "photos").mkdir()
    for folder in (tmp_path, places.folder, places.folder / "photos"):
        (folder / "a.png").write_bytes(b"")
    wider = Places.of(places.folder, [tmp_path])
    assert picture_folders(wider)[:2] == [".", "photos"]
    assert str(tmp_path) in picture_folders(wider)
    assert training_folders(wider) == ["photos", ".", str(tmp_path), "embedded/icons", "embedded/flat"]
    for name in (".", str(tmp_path)):
        with pytest.raises(UserError, match="move these into a folder of their own"):
            form.train_words(wider, form.NO_PRESET, {"pictures": name}, {})
    assert form.train_words(wider, form.NO_PRESET, {"pictures": "photos"}, {})[1].name == "mine"


def test_a_folder_that_cannot_be_read_is_passed_over(places, monkeypatch):
    for name in ("closed", "photos"):
        (places.folder / name).mkdir()
        (places.folder / name / "a.png").write_bytes(b"")
    known = Path.iterdir

    def iterdir(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return known(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # for who runs this as root, to whom nothing is closed
    assert picture_folders(places) == ["photos", "embedded/icons", "embedded/flat"]


def test_the_name_of_a_run_that_waits_is_not_offered_again(places):
    jobs = places.state / "jobs"
    jobs.mkdir(parents=True)
    for name, state in (("Mine", "waiting"), ("two", "done")):
        job = Job(name, ["train"], str(places.folder / "runs" / name), state)
        (jobs / f"{name}.json").write_text(json.dumps(asdict(job)))
    begun(places, "runs/mine")
    assert [form.free_name(places, name) for name in ("Mine", "two", "New")] == ["mine-2", "two", "New"]


def test_a_training_that_never_began_is_begun_and_another_goes_on(places):
    words, output = form.train_words(places, form.NO_PRESET, {"pictures": "embedded/icons", "steps": "7"}, {})
    job = Job("1", words, str(output), "stopped")
    assert form.go_on_words(job, " ") == words
    longer = form.go_on_words(job, "9")
    assert (parse(longer)[0], parse(longer)[1].training.max_steps) == ("train", 9)
    begun(places, "runs/mine")
    assert form.go_on_words(job, "9") == ["resume", str(output), "--steps=9"]


def test_what_is_said_of_a_stop_fits_the_command():
    said = [stopping(Job("1", [verb], "x", state)) for verb, state in (("train", "running"), ("train", "stopped"))]
    assert ["checkpoint" in text for text in said] == [True, False]
    assert "checkpoint" not in stopping(Job("1", ["export"], "x", "running"))


def test_a_run_is_not_written_over(places):
    begun(places, "runs/mine")
    with pytest.raises(UserError, match="there is a run mine already; give another name, such as mine-2"):
        form.train_words(places, form.NO_PRESET, {"pictures": "embedded/icons", "name": "mine"}, {})


def test_the_first_click_trains_the_embedded_model(places):
    words, output = form.embedded_words(places)
    command = parse(words)[1]
    assert (command.model.id, command.data.path, output.name) == ("embedded", "embedded/flat", "first")


# --- while it trains ------------------------------------------------------------------------------------------------


def test_a_run_is_shown_as_far_as_it_is(places):
    run = begun(places)
    job = Job("1", ["train"], str(run), "running")
    page = progress(places, job)
    assert "3 of 300" in page
    assert page.count("<svg") == 3  # the losses for wide and narrow pages, the bands of one role
    before = changed(job)
    (run / "samples").mkdir()
    (run / "samples" / "step-000003.png").write_bytes(b"")
    assert changed(job) != before
    assert "step 3" in pictures(job)
    assert "<svg" not in progress(places, Job("2", ["train"], str(places.folder / "runs" / "later")))


def test_names_and_logs_are_text(places):
    jobs, job = Jobs(places), Job("1", ["train"], str(places.folder / EVIL), "failed")
    (places.state / "jobs").mkdir(parents=True)
    (places.state / "jobs" / "1.log").write_text(EVIL)
    record = begun(places, f"runs/{EVIL}", "failed", error=EVIL)
    shown = [log(jobs, job), jobs_table(places, [job], None), progress(places, job), runs_table(runs_of(places), None)]
    for page in [*shown, run_details(places, places.name(record))]:
        assert "<img" not in page
        assert "&lt;img" in page


def test_the_job_that_is_shown_is_the_chosen_one_or_the_one_that_runs():
    old, runs, new = (Job(n, ["train"], n, state) for n, state in (("1", "done"), ("2", "running"), ("3", "waiting")))
    assert chosen_job([new, runs, old], "1") is old
    assert chosen_job([new, runs, old], None) is runs
    assert chosen_job([], "1") is None


# --- the runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_deleted_once_it_was_asked_and_not_while_it_runs(places):
    run = begun(places)
    assert "Delete runs/one with 2 files" in what_goes(places, "runs/one")
    lock = FileLock(run / ".lock")
    with lock, pytest.raises(UserError, match="is running; stop it first"):
        delete_run(places, "runs/one")
    delete_run(places, "runs/one")
    assert [*run.parent.iterdir()] == []


def test_what_is_no_run_or_holds_others_is_not_deleted(places):
    begun(places, "runs/outer")
    begun(places, "runs/outer/inner")
    with pytest.raises(UserError, match="has other runs in it"):
        delete_run(places, "runs/outer")
    for name in ("runs", "../mine", "/", "runs/none"):
        with pytest.raises(UserError):
            delete_run(places, name)
    assert (places.folder / "runs" / "outer" / "inner" / "run.json").is_file()


def test_an_export_is_a_command_and_lies_in_the_folder(places):
    begun(places)
    words, target = export_words(places, "runs/one", "kohya", "copied", "separate", "", False)
    assert target == places.folder / "exports" / "one-kohya"
    assert parse(words)[1].format == "kohya"
    target.mkdir(parents=True)
    again = export_words(places, "runs/one", "kohya", "copied", "separate", "", False)
    assert again[1] == places.folder / "exports" / "one-kohya-2"
    assert parse(export_words(places, "runs/one", "diffusers", "referenced", "separate", "x", True)[0])[1].despite_gates
    with pytest.raises(UserError, match="leads out of the folders"):
        export_words(places, "runs/one", "kohya", "copied", "separate", "../../x", False)
    with pytest.raises(UserError, match="needs --base copied"):
        export_words(places, "runs/one", "diffusers", "referenced", "fused", "x", False)
