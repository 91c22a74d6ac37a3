"""The control contract: a picture has one condition on every path, and a spec belongs to the weights it lies beside."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from difftuning_control.data.conditions import cached_conditions, conditions_of
from difftuning_control.data.control_spec import SPEC_FILE, Conditioner, ControlSpec
from difftuning_control.data.framing import Framing
from difftuning_control.data.images import frame
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.families.control import to_tensor
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.control_inputs import build_spec
from support.controls import OUTLINE, ignore, on_path, prepared, rows_of, write_photos

SPECS = {
    "the defaults": ControlSpec(),
    "with parameters": ControlSpec("canny", {"low_threshold": 50, "high_threshold": 120.5}, resolution=64),
    "with weights": ControlSpec("hed", {"safe": True}, "/some/weights", 512, (-1.0, 1.0), "bgr"),
    "a function": ControlSpec("somewhere:function", {"name": "żółw", "levels": [1, 2]}, resize="box"),
    "supplied": ControlSpec("supplied", resize="nearest"),
}


@contextmanager
def given_to(controlnet: Any) -> Iterator[list[Tensor]]:
    """Collects the conditions that a ControlNet is called with."""
    found: list[Tensor] = []

    def collect(_: Any, args: Any, options: dict[str, Any]) -> None:
        found.append((options["controlnet_cond"] if "controlnet_cond" in options else args[3]).clone())

    hook = controlnet.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


# --- the spec beside its weights ------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights with the spec that was saved with them."""
    folder = tmp_path / "controlnet"
    folder.mkdir()
    save_file({"weight": torch.arange(6.0)}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    ControlSpec("canny", resolution=16).save(folder)
    return folder


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_comes_back_as_it_was_saved(weights, spec):
    spec.save(weights)
    assert ControlSpec.load(weights) == ControlSpec.load(str(weights)) == spec
    assert not [p for p in weights.iterdir() if p.name.startswith(".")]


def flip_a_byte(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_weights(folder: Path) -> None:
    save_file({"weight": torch.arange(1, 7.0)}, folder / "diffusion_pytorch_model.safetensors")


def add_weights(folder: Path) -> None:
    save_file({"weight": torch.zeros(1)}, folder / "other.safetensors")


def rename_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "other.safetensors")


def take_weights_away(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (flip_a_byte, "diffusion_pytorch_model.safetensors differ"),
        (replace_weights, "diffusion_pytorch_model.safetensors differ"),
        (add_weights, "other.safetensors differ"),
        (rename_weights, "diffusion_pytorch_model.safetensors, other.safetensors differ"),
        (take_weights_away, "diffusion_pytorch_model.safetensors differ"),
    ],
)
def test_a_spec_beside_other_weights_is_refused_until_it_is_written_anew(weights, change, differing):
    spec = ControlSpec.load(weights)
    change(weights)
    with pytest.raises(UserError, match=r"was written for other weights") as error:
        ControlSpec.load(weights)
    assert f"({differing})" in str(error.value)
    spec.save(weights)
    assert ControlSpec.load(weights) == spec


def test_of_several_variants_one_may_have_been_downloaded(weights):
    half = weights / "diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(b"half the size")
    spec = ControlSpec(annotator="canny")
    spec.save(weights)
    (weights / "diffusion_pytorch_model.safetensors").unlink()
    assert ControlSpec.load(weights) == spec
    half.write_bytes(b"of another model")
    with pytest.raises(UserError, match="was written for other weights"):
        ControlSpec.load(weights)


def test_other_files_beside_the_weights_do_not_matter(weights):
    (weights / "config.json").write_text('{"a": 1}')
    (weights / "README.md").write_text("mine")
    assert ControlSpec.load(weights) == ControlSpec("canny", resolution=16)


def test_a_folder_without_a_spec_is_refused_and_says_how_to_write_one(weights):
    (weights / SPEC_FILE).unlink()
    with pytest.raises(UserError, match=rf"has no {SPEC_FILE}.*write one: ControlSpec\(annotator=…\)\.save\(folder\)"):
        ControlSpec.load(weights)
    with pytest.raises(UserError, match="has no"):
        ControlSpec.load(weights / "nowhere")


