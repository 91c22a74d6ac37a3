"""Masks over pictures: read, checked, framed as the pictures are, and trained with."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.data.framing import Framing
from difftuning_control.data.masks import loss_weights, out_of_sight
from difftuning_control.data.prepare import read_data
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.families.fitting import fitted
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.masking import Masking
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import Moved, VerifyRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation
from difftuning_control.runs.identity import identity_settings
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.trainings import interrupted_after, resumed, rows, run_record

ALPHA = Masking("alpha", 0.1)


def write_masked(folder: Path, count: int = 6, alpha: bool = False) -> Path:
    """Pictures 48 × 32 with a square that the mask is of, in a folder of masks or as what is opaque."""
    (folder / "mine").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(count):
        mask = np.zeros((32, 48), np.uint8)
        mask[8:24, 4 * i : 4 * i + 16] = 255
        pixels = np.full((32, 48, 3), 90, np.uint8)
        pixels[mask > 0] = (200, 20 * i, 0)
        picture = Image.fromarray(pixels)
        if alpha:
            picture.putalpha(Image.fromarray(mask))
        picture.save(folder / "mine" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.webp", lossless=True)
        (folder / "mine" / f"{i}.txt").write_text(f"ball {i}")
    return folder / "mine"


def counted(data, number: int) -> np.ndarray:
    return np.asarray(data.examples[number].load_mask())


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_says_what_each_pixel_counts(tmp_path, alpha):
    mine = write_masked(tmp_path, alpha=alpha)
    masking = ALPHA if alpha else Masking(str(tmp_path / "masks"), 0.1)
    data = load_images(str(mine), masking=masking)
    assert (len(data), data.notes) == (6, [])
    values = counted(data, 2)
    assert values.shape == (32, 48)
    assert values[8:24, 8:24].min() == pytest.approx(1)
    assert values[:8].max() == pytest.approx(0.1)
    assert data.fingerprint != load_images(str(mine)).fingerprint


def test_another_mask_is_other_data(tmp_path):
    mine, masking = write_masked(tmp_path), Masking(str(tmp_path / "masks"), 0.1)
    before = load_images(str(mine), masking=masking).fingerprint
    Image.new("L", (48, 32), 255).save(tmp_path / "masks" / "3.webp", lossless=True)
    assert load_images(str(mine), masking=masking).fingerprint != before


def test_masks_may_lie_among_the_pictures(tmp_path):
    mine = write_masked(tmp_path)
    (tmp_path / "masks").rename(mine / "masks")
    data = load_images(str(mine), masking=Masking(str(mine / "masks"), 0.1))
    assert [e.name for e in data.examples] == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize("way", ["relative", "absolute", "parent", "link"])
def test_masks_among_the_pictures_are_found_however_they_are_named(tmp_path, monkeypatch, way):
    mine = write_masked(tmp_path)
    (tmp_path / "masks").rename(mine / "masks")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(mine)
    data, masks = {
        "relative": (str(mine), "mine/masks"),
        "absolute": ("mine", str(mine / "masks")),
        "parent": ("mine", "mine/../mine/masks"),
        "link": ("link", "mine/masks"),
    }[way]
    assert len(load_images(data, masking=Masking(masks, 0.1))) == 6


@pytest.mark.parametrize("data", ["relative", "absolute"])
@pytest.mark.parametrize("masks", ["relative", "absolute"])
def test_masks_may_be_a_link_among_the_pictures(tmp_path, monkeypatch, data, masks):
    mine = write_masked(tmp_path)
    (mine / "masks").symlink_to(tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    folder = str(mine) if data == "absolute" else "mine"
    place = str(mine / "masks") if masks == "absolute" else "mine/masks"
    assert len(load_images(folder, masking=Masking(place, 0.1))) == 6


def test_masks_among_pictures_are_none_that_are_held_out(tmp_path):
    mine = write_masked(tmp_path)
    (tmp_path / "masks").rename(mine / "masks")
    for i in range(6):
        part = "test" if i > 3 else "train"
        for place, end in ((mine, "png"), (mine / "masks", "webp")):
            (place / part).mkdir(exist_ok=True)
            (place / f"{i}.{end}").rename(place / part / f"{i}.{end}")
        (mine / f"{i}.txt").unlink()
    config = DataConfig(str(mine), validation_path=str(mine), masks=str(mine / "masks"), trigger="zbx")
    data, held_out = read_data(Recipe(data=config))
    assert [e.name for e in data.examples] == [f"train/{i}.png" for i in range(4)]
    assert [e.name for e in held_out.examples] == ["test/4.png", "test/5.png"]
    assert all(e.load_mask is None for e in held_out.examples)


def test_masks_among_class_folders_are_no_class(tmp_path):
    mine = write_masked(tmp_path)
    (tmp_path / "masks").rename(mine / "masks")
    for i in range(6):
        for place, end in ((mine, "png"), (mine / "masks", "webp")):
            (place / "xy"[i % 2]).mkdir(exist_ok=True)
            (place / f"{i}.{end}").rename(place / "xy"[i % 2] / f"{i}.{end}")
    data = load_images(str(mine), classes="folders", masking=Masking(str(mine / "masks"), 0.1))
    assert {e.caption for e in data.examples} == {"x", "y"}


@pytest.mark.parametrize("written", ["full", "dots"])
def test_pictures_that_metadata_name_have_their_masks_and_others_need_none(tmp_path, written):
    mine = write_masked(tmp_path)
    names = [f"{mine.resolve()}/{i}.png" if written == "full" else f"./sub/../{i}.png" for i in range(4)]
    (mine / "sub").mkdir()
    rows = [json.dumps({"file_name": name, "text": "ball"}) for name in names]
    (mine / "metadata.jsonl").write_text("\n".join(rows))
    data = load_images(str(mine), masking=Masking(str(tmp_path / "masks"), 0.1))
    assert len(data) == 4
    assert counted(data, 3)[8:24, 12:28].min() == 1


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "16", "rotated"])
def test_masks_are_read_in_the_forms_that_tools_write(tmp_path, kind):
    mine = write_masked(tmp_path, 1)
    grey = np.zeros((32, 48), np.uint8)
    grey[8:24, :16] = 255
    mask = Image.fromarray(grey)
    (tmp_path / "masks" / "0.webp").unlink()
    place, exif = tmp_path / "masks" / "0.png", Image.Exif()
    if kind in ("RGBA", "LA"):  # white on nothing
        mask = Image.merge(kind, [Image.new("L", mask.size, 255)] * (len(kind) - 1) + [mask])
    elif kind == "P":
        mask = mask.convert("P")
    elif kind == "16":
        mask = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        mask, exif[274] = mask.transpose(Image.Transpose.ROTATE_90), 6  # lies on its side
    mask.save(place, exif=exif)
    values = counted(load_images(str(mine), masking=Masking(str(tmp_path / "masks"), 0.0)), 0)
    assert np.array_equal(values, (grey > 0).astype(np.float32))


def test_pictures_without_a_mask_and_masks_without_a_picture_are_named(tmp_path):
    mine, masking = write_masked(tmp_path), Masking(str(tmp_path / "masks"), 0.1)
    (tmp_path / "masks" / "2.webp").unlink()
    with pytest.raises(UserError, match=r"2\.png in .* has no mask in .*masks"):
        load_images(str(mine), masking=masking)
    assert len(load_images(str(mine), masking=masking, skip_bad=True)) == 5
    (tmp_path / "masks" / "1.webp").rename(tmp_path / "masks" / "one.webp")
    with pytest.raises(UserError, match=r"masks has 1 mask without a picture of the same name: one\.webp; take"):
        load_images(str(mine), masking=masking)


def test_masks_that_teach_nothing_or_fit_nothing_are_refused(tmp_path):
    mine, masking = write_masked(tmp_path), Masking(str(tmp_path / "masks"), 0.1)
    Image.new("L", (48, 32)).save(tmp_path / "masks" / "0.webp", lossless=True)
    Image.new("L", (32, 32), 255).save(tmp_path / "masks" / "1.webp", lossless=True)
    (tmp_path / "masks" / "2.webp").write_bytes(b"")
    data = load_images(str(mine), masking=masking, skip_bad=True)
    assert data.skipped == {
        "0.png": "has a mask that is black everywhere, so nothing of the picture would be learnt",
        "1.png": "is 48x32, but its mask 32x32; expected the same proportions",
        "2.png": "has a mask that is empty (0 bytes)",
    }
    with pytest.raises(UserError, match=r"the folder of masks nowhere does not exist"):
        load_images(str(mine), masking=Masking("nowhere", 0.1))


@pytest.mark.parametrize("kind", ["numbers", "labels", "16"])
def test_masks_of_numbers_are_refused(tmp_path, kind):
    mine = write_masked(tmp_path)
    values = (np.asarray(Image.open(tmp_path / "masks" / "0.webp").convert("L")) > 0).astype(np.uint8)
    mask = Image.fromarray(values if kind != "16" else values.astype(np.uint16) * 255)
    if kind == "labels":
        mask = mask.convert("P")
        mask.putpalette([0, 0, 0, 128, 0, 0])
    (tmp_path / "masks" / "0.webp").unlink()
    mask.save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"has a mask that is \d+ of 255 at its brightest.* save white as 255"):
        load_images(str(mine), masking=Masking(str(tmp_path / "masks"), 0.1))


@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_pictures_whose_mask_the_frame_leaves_out_are_named(tmp_path, outside):
    mine = write_masked(tmp_path)
    edge = np.zeros((32, 48), np.uint8)
    edge[:, :6] = 255  # beside the square in the middle
    Image.fromarray(edge).save(tmp_path / "masks" / "2.webp", lossless=True)
    data = load_images(str(mine), masking=Masking(str(tmp_path / "masks"), outside))
    weights, names = loss_weights(data, Framing(32), torch.Size((4, 4, 4))), [e.name for e in data.examples]
    (line,) = out_of_sight(names, weights, outside)
    assert "leaves out all that the masks of 2.png show" in line
    assert out_of_sight(names, None, outside) == []


def test_opaque_pictures_are_learnt_whole_and_counted(tmp_path):
    mine = write_masked(tmp_path, alpha=True)
    Image.open(mine / "0.png").convert("RGB").save(mine / "0.png")
    data = load_images(str(mine), masking=ALPHA)
    assert data.notes == [f"1 of 6 pictures of {mine} is opaque, and so learnt whole"]
    assert counted(data, 0).min() == 1
    Image.new("RGBA", (48, 32), (9, 9, 9, 0)).save(mine / "1.png")
    with pytest.raises(UserError, match=r"1\.png in .* is transparent everywhere, so nothing of the picture would be"):
        load_images(str(mine), masking=ALPHA)
    with pytest.raises(UserError, match=r"data\.masks is alpha, but no picture of .* is transparent anywhere"):
        load_images(str(write_masked(tmp_path / "opaque")), masking=ALPHA)


def test_rows_of_a_data_set_have_masks_in_their_transparency_alone(tmp_path):
    mine = write_masked(tmp_path, alpha=True)
    paths = [str(mine / f"{i}.png") for i in range(6)]
    pictures = datasets.Dataset.from_dict({"image": paths, "text": ["ball"] * 6})
    pictures.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    data = load_images(str(tmp_path / "saved"), masking=ALPHA)
    assert counted(data, 0)[8:24, :16].min() == 1
    with pytest.raises(UserError, match=r"have no names, so no masks in a folder; say alpha"):
        load_images(str(tmp_path / "saved"), masking=Masking(str(tmp_path / "masks"), 0.1))


@pytest.mark.parametrize("framing", [Framing(32), Framing(32, True, 4), Framing(32, True, shape=(16, 24))])
def test_masks_are_framed_as_their_pictures(tmp_path, framing):
    """The square of each view is where the weights are."""
    data = load_images(str(write_masked(tmp_path)), masking=Masking(str(tmp_path / "masks"), 0.0))
    height, width = framing.height, framing.width
    weights = loss_weights(data, framing, torch.Size((4, height, width)))  # a place a pixel
    assert weights is not None
    for number, example in enumerate(data.examples):
        square = framing.pictures(example)[..., 0] > 145
        assert weights.shape[1] == len(square) == framing.views
        there = weights[number, :, 0].numpy() > 0
        assert (there == square).mean() > 0.97


def test_pictures_without_masks_have_no_weights(tmp_path):
    data = load_images(str(write_masked(tmp_path)))
    assert loss_weights(data, Framing(32), torch.Size((4, 4, 4))) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"outside_mask": 0.3}, r"data\.outside_mask is given without data\.masks"),
        ({"masks": "alpha", "outside_mask": 1.0}, r"data\.outside_mask is 1\.0; expected at least 0 and less than 1"),
        ({"masks": ""}, r"data\.masks is empty; expected alpha, a folder, or null"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        DataConfig(**settings)


def test_their_short_name_is_for_verbs_that_read_pictures():
    for verb in ("train", "bank", "pilot"):
        assert parse([verb, "mine", "--masks", "alpha"])[1].data.masks == "alpha"


def test_a_stream_has_none():
    with pytest.raises(UserError, match=r"data\.stream is true and data\.masks is given"):
        Recipe(data=DataConfig("x", stream=True, masks="alpha"))


def test_runs_without_masks_are_what_they_were():
    settings = identity_settings(Recipe())
    assert {"masks", "outside_mask"}.isdisjoint(settings["data"])
    masked = identity_settings(replace(Recipe(), data=DataConfig(masks="here")))
    assert (masked["data"]["outside_mask"], "masks" in masked["data"]) == (0.1, False)  # where they lie is no matter


def recipe_of(folder: Path, name: str, **data) -> Recipe:
    values = {
        "data": {
            **{"path": str(folder / "mine"), "cache": str(folder / "cache"), "holdout": 0.3, "resolution": 32},
            **{"flip": True, "masks": str(folder / "masks")},
            **data,
        },
        "adapter": {"rank": 2},
        "bank": {"size": 6, "steps": 1, "prompts": "empty"},
        "training": {"max_steps": 3, "batch_size": 5, "checkpoint_every": 2, "sample_every": 0, "validate_every": 3},
        "output": str(folder / name),
    }
    return fitted(Recipe.from_dict(values))


def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.output) / "pytorch_lora_weights.safetensors")


def same(one: Recipe, other: Recipe) -> bool:
    return all(torch.equal(weights_of(one)[name], value) for name, value in weights_of(other).items())


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("masked")
    write_masked(folder)
    recipe = recipe_of(folder, "run")
    train(recipe)
    return recipe


def test_white_masks_change_nothing_and_others_do_for_the_pictures_alone(masked: Recipe, tmp_path):
    write_masked(tmp_path)
    for i in range(6):
        Image.new("L", (48, 32), 255).save(tmp_path / "masks" / f"{i}.webp", lossless=True)
    plain, white = recipe_of(tmp_path, "plain", masks=None), recipe_of(tmp_path, "white")
    for recipe in (plain, white):
        train(recipe)
    assert same(plain, white)
    assert not same(plain, masked)
    first, unmasked = rows(masked)[0], rows(plain)[0]
    changed = {name for name in unmasked if first[name] != unmasked[name]}
    assert "target_loss" in changed
    assert "bank_loss" not in changed


def test_held_out_pictures_are_measured_with_their_masks(masked: Recipe, tmp_path):
    write_masked(tmp_path)
    plain = recipe_of(tmp_path, "plain", masks=None)
    train(plain)
    before, after = (run_record(recipe).losses for recipe in (plain, masked))
    assert all(a != b for a, b in zip(before["target"].base.losses, after["target"].base.losses, strict=True))
    assert before["bank"].base.losses == after["bank"].base.losses  # of the same weights
    one, other = (analyze(recipe, AnalysisConfig(rows=4, draws=1)) for recipe in (plain, masked))
    assert all(a != b for a, b in zip(one["target"]["loss"], other["target"]["loss"], strict=True))
    assert one["bank"] == other["bank"]


def test_a_masked_run_goes_on_bit_for_bit_and_not_under_other_masks(masked: Recipe, tmp_path):
    recipe = replace(masked, output=str(tmp_path))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    with pytest.raises(UserError, match="outside_mask"):
        train(resumed(replace(recipe, data=replace(recipe.data, outside_mask=0.3))))
    train(resumed(recipe))
    assert same(recipe, masked)


def test_a_controlnet_has_masks_too(tmp_path):
    write_masked(tmp_path)
    given = recipe_of(tmp_path, "run").to_dict()
    control = {"annotator": "supplied", "path": str(tmp_path / "masks"), "bank_condition": "blank"}
    kept = {name: given[name] for name in ("data", "bank", "training", "output")}
    recipe = Recipe.from_dict({"method": "controlnet", **kept, "control": {**control, "fidelity": {"every": 0}}})
    train(recipe)
    inputs = [json.loads(line) for line in (Path(recipe.output) / "inputs.jsonl").read_text().splitlines()]
    assert all(line["mask"] == line["condition"] for line in inputs)


def test_runs_with_other_masks_are_judged_side_by_side(masked: Recipe, tmp_path):
    folder = Path(masked.output).parent
    plain = replace(masked, output=str(folder / "plain"), data=replace(masked.data, masks=None))
    train(plain)
    request = Evaluation([plain.output, masked.output], output=str(tmp_path), pictures=5, steps=1, seeds=[0])
    assert len(evaluate(request)["sides"]) == 2
    other = recipe_of(tmp_path, "other", masks=None)
    write_masked(tmp_path, 7)
    train(other)
    with pytest.raises(UserError, match="it was tuned on other pictures than"):
        evaluate(replace(request, runs=[masked.output, other.output], output=str(tmp_path / "judged")))


def test_verify_says_which_folder_was_moved_and_checks_the_rest(masked: Recipe):
    masks = Path(str(masked.data.masks))
    masks.rename(masks.with_name("elsewhere"))
    found = verify(VerifyRequest(masked.output))
    moved = verify(VerifyRequest(masked.output, moved=Moved(masks=str(masks.with_name("elsewhere")))))
    masks.with_name("elsewhere").rename(masks)
    assert moved["status"] == "same"
    said = json.dumps(found)
    assert "--moved.masks" in said
    assert "--moved.data" not in said


def test_verify_finds_a_mask_that_changed(masked: Recipe):
    assert verify(VerifyRequest(masked.output))["status"] == "same"
    mask = Path(str(masked.data.masks)) / "4.webp"
    before = mask.read_bytes()
    Image.new("L", (48, 32), 255).save(mask, lossless=True)
    found = verify(VerifyRequest(masked.output))
    mask.write_bytes(before)
    assert found["status"] == "changed"
    assert "its mask" in json.dumps(found)
