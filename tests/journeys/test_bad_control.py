"""Each mistake with a ControlNet is one clear sentence and exit code 2; nothing is written in the output."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from difftuning_control.cli import main
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.images import decode_image
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_controlnet, load_family
from support.command_line import flags, settings
from support.controls import OUTLINE, write_photos
from support.refusals import assert_refused, refusal, snapshot

Maker = Callable[..., list[str]]
TRAIN = ["train", "--method", "controlnet"]
SUPPLIED = [*TRAIN, "--control.annotator", "supplied"]
SAMPLE = ["sample", "--prompts", '["red"]', "--steps", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-control")


@pytest.fixture(scope="module")
def annotator(root: Path) -> Iterator[str]:
    (root / "mine.py").write_text(f"{OUTLINE}\n\ndef nothing(picture):\n    return np.zeros_like(picture)\n")
    sys.path.insert(0, str(root))
    yield "mine:outline"
    sys.path.remove(str(root))
    sys.modules.pop("mine", None)


def control_settings(model: Path, data: Path, root: Path, **changes: object) -> dict[str, object]:
    """Flags without their dashes that train a tiny ControlNet for two steps."""
    control = {"method": "controlnet", "control.fidelity.every": 2, "control.fidelity.steps": 1}
    return settings(model, data, root, **{**control, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data")


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, folder: Path, annotator: str, root: Path) -> Maker:
    """The words of a training that would succeed: `train(**{"control.dropout": …})`; one cache for all."""

    def words(**changes: object) -> list[str]:
        given = {"control.annotator": annotator, "data.cache": root / "cache", **changes}
        return ["train", *flags(control_settings(model_dir, folder, tmp_path, **given))]

    return words


@pytest.fixture
def supplied(folder: Path, tmp_path: Path, train: Maker) -> Maker:
    """The same on supplied conditions: the negatives of the pictures."""
    (tmp_path / "conditions").mkdir()
    for path in folder.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(tmp_path / "conditions" / path.name)
    values = {
        "control.annotator": "supplied",
        "control.path": tmp_path / "conditions",
        "control.bank_condition": "blank",
        "control.fidelity.every": 0,
    }
    return lambda **changes: train(**{**values, **changes})


@pytest.mark.wide
def test_the_undisturbed_commands_succeed(train, supplied, tmp_path):
    for name, words in (("run", train()), ("supplied", supplied())):
        main([*words, "--output", str(tmp_path / name)])
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "complete"


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(
    "--method controlnet --training.stop_when converged --control.fidelity.every 0-",
    "--method controlnet --control.annotator supplied --control.column x --control.validation_path y-",
    "--method controlnet --control.annotator supplied --control.path x --control.bank_condition*",
    "--method full --control.dropout 0.1-",
    "--method controlnet --control.annotator supplied --control.path x --control.column y-",
    "--method controlnet --control.annotator supplied --control.path x --control.params {a: 1}-",
)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--control.annotator", "hed"], "but method is lora; say --method controlnet, or leave them out."),
        (["train", "--control.fidelity.every", "5"], "but method is lora; say --method controlnet, or leave them out."),
        (["train", "--adapter.on", "controlnet"], "but method is lora; say --method controlnet, or leave them out."),
        (["train", "--training.stop_when", "converged"], "but method is lora; say --method controlnet"),
        (["train", "--method", "full", "--control.dropout", "0.1"], "but method is full; say --method controlnet"),
        (["bank", "--control.annotator", "hed"], "but method is lora; say --method controlnet"),
        ([*TRAIN, "--adapter.rank", "4"], "adapter settings are given for the denoiser, which method controlnet leave"),
        ([*TRAIN, "--adapter.rank", "4"], "say adapter.on: controlnet, or leave them out to train the whole ControlNe"),
        (SUPPLIED, "control.annotator is supplied; give either control.path or control.column, the one place."),
        ([*SUPPLIED, "--control.path", "x", "--control.column", "y"], "give either control.path or control.column"),
        ([*TRAIN, "--control.path", "x"], "control.path is given, but control.annotator is canny; say --control.annot"),
        ([*TRAIN, "--control.column", "x"], "control.column is given, but control.annotator is canny; say --control"),
        ([*TRAIN, "--control.validation_path", "x"], "control.validation_path is given, but control.annotator is cann"),
        ([*SUPPLIED, "--control.path", "x"], "the bank's samples have no supplied condition of their own; say --contr"),
        ([*SUPPLIED, "--control.path", "x", "--control.params", "{a: 1}"], "which has no params and no weights; leave"),
        ([*SUPPLIED, "--control.path", "x", "--control.weights", "y"], "which has no params and no weights; leave the"),
        (
            [*SUPPLIED, "--control.column", "x", "--control.validation_path", "y"],
            "control.column is read in data.validation_path too; leave out control.validation_path.",
        ),
        (
            [*SUPPLIED, "--control.path", "x", "--control.bank_condition", "blank", "--data.validation_path", "y"],
            "give data.validation_path and control.validation_path together, or neither.",
        ),
        (
            [*SUPPLIED, "--control.path", "x", "--control.bank_condition", "blank", "--control.validation_path", "y"],
            "give data.validation_path and control.validation_path together, or neither.",
        ),
        (
            [*TRAIN, "--training.stop_when", "converged", "--control.fidelity.every", "0"],
            "training.stop_when needs a fidelity curve; set control.fidelity.every above 0.",
        ),
        ([*TRAIN, "--training.stop_after", "5"], "training.stop_after is given without training.stop_when; say when:"),
        ([*TRAIN, "--training.stop_when", "later"], 'training.stop_when is later; expected one of "converged" or null'),
        ([*TRAIN, "--training.sample_prompts", "[red]"], "a ControlNet's sample grids show held-out pictures; leave o"),
        ([*TRAIN, "--control.dropout", "1.5"], "control.dropout is 1.5; expected 0 to 1."),
        ([*TRAIN, "--control.dropout", "-0.1"], "control.dropout is -0.1; expected 0 to 1."),
        ([*TRAIN, "--control.workers", "0"], "control.workers is 0; expected 1 to 256."),
        ([*TRAIN, "--control.workers", "257"], "control.workers is 257; expected 1 to 256."),
        ([*TRAIN, "--control.fidelity.every", "-1"], "control.fidelity.every is -1; expected at least 0."),
        ([*TRAIN, "--control.fidelity.size", "0"], "control.fidelity.size is 0; expected at least 1."),
        ([*TRAIN, "--control.fidelity.steps", "0"], "control.fidelity.steps is 0; expected at least 1."),
        ([*TRAIN, "--control.fidelity.guidance_scale", "-1"], "control.fidelity.guidance_scale is -1.0; expected at l"),
        ([*TRAIN, "--training.stop_when", "converged", "--training.stop_after", "-1"], "training.stop_after is -1; ex"),
        ([*TRAIN, "--control.resize", "cubic"], 'control.resize is cubic; expected one of "lanczos", "box", "nearest"'),
        ([*TRAIN, "--control.bank_condition", "no"], 'control.bank_condition is no; expected one of "own", "blank".'),
        ([*TRAIN, "--adapter.on", "unet"], 'adapter.on is unet; expected one of "denoiser", "controlnet".'),
        ([*TRAIN, "--control.anotator", "canny"], "there is no option --control.anotator; did you mean --control.anno"),
        ([*TRAIN, "--annotator", "canny"], "there is no option --annotator; did you mean --control.annotator?"),
        ([*TRAIN, "--control", "{fidelity: 5}"], "control.fidelity is 5 in --control; expected a section with every,"),
        ([*SAMPLE, "--control", "x.png"], "--control needs --run: the folder of a trained ControlNet."),
        ([*SAMPLE, "--run", "x", "--control_ready"], "--control_ready is given without --control; name the picture of"),
    ],
    ids=lambda v: " ".join(v[1:]) if isinstance(v, list) else "",
)
def test_a_command_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert_refused(words, capsys, tmp_path, expected)


@pytest.mark.sample("null")
@pytest.mark.parametrize("value", ["5", "null", "[a]"])
def test_parameters_that_are_no_section_are_refused(tmp_path, monkeypatch, capsys, value):
    monkeypatch.chdir(tmp_path)
    assert_refused([*TRAIN, "--control.params", value], capsys, tmp_path, "control.params is")


# --- annotators and conditions --------------------------------------------------------------------------------------


@pytest.mark.sample("{'control.annotator': 'hed', 'control.weights': '/nowhere/hed'}-cannot use the weights in *")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"control.annotator": "cany"}, "the annotator 'cany' is unknown; expected canny"),
        ({"control.annotator": "open_pose"}, "the annotator 'open_pose' is unknown; expected openpose"),
        ({"control.annotator": "mine:outlin"}, "the annotator mine:outlin cannot be imported"),
        ({"control.annotator": "nobodys:outline"}, "the annotator nobodys:outline cannot be imported (No module named"),
        ({"control.annotator": "hed"}, "the annotator hed cannot use the weights in lllyasviel/Annotators"),
        ({"control.annotator": "hed"}, "canny, lineart_standard and shuffle work without weights."),
        ({"control.annotator": "hed", "control.weights": "/nowhere/hed"}, "cannot use the weights in /nowhere/hed"),
        ({"control.annotator": "canny", "control.weights": "x"}, "the annotator canny has no weights, and they are gi"),
        ({"control.annotator": "canny", "control.params": "{low: 5}"}, "has no parameter 'low'; expected low_threshol"),
        ({"control.annotator": "mine:nothing"}, "the annotator mine:nothing found nothing on any of the 6 pictures;"),
        ({"data.holdout": 0}, "fidelity is measured on held-out pictures, and there are none; raise data.holdout, nam"),
        ({"data.holdout": 0}, "or set --control.fidelity.every 0."),
    ],
    ids=str,
)
def test_a_condition_that_cannot_be_made_is_told(train, tmp_path, capsys, changes, expected):
    assert_refused(train(**changes), capsys, tmp_path, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.sample("{'data.holdout': 0}")
@pytest.mark.parametrize("changes", [{"control.annotator": "hed"}, {"data.holdout": 0}], ids=str)
def test_a_condition_that_cannot_be_made_is_told_before_the_bank_is_drawn(train, tmp_path, capsys, changes):
    refusal(train(**changes, **{"data.cache": tmp_path / "cache"}), capsys, tmp_path)
    assert not (tmp_path / "cache" / "banks").exists()


def without_condition(conditions: Path) -> None:
    (conditions / "3.png").unlink()


def damaged(conditions: Path) -> None:
    (conditions / "3.png").write_bytes((conditions / "3.png").read_bytes()[:50])


def of_other_proportions(conditions: Path) -> None:
    Image.new("RGB", (64, 16)).save(conditions / "3.png")


FAULTS = {
    without_condition: "has no condition in",
    damaged: "has a condition that is damaged",
    of_other_proportions: "is 20x33, but its condition 64x16; expected the same proportions",
}


@pytest.mark.wide
@pytest.mark.parametrize("spoil", FAULTS)
def test_a_supplied_condition_that_cannot_be_used_is_refused_or_left_out_and_recorded(
    supplied, folder, tmp_path, capsys, spoil
):
    spoil(tmp_path / "conditions")
    assert_refused(supplied(), capsys, tmp_path, f"3.png in {folder} {FAULTS[spoil]}", "--data.skip_bad true.")
    assert not (tmp_path / "run").exists()
    main([*supplied(), "--data.skip_bad"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(run["data"]["skipped"]) == ["3.png"]
    assert run["data"]["skipped"]["3.png"].startswith(FAULTS[spoil])
    assert run["data"]["pictures"] + run["data"]["held_out"] == 7


def test_a_condition_without_a_picture_is_refused_or_left_out(supplied, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "conditions" / "more.png")
    assert_refused(
        supplied(), capsys, tmp_path, "1 condition without a picture of the same name: more.png", "--data.skip_bad"
    )
    main([*supplied(), "--data.skip_bad"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


def test_supplied_conditions_with_a_bank_that_only_validation_uses_are_refused_with_what_to_do(
    supplied, train, tmp_path, capsys
):
    main(["bank", *train(**{"bank.path": tmp_path / "bank"})[1:]])
    plain = {"tuning.retention_ratio": 0, "tuning.retention_weight": 0, "control.bank_condition": "own"}
    words = supplied(**plain, **{"bank.path": tmp_path / "bank"})
    assert_refused(words, capsys, tmp_path, "say --control.bank_condition blank")


# --- where to start from --------------------------------------------------------------------------------------------


def no_directory(place: Path) -> None:
    pass


def empty_directory(place: Path) -> None:
    place.mkdir()


def file(place: Path) -> None:
    place.write_text("mine")


def damaged_weights(place: Path) -> None:
    load_family("embedded").new_controlnet(0).save_pretrained(place)
    (place / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99)


def pickled_weights(place: Path) -> None:
    load_family("embedded").new_controlnet(0).save_pretrained(place, safe_serialization=False)


@pytest.mark.sample("no_directory")
@pytest.mark.parametrize("write", [no_directory, empty_directory, file, damaged_weights, pickled_weights])
def test_a_start_that_is_no_controlnet_is_refused(train, tmp_path, capsys, write):
    write(tmp_path / "start")
    words = train(**{"control.init": tmp_path / "start"})
    fault = "is never loaded" if write is pickled_weights else "config.json and safetensors weigh"
    assert_refused(words, capsys, tmp_path, f"the ControlNet {tmp_path / 'start'} ", fault)
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
def test_a_start_that_is_a_model_or_cannot_be_downloaded_is_refused(train, model_dir, tmp_path, capsys):
    words = train(**{"control.init": model_dir})
    assert_refused(words, capsys, tmp_path, f"the ControlNet {model_dir} could not be loaded")
    words = train(**{"control.init": "nobody/no-such-controlnet"})
    assert_refused(words, capsys, tmp_path, "is no directory here and could not be downloaded")


def test_a_start_that_was_made_for_another_model_is_refused_with_the_numbers(train, model_dir, tmp_path, capsys):
    config = dict(load_family(str(model_dir)).new_controlnet(0).config) | {"cross_attention_dim": 24}
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "start")
    words = train(**{"control.init": tmp_path / "start"})
    assert_refused(words, capsys, tmp_path, "does not fit this model: its cross_attention_dim is 24, the model's 16;")


# --- finished runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(root: Path, model_dir: Path, annotator: str) -> dict[str, Path]:
    """A finished LoRA and a finished ControlNet on the same pictures."""
    data = write_photos(root / "data", 14)
    shared = {"data.holdout": 0.5, "bank.size": 8}
    lora = settings(model_dir, data, root, **shared, output=root / "lora")
    changes = {**shared, "control.annotator": annotator, "output": root / "control"}
    main(["train", *flags(lora)])
    main(["train", *flags(control_settings(model_dir, data, root, **changes))])
    return {name: root / name for name in ("lora", "control")}


@pytest.fixture
def control(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the finished ControlNet."""
    return Path(shutil.copytree(runs["control"], tmp_path / "control"))