def values(**changes: Any) -> Callable[[dict[str, Any]], str]:
    """A spec's text with other values; one of `...` is left out."""
    return lambda found: json.dumps({k: v for k, v in (found | changes).items() if v is not ...})


DAMAGED: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
    "empty": lambda found: "",
    "cut short": lambda found: json.dumps(found)[:-9],
    "not UTF-8": lambda found: json.dumps(found | {"weights": "grün"}, ensure_ascii=False).encode("latin-1"),
    "a list": lambda found: json.dumps([found]),
    "a number": lambda found: "3",
    "an unknown key": values(resample="box"),
    "another format": values(format=2),
    "no format": values(format=...),
    "no digests": values(weights_files=...),
    "no value range": values(value_range=...),
    "a range of three": values(value_range=[0, 0.5, 1]),
    "a range of one number": values(value_range=1),
    "a resolution in words": values(resolution="large"),
    "a list for a name": values(resize=["box"]),
    "no annotator": values(annotator=None),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_spec_is_refused_in_one_sentence(weights, damage):
    path = weights / SPEC_FILE
    text = damage(json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        ControlSpec.load(weights)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert str(error.value).endswith("; copy the one that was saved with the weights.")


@pytest.mark.parametrize("files", [None, [], "all"], ids=str)
def test_a_spec_whose_digests_are_damaged_is_refused_in_one_sentence(weights, files):
    path = weights / SPEC_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_files": files}))
    with pytest.raises(UserError, match="cannot be read"):
        ControlSpec.load(weights)


def test_a_value_out_of_range_in_a_file_is_told_as_anywhere(weights):
    path = weights / SPEC_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotator": "cany"}))
    with pytest.raises(UserError, match="the annotator 'cany' is unknown; expected canny"):
        ControlSpec.load(weights)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"resize": "cubic"}, "the control's resize is 'cubic'; expected one of lanczos, box, nearest."),
        ({"channel_order": "grb"}, "the control's channel_order is 'grb'; expected one of rgb, bgr."),
        ({"crop": "corner"}, "the control's crop is 'corner'; expected one of centre."),
        ({"resolution": 7}, "the control's resolution is 7; expected at least 8 pixels."),
        ({"resolution": -64}, "the control's resolution is -64; expected at least 8 pixels."),
        ({"value_range": (1.0, 0.0)}, "the control's value range is 1.0 to 0.0; expected a rising one"),
        ({"value_range": (1.0, 1.0)}, "the control's value range is 1.0 to 1.0; expected a rising one"),
        ({"value_range": (0.0, float("nan"))}, "the control's value range is 0.0 to nan; expected a rising one"),
        ({"annotator": "cany"}, "the annotator 'cany' is unknown; expected canny"),
        ({"annotator": "midass"}, "the annotator 'midass' is unknown; expected midas."),
        ({"annotator": "supplied", "params": {"a": 1}}, "a supplied condition has no annotator; leave out its params"),
        ({"annotator": "supplied", "weights": "x"}, "a supplied condition has no annotator; leave out its params and"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_a_spec_that_cannot_be_meant_is_refused(settings, expected):
    with pytest.raises(UserError) as error:
        ControlSpec(**settings)
    assert expected in str(error.value)


@pytest.mark.parametrize("settings", [{"resolution": 8}, {"value_range": (-1.0, 1.0)}, {"annotator": "a.b:c"}])
def test_a_spec_at_the_edge_of_its_ranges_is_taken(settings):
    assert asdict(ControlSpec(**settings)) == asdict(ControlSpec()) | settings


@pytest.mark.parametrize(
    ("annotator", "kind"),
    [
        ("canny", "edges"),
        ("hed", "edges"),
        ("zoe", "depth"),
        ("normalbae", "normals"),
        ("sam", "masks"),
        ("openpose", "similarity"),
        ("shuffle", "similarity"),
        ("some:function", "similarity"),
        ("supplied", "similarity"),
    ],
)
def test_conditions_are_compared_by_what_they_show(annotator, kind):
    assert ControlSpec(annotator).kind == kind


def test_the_channel_order_of_the_controlnet_is_in_the_spec(recipe, family):
    recipe = replace(recipe, method="controlnet", control=ControlConfig(resize="box", params={"low_threshold": 7}))
    for order in ("rgb", "bgr"):
        family.controlnet = ControlNetModel.from_unet(
            family.denoiser, controlnet_conditioning_channel_order=order, conditioning_embedding_out_channels=(16, 256)
        )
        expected = ControlSpec("canny", {"low_threshold": 7}, None, 16, (0.0, 1.0), order, "box")
        assert build_spec(recipe, family, 16) == expected


# --- one condition on every path ------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def outline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a function of the user's own: edges, all or nothing."""
    return f"{on_path(monkeypatch, tmp_path)}:outline"


@pytest.fixture(params=["canny", "outline", "soft"])
def annotator(request: pytest.FixtureRequest, outline: str) -> str:
    """One of controlnet_aux, and two functions; `soft` has colours of all levels."""
    return request.param if request.param == "canny" else outline.replace("outline", request.param)


def control_recipe(recipe: Recipe, photos: Path, annotator: str, **data: Any) -> Recipe:
    control = ControlConfig(annotator, fidelity=FidelityConfig(every=2, size=2, steps=2))
    data = replace(recipe.data, path=str(photos), **data)
    return replace(recipe, method="controlnet", control=control, data=data)


@pytest.mark.sample("soft")
def test_a_picture_has_one_condition_on_every_path(recipe, photos, tmp_path, annotator):
    recipe = control_recipe(recipe, photos, annotator)
    family, conditioner, inputs = prepared(recipe)
    held_out, probe = inputs.held_out, inputs.control.probe
    used = [conditioner.prepare(e.load()) for e in held_out.examples]
    expected = rows_of(used)
    assert expected.flatten(1).any(1).all()
    trained = cached_conditions(conditioner, held_out, Framing(16), tmp_path / "other", ignore)
    paths = {
        "training": trained.rows(range(len(trained))),
        "validation": inputs.validation["target"].batch.conditioning["control"],
        "shown": inputs.control.shown,
        "probe, drawn under": probe.control,
        "probe, compared with": probe.asked,
        "evaluation": conditions_of(conditioner, held_out, 16, ignore),
    }
    for name, found in paths.items():
        assert found.dtype == torch.uint8, name
        assert torch.equal(found, expected), name
    stock = family.control_pipeline().control_image_processor.preprocess(used)
    assert torch.equal(stock, to_tensor(expected, family.condition_range))


@pytest.mark.wide
def test_the_controlnet_is_given_the_same_tensor_in_training_in_sampling_and_by_the_stock_pipeline(
    recipe, photos, outline
):
    family, conditioner, inputs = prepared(control_recipe(recipe, photos, outline.replace("outline", "soft")))
    held_out = inputs.held_out.examples
    used = [conditioner.prepare(e.load()) for e in held_out]
    batch = inputs.validation["target"].batch
    with given_to(family.controlnet) as trained, torch.no_grad():
        family.predict(family.model, batch.latents, torch.tensor([5, 900]), batch.conditioning)
    with given_to(family.controlnet) as probed:
        inputs.control.probe.measure(family)
    with given_to(family.controlnet) as uncontrolled:
        inputs.control.probe.measure(family, controlled=False)
    stock = StableDiffusionControlNetPipeline(**family.pipe.components, controlnet=family.controlnet)
    with given_to(stock.controlnet) as drawn:
        stock([e.caption for e in held_out], image=used, num_inference_steps=2, guidance_scale=1.0)
    with given_to(stock.controlnet) as guided:
        stock([e.caption for e in held_out], image=used, num_inference_steps=2, guidance_scale=3.0)
    assert (len(trained), len(probed), len(uncontrolled), len(drawn), len(guided)) == (1, 2, 0, 2, 2)
    assert len(trained[0].unique()) > 20
    for found in (*probed, *drawn, *(half for both in guided for half in both.chunk(2))):
        assert torch.equal(found, trained[0])


def test_every_cropped_and_mirrored_view_is_annotated_as_it_is_trained_on(photos, tmp_path, annotator):
    conditioner = Conditioner(ControlSpec(annotator, resolution=16))
    data, framing = load_images(str(photos)), Framing(16, flip=True, crops=3)
    found = cached_conditions(conditioner, data, framing, tmp_path, ignore)
    for i, example in enumerate(data.examples):
        for view, picture in enumerate(framing.pictures(example)):
            expected = torch.from_numpy(conditioner.condition(picture)).permute(2, 0, 1)
            assert torch.equal(found.row(i, view), expected)
    wide = next(i for i, e in enumerate(data.examples) if e.load().size != (16, 16))
    assert len({found.row(wide, view).numpy().tobytes() for view in range(framing.views)}) == framing.views


def test_the_tensor_of_a_condition_lies_in_the_range_that_is_asked_for():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_tensor(levels), torch.from_numpy(np.arange(256, dtype=np.uint8).astype(np.float32) / 255.0))
    found = to_tensor(levels, (-1.0, 1.0))
    assert (found[0], found[-1], found.dtype) == (-1, 1, torch.float32)
    torch.testing.assert_close(found, torch.linspace(-1, 1, 256))


