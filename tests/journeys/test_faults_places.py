"""From the command line: outputs apart from data, what is said of data, and a pilot that refuses copies."""

import json
import shutil
from pathlib import Path

import pytest

from difftuning_control.cli import main
from support.command_line import flags, settings
from support.pictures import write_pictures
from support.refusals import assert_refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir) -> tuple[Path, Path]:
    """A folder of pictures and a finished run of them."""
    root = tmp_path_factory.mktemp("places")
    data = write_pictures(root / "data", 12)
    main(["train", *flags(settings(model_dir, data, root))])
    return data, root / "run"


def words(verb: str, place: Path, data: Path, run: Path, model: Path, root: Path) -> list[str]:
    """A command of which `place` is the output."""
    made = settings(model, data, root, output=place)
    return {
        "train": ["train", *flags(made)],
        "pilot": ["pilot", *flags(made)],
        "analyze": ["analyze", *flags(made)],
        "analyze a run": ["analyze", *flags({"run": run, "output": place})],
        "evaluate": ["evaluate", f"--runs=[{run}]", *flags({"output": place})],
        "sample": ["sample", "--prompts=[red]", *flags({"run": run, "output": place})],
        "export": ["export", str(run), *flags({"to": place})],
        "a bank": ["bank", *flags(made | {"bank.path": place})],
        "a bank's cache": ["bank", *flags(made | {"data.cache": place})],
        "train's bank": ["train", *flags(made | {"output": root / "other", "bank.path": place})],
        "train's cache": ["train", *flags(made | {"output": root / "other", "data.cache": place})],
        "a pilot's cache": ["pilot", *flags(made | {"output": root / "other", "data.cache": place})],
    }[verb]


@pytest.mark.sample("sample")
@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "pilot",
        "analyze",
        "analyze a run",
        "evaluate",
        "sample",
        "export",
        "a bank",
        "a bank's cache",
        "train's bank",
        "train's cache",
        "a pilot's cache",
    ],
)
def test_fault_15_07_an_output_inside_the_data_folder_is_refused_before_anything_is_written(
    trained, model_dir, tmp_path, capsys, verb
):
    data, run = trained
    # the data's own folder as bank is one of pictures, into which nothing is written
    itself = [] if verb.endswith("bank") else [data]
    for place in (data / "run1", data / "deep" / "er", *itself):
        assert_refused(
            words(verb, place, data, run, model_dir, tmp_path), capsys, data, "and the data", "lie in one another"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample("bank.path")
@pytest.mark.parametrize("key", ["data.validation_path", "control.path", "control.validation_path", "bank.path"])
def test_fault_15_07_so_is_one_inside_any_other_folder_of_pictures(trained, model_dir, tmp_path, capsys, key):
    other = write_pictures(tmp_path / "other", 4)
    changes = {key: other}
    if key.startswith("control"):
        changes |= {"method": "controlnet", "control.annotator": "supplied", "control.bank_condition": "blank"}
        changes |= {
            "control.path": trained[0],
            "data.validation_path": trained[0],
            "control.validation_path": trained[0],
        }
        changes[key] = other
    made = settings(model_dir, trained[0], tmp_path, **changes, output=other / "run")
    assert_refused(["train", *flags(made)], capsys, tmp_path, f"the data {other} lie in one another")


@pytest.mark.parametrize("key", ["data", "source"])
def test_fault_15_07_so_is_an_evaluation_inside_the_pictures_that_it_judges_by(trained, tmp_path, capsys, key):
    other = write_pictures(tmp_path / "other", 4)
    command = ["evaluate", f"--runs=[{trained[1]}]", *flags({key: other, "output": other / "judged"})]
    assert_refused(command, capsys, tmp_path, f"the data {other} lie in one another")


@pytest.mark.wide
def test_fault_15_07_links_and_data_inside_the_output_do_not_help(trained, model_dir, tmp_path, capsys):
    data = write_pictures(tmp_path / "out" / "data", 4)
    (tmp_path / "link").symlink_to(data)
    for path, output in ((data, tmp_path / "link" / "x"), (tmp_path / "link", data / "x"), (data, tmp_path / "out")):
        made = settings(model_dir, path, tmp_path, output=output)
        assert_refused(["train", *flags(made)], capsys, tmp_path, "lie in one another")


@pytest.mark.wide
def test_fault_15_07_a_name_that_only_begins_alike_is_no_place_inside(model_dir, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 8)
    made = settings(model_dir, data, tmp_path, output=tmp_path / "data-run", **{"bank.path": tmp_path / "data.bank"})
    made["data.cache"] = tmp_path  # above the data
    main(["train", *flags(made)])
    assert (tmp_path / "data-run" / "run.json").exists()


@pytest.mark.wide
def test_fault_15_01_and_05_a_run_says_and_records_what_it_took_and_verifies(model_dir, tmp_path, capsys):
    data = tmp_path / "data"
    for split, count, seed in (("train", 8, 0), ("test", 3, 1)):
        write_pictures(data / split, count, seed=seed)
    (data / "train" / "3.png").write_bytes(b"no picture")
    made = settings(model_dir, data, tmp_path, **{"data.skip_bad": "true", "data.validation_path": data})
    capsys.readouterr()
    main(["train", *flags(made)])
    said = capsys.readouterr().out
    assert f"using the split train of {data}, without the other splits (test); --data.split chooses" in said
    assert f"using the split test of {data}, without the other splits (train); --data.validation_split chooses" in said
    assert f"using 7 of 8 pictures of {data}; left out: train/3.png (" in said
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (found["pictures"], found["held_out"], list(found["skipped"])) == (7, 2, ["train/3.png"])
    main(["verify", str(tmp_path / "run"), "--strict"])
    write_pictures(data / "test", 3, seed=2)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "run")])
    assert stopped.value.code == 1


def test_fault_15_06_a_pilot_on_held_out_copies_is_refused(model_dir, tmp_path, capsys):
    data, held = write_pictures(tmp_path / "data", 8), write_pictures(tmp_path / "held", 8, seed=1)
    shutil.copy(data / "1.png", held / "0.png")
    made = settings(model_dir, data, tmp_path, **{"data.validation_path": held})
    made |= {"pilot.seeds": "[0, 1]", "pilot.pictures": 5}
    expected = ("1 of the 8 held-out pictures are tuned on too: 0.png (as 1.png)", "--data.validation_path")
    assert_refused(["pilot", *flags(made)], capsys, tmp_path, *expected)
    del made["data.validation_path"]
    assert_refused(["pilot", *flags(made | {"data.validation_path": data})], capsys, tmp_path, "8 of the 8 held-out")


@pytest.mark.wide
def test_fault_15_06_a_training_on_held_out_copies_says_so(model_dir, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 6)
    capsys.readouterr()
    main(["train", *flags(settings(model_dir, data, tmp_path, **{"data.validation_path": data}))])
    assert "6 of the 6 held-out pictures are tuned on too: 0.png, 1.png" in capsys.readouterr().out