@pytest.fixture
def photo(folder: Path) -> Path:
    return folder / "0.png"


def test_sampling_a_controlnet_needs_a_condition_and_a_lora_takes_none(runs, photo, tmp_path, capsys):
    words = [*SAMPLE, "--output", str(tmp_path / "samples"), "--run"]
    assert_refused(
        [*words, str(runs["control"])],
        capsys,
        tmp_path,
        f"the run {runs['control']} is a ControlNet, which draws under a condition; give --control photo.png.",
    )
    assert_refused(
        [*words, str(runs["lora"]), "--control", str(photo)],
        capsys,
        tmp_path,
        f"the run {runs['lora']} is no ControlNet (its method is lora); omit --control.",
    )
    assert not (tmp_path / "samples").exists()


def animated(path: Path) -> None:
    frames = [Image.effect_noise((16, 16), 50) for _ in range(3)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


BAD_PHOTOS: dict[Callable[[Path], object], str] = {
    no_directory: "of --control cannot be read; name an image file.",
    empty_directory: "of --control cannot be read; name an image file.",
    file: "of --control is not a picture that can be read; give another.",
    lambda path: path.write_bytes(b""): "of --control is empty (0 bytes); give another.",
    animated: "of --control is animated (3 frames)",
}


@pytest.mark.sample("condition-empty_directory")
@pytest.mark.parametrize("write", BAD_PHOTOS)
@pytest.mark.parametrize("ready", [[], ["--control_ready"]], ids=["photo", "condition"])
def test_a_photo_that_cannot_be_read_is_named(runs, tmp_path, capsys, write, ready):
    write(tmp_path / "photo.png")
    words = [*SAMPLE, "--run", str(runs["control"]), "--control", str(tmp_path / "photo.png"), *ready]
    shown = refusal([*words, "--output", str(tmp_path / "samples")], capsys, tmp_path)
    assert shown.startswith(f"the picture {tmp_path / 'photo.png'} {BAD_PHOTOS[write]}")


def other_weights(run: Path) -> None:
    path = run / "controlnet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_spec(run: Path) -> None:
    (run / "controlnet" / "control_spec.json").unlink()


def without_annotator(run: Path) -> None:
    ControlSpec("nobodys:outline", resolution=16).save(run / "controlnet")


def without_weights(run: Path) -> None:
    (run / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    ControlSpec("canny", resolution=16).save(run / "controlnet")


@pytest.mark.sample("without_weights-could not be loaded")
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (other_weights, "was written for other weights (diffusion_pytorch_model.safetensors differ)"),
        (without_spec, "has no control_spec.json, so nothing says how its conditions are made"),
        (without_annotator, "the annotator nobodys:outline cannot be imported"),
        (without_weights, "could not be loaded"),
    ],
)
def test_a_controlnet_that_does_not_know_its_conditions_is_not_sampled(
    control, photo, tmp_path, capsys, spoil, expected
):
    spoil(control)
    words = [*SAMPLE, "--run", str(control), "--control", str(photo), "--output", str(tmp_path / "samples")]
    assert_refused(words, capsys, tmp_path, expected)