# --- preparing a photo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 16), (16, 40), (32, 32), (None, 24), (None, None)], ids=str)
def test_a_photo_of_any_size_is_prepared_at_the_size_that_is_asked_for(photos, outline, size):
    conditioner = Conditioner(ControlSpec(outline, resolution=32))
    height, width = (side or 32 for side in size)
    for path in photos.glob("*.png"):
        photo = Image.open(path)
        found = conditioner.prepare(photo, *size)
        assert (found.mode, found.size) == ("RGB", (width, height))
        assert np.array_equal(found, conditioner.condition(frame(photo, height, width)))


@pytest.mark.parametrize("annotator", ["outline", "supplied"])
@pytest.mark.parametrize("resize", ["lanczos", "box", "nearest"])
def test_a_condition_that_is_ready_is_only_framed(photos, outline, annotator, resize):
    conditioner = Conditioner(ControlSpec(outline if annotator == "outline" else annotator, resize=resize))
    way = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
    condition = Image.open(photos / "0.png")
    for size in ((20, 24), (48, 32)):
        ready = annotator == "outline"
        found = conditioner.prepare(condition, *size, ready=ready)
        assert np.array_equal(found, frame(condition, *size, resample=way[resize]))
    framed = conditioner.prepare(condition, 40, 24, ready=True)
    assert np.array_equal(framed, condition)
    assert np.array_equal(conditioner.prepare(framed, 40, 24, ready=True), framed)


def rgba(path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12] = (200, 10, 10, 255)
    Image.fromarray(pixels).save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((24, 16), 90).save(path, exif=exif)


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.linspace(0, 60000, 256).reshape(16, 16).astype(np.uint16)).save(path)


@pytest.mark.parametrize("write", [rgba, turned, sixteen_bit])
def test_an_unusual_photo_is_prepared_for_use_as_it_is_for_training(tmp_path, monkeypatch, write):
    name = on_path(monkeypatch, tmp_path, "def same(picture):\n    return picture.copy()\n")
    conditioner = Conditioner(ControlSpec(f"{name}:same", resolution=16))
    write(tmp_path / "photo.png")
    data = load_images(str(tmp_path), default_caption="red")
    trained = conditions_of(conditioner, data, 16, ignore)
    assert torch.equal(rows_of([conditioner.prepare(Image.open(tmp_path / "photo.png"))]), trained)


# --- annotators of the user's own -----------------------------------------------------------------------------------

GIVES = """
import numpy as np

def grey(picture): return picture[:, :, 0]
def colour(picture): return picture[:, :, ::-1]
def one_channel(picture): return picture[:, :, :1]
def truth(picture): return picture[:, :, 1] > 100
def floats(picture): return picture.astype(np.float32) / 255
def doubles(picture): return picture[:, :, 2] / 255
def halves(picture): return (picture[:, :, 0] > 100).astype(np.float16)
def image(picture):
    from PIL import Image
    return Image.fromarray(picture).convert("L")

def too_high(picture): return picture / 200
def negative(picture): return picture / 255 - 0.25
def not_a_number(picture): return picture / 255 * np.nan
def integers(picture): return picture.astype(np.int32)
def turned(picture): return picture[:, :-1]
def four(picture): return np.zeros((*picture.shape[:2], 4), np.uint8)
def first_channels(picture): return picture.transpose(2, 0, 1)
def number(picture): return 3
def nothing(picture): return None
def batch(picture): return picture[None]

def scaled(picture, factor=1.0): return (picture * factor).astype(np.uint8)
constant = 3
"""