def test_an_analysis_of_a_controlnet_is_refused(runs, tmp_path, capsys):
    words = ["analyze", "--run", str(runs["control"]), "--output", str(tmp_path / "analysis")]
    expected = f"the run {runs['control']} is a ControlNet, beside which the model stays as it was"
    assert_refused(words, capsys, tmp_path, expected, "judge its pictures with difftune evaluate.")


def test_a_pilot_of_controlnets_that_stop_by_themselves_is_refused(train, tmp_path, capsys):
    words = ["pilot", *train(**{"training.stop_when": "converged"})[1:]]
    assert_refused(words, capsys, tmp_path, "a pilot compares runs of equal length; leave out training.stop_when.")
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
@pytest.mark.parametrize("order", [("lora", "control"), ("control", "lora")], ids=" first, ".join)
def test_a_lora_and_a_controlnet_are_not_evaluated_together(runs, tmp_path, capsys, order):
    named = json.dumps([str(runs[name]) for name in order])
    words = ["evaluate", "--runs", named, "--pictures", "5", "--steps", "1", "--output", str(tmp_path / "evaluation")]
    before = snapshot(runs["control"])
    expected = f"{runs['lora']} takes no condition, or makes it in another way than {runs['control']}; evaluate only"
    assert_refused(words, capsys, tmp_path, expected)
    assert not (tmp_path / "evaluation").exists()
    assert snapshot(runs["control"]) == before