@pytest.fixture
def gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    return on_path(monkeypatch, tmp_path, GIVES)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


EXPECTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grey": lambda p: p[:, :, [0]],
    "colour": lambda p: p[:, :, ::-1],
    "one_channel": lambda p: p[:, :, [0]],
    "truth": lambda p: np.where(p[:, :, [1]] > 100, 255, 0),
    "floats": lambda p: p,
    "doubles": lambda p: p[:, :, [2]],
    "halves": lambda p: np.where(p[:, :, [0]] > 100, 255, 0),
    "image": lambda p: np.asarray(Image.fromarray(p).convert("L"))[:, :, None],
}


@pytest.mark.parametrize("function", EXPECTED)
def test_what_a_function_may_give(gives, picture, function):
    found = Conditioner(ControlSpec(f"{gives}:{function}")).condition(picture)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, picture.shape, True)
    assert np.array_equal(found, np.broadcast_to(EXPECTED[function](picture), picture.shape))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("too_high", "gave float64 values from 0 to 1.275; expected uint8, or floats from 0 to 1."),
        ("negative", "gave float64 values from -0.25 to 0.75; expected uint8, or floats from 0 to 1."),
        ("not_a_number", "gave float64 values from nan to nan; expected uint8, or floats from 0 to 1."),
        ("integers", "gave int32 values from 0 to 255; expected uint8, or floats from 0 to 1."),
        ("turned", "gave (12, 19, 3) for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
        ("four", "gave (12, 20, 4) for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
        ("first_channels", "gave (3, 12, 20) for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
        ("number", "gave () for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
        ("nothing", "gave () for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
        ("batch", "gave (1, 12, 20, 3) for a picture of (12, 20, 3); expected (H, W) or (H, W, 3)."),
    ],
)
def test_what_a_function_may_not_give_is_named(gives, picture, function, expected):
    picture[0, 0], picture[0, 1] = 0, 255
    with pytest.raises(UserError) as error:
        Conditioner(ControlSpec(f"{gives}:{function}")).condition(picture)
    assert str(error.value) == f"the annotator {gives}:{function} {expected}"


def test_a_function_is_given_its_parameters(gives, picture):
    found = Conditioner(ControlSpec(f"{gives}:scaled", {"factor": 0.5})).condition(picture)
    assert np.array_equal(found, picture // 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module:function", "cannot be imported (No module named 'no_such_module'); expected package.module:"),
        ("GIVES:no_such_function", "no_such_function"),
        ("GIVES:", "cannot be imported"),
        (":function", "cannot be imported (Empty module name)"),
        ("GIVES:constant", "is a int; expected a function."),
    ],
)
def test_a_function_that_is_not_there_is_refused(gives, name, expected):
    conditioner = Conditioner(ControlSpec(name.replace("GIVES", gives)))
    for ask in (conditioner.load, lambda: conditioner.fingerprint):
        with pytest.raises(UserError) as error:
            ask()
        assert expected in str(error.value)
        assert str(error.value).startswith(f"the annotator {conditioner.spec.annotator} ")


def test_a_function_by_a_relative_name_is_refused():
    with pytest.raises(UserError, match="cannot be imported"):
        Conditioner(ControlSpec(".module:function")).load()


def test_a_supplied_condition_cannot_be_made(picture):
    with pytest.raises(UserError, match="no annotator could make it"):
        Conditioner(ControlSpec("supplied")).condition(picture)


def test_annotators_with_a_network_run_in_one_thread():
    workers = {name: Conditioner(ControlSpec(name)).default_workers for name in ("canny", "hed", "a:b", "supplied")}
    assert workers == {"canny": None, "hed": 1, "a:b": None, "supplied": None}


def test_a_function_may_write_into_its_picture_and_changes_nobody_elses(monkeypatch, tmp_path, picture):
    name = on_path(monkeypatch, tmp_path, "def drawn(picture):\n    picture[:2] = 9\n    return picture\n")
    conditioner = Conditioner(ControlSpec(f"{name}:drawn", resolution=16))
    before, found = picture.copy(), conditioner.condition(picture)
    assert (found[:2] == 9).all()
    assert np.array_equal(picture, before)
    assert (np.array(conditioner.prepare(Image.fromarray(picture)))[:2] == 9).all()


def test_a_condition_is_an_array_of_its_own(gives, picture):
    found = Conditioner(ControlSpec(f"{gives}:scaled")).condition(picture)
    assert found.flags.writeable  # or torch.from_numpy warns of undefined behaviour


def test_mixed_precision_changes_no_condition(monkeypatch, tmp_path, picture):
    source = """
import torch

def blurred(picture):
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    found = torch.nn.functional.conv2d(pixels, torch.full((1, 3, 3, 3), 1 / 27), padding=1)
    return found[0, 0].clamp(0, 1).numpy()
"""
    conditioner = Conditioner(ControlSpec(f"{on_path(monkeypatch, tmp_path, source)}:blurred"))
    expected = conditioner.condition(picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(conditioner.condition(picture), expected)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def fingerprint(spec: ControlSpec) -> str:
    return Conditioner(spec).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"least": 31}},
        {"resolution": 24},
        {"resize": "box"},
        {"channel_order": "bgr"},
        {"annotator": "supplied"},
    ],
    ids=str,
)
def test_another_spec_has_another_fingerprint(outline, change):
    spec = ControlSpec(outline)
    assert fingerprint(replace(spec, **change)) != fingerprint(spec) == fingerprint(ControlSpec(outline))