def test_controlnets_of_different_conditions_are_not_evaluated_together(runs, control, tmp_path, capsys):
    spec = ControlSpec.load(control / "controlnet")
    ControlSpec(spec.annotator, {"least": 99}, resolution=spec.resolution).save(control / "controlnet")
    named = json.dumps([str(runs["control"]), str(control)])
    words = ["evaluate", "--runs", named, "--pictures", "5", "--steps", "1", "--output", str(tmp_path / "evaluation")]
    assert_refused(words, capsys, tmp_path, f"{control} takes no condition, or makes it in another way than")


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 400.0)])
def test_a_float_picture_in_another_range_is_refused_with_its_range(tmp_path, low, high):
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)).save(path)
    with pytest.raises(UserError, match=f"has values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255"):
        decode_image(path.read_bytes())


def test_a_function_that_takes_other_parameters_or_weights_is_refused_before_it_is_called():
    with pytest.raises(UserError, match=r"does not take these control\.params"):
        Conditioner(ControlSpec("yaml:safe_load", {"zzz": 1})).load()
    with pytest.raises(UserError, match="takes params only"):
        ControlSpec("yaml:safe_load", weights="somewhere")


def test_a_function_that_fails_is_told_in_one_sentence():
    with pytest.raises(UserError, match=r"yaml:safe_load failed on a picture \(AttributeError"):
        Conditioner(ControlSpec("yaml:safe_load")).condition(np.zeros((8, 8, 3), np.uint8))


def test_the_weights_of_an_annotator_are_known_by_what_they_hold(tmp_path):
    found = []
    for name, content in (("a", b"one"), ("b", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "ControlNetHED.pth").write_bytes(content)
        found.append(Conditioner(ControlSpec("hed", weights=str(tmp_path / name))).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_controlnet_that_lacks_tensors_or_takes_other_channels_is_refused(family, tmp_path):
    controlnet = family.new_controlnet(0)
    controlnet.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("mid_block.")}, file)
    with pytest.raises(UserError, match="tensors are missing, such as mid_block"):
        load_controlnet(family, str(tmp_path / "whole"))
    other = type(controlnet).from_config({**controlnet.config, "conditioning_channels": 4})
    with pytest.raises(UserError, match="conditions of 4 channels, and pictures have 3"):
        family.check_controlnet(other, "other")


def test_a_spec_of_another_range_is_refused_with_the_two_ranges(family):
    with pytest.raises(UserError, match="are in -1 to 1, the pipeline gives 0 to 1"):
        ControlSpec(value_range=(-1.0, 1.0)).check_range(family.condition_range)