def test_the_range_of_the_tensor_changes_no_stored_condition(outline):
    spec = ControlSpec(outline)
    assert fingerprint(replace(spec, value_range=(-1.0, 1.0))) == fingerprint(spec)


def reimported(name: str) -> Any:
    sys.modules.pop(name)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_the_fingerprint_changes_with_the_source_of_a_function(monkeypatch, tmp_path):
    name = on_path(monkeypatch, tmp_path)
    spec = ControlSpec(f"{name}:outline")
    before = fingerprint(spec)
    reimported(name)
    assert fingerprint(spec) == before
    (tmp_path / f"{name}.py").write_text(OUTLINE.replace("least=30", "least=30000"))
    reimported(name)
    assert fingerprint(spec) != before


def test_the_fingerprint_changes_with_what_a_function_calls_in_its_module(monkeypatch, tmp_path):
    source = "LEVEL = 1000\n\ndef half(p):\n    return p // 2\n\ndef made(p):\n    return half(p) + LEVEL\n"
    name = on_path(monkeypatch, tmp_path, source)
    before = fingerprint(ControlSpec(f"{name}:made"))
    (tmp_path / f"{name}.py").write_text(source.replace("p // 2", "p // 300"))
    reimported(name)
    assert fingerprint(ControlSpec(f"{name}:made")) != before


def test_the_fingerprint_changes_with_the_weights_of_an_annotator_and_not_with_their_place(tmp_path):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, content in zip(folders, (b"1", b"1", b"2")):
        folder.mkdir()
        (folder / "ControlNetHED.pth").write_bytes(content)
    one, same, other = (fingerprint(ControlSpec("hed", weights=str(folder))) for folder in folders)
    assert one == same != other


@pytest.mark.parametrize("kind", ["instance", "partial"])
def test_the_fingerprint_of_a_callable_object_is_the_same_in_every_process(monkeypatch, tmp_path, kind):
    source = """
from functools import partial

class Same:
    def __call__(self, picture):
        return picture

def scaled(picture, factor):
    return picture * factor

instance, partial = Same(), partial(scaled, factor=1)
"""
    name = on_path(monkeypatch, tmp_path, source)
    before, kept = fingerprint(ControlSpec(f"{name}:{kind}")), sys.modules[name]
    assert reimported(name) is not kept  # which keeps its objects' addresses
    assert fingerprint(ControlSpec(f"{name}:{kind}")) == before
