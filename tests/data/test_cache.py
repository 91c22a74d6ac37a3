"""Cached latents and embeddings are what the pipeline itself would compute, and are computed once."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.framing import Framing
from difftuning_control.data.latents import LatentMoments, cached_moments
from difftuning_control.data.sources import load_images
from difftuning_control.families.loading import family_of
from difftuning_control.families.sd import StableDiffusion
from support.damages import DAMAGES
from support.pictures import write_pictures
from support.tensors import in_memory
from support.tiny_sd import tiny_pipeline

CENTRE = Framing(16)
PROMPTS = ["red 1", "", "red", "red 1", "a red square"]


class Calls:
    """Counts the forward passes of a module, and the items that `advance` is told of."""

    def __init__(self, module: nn.Module):
        self.passes = self.items = 0
        module.register_forward_hook(self.passed)

    def passed(self, *_) -> None:
        self.passes += 1

    def advance(self, count: int) -> None:
        self.items += count


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data(pictures: Path):
    return load_images(str(pictures))


def moments_of(
    family: StableDiffusion, folder: Path, cache: Path, framing: Framing = CENTRE, **settings
) -> tuple[LatentMoments, Calls]:
    calls = Calls(family.pipe.vae.encoder)
    return cached_moments(family, load_images(str(folder)), framing, cache, calls.advance, **settings), calls


def embeddings_of(family: StableDiffusion, cache: Path, prompts: list[str] = PROMPTS):
    calls = Calls(family.pipe.text_encoder)
    return cached_embeddings(family, prompts, cache, calls.advance), calls


def assert_equal_moments(found: LatentMoments, expected: LatentMoments, **tolerance) -> None:
    torch.testing.assert_close((found.mean[:], found.std[:]), (expected.mean[:], expected.std[:]), **tolerance)


def write_noise(path: Path, height: int, width: int) -> torch.Tensor:
    """A picture without any symmetry, and its caption."""
    pixels = torch.randint(256, (height, width, 3), generator=seeded()).byte()
    Image.fromarray(pixels.numpy()).save(path)
    path.with_suffix(".txt").write_text("noise")
    return pixels


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_cached_moments_are_the_encoders(family, data, pictures, tmp_path, batch_size):
    moments, calls = moments_of(family, pictures, tmp_path, batch_size=batch_size)
    mean, std = family.encode_moments(torch.cat([CENTRE.pixels(e) for e in data.examples]))
    assert_equal_moments(moments, LatentMoments(mean[:, None], std[:, None]), atol=1e-5, rtol=1e-5)
    assert (len(moments), moments.views, calls.items) == (8, 1, 8)


def test_a_draw_is_the_posteriors_own_sample_for_the_same_noise(family, data, pictures, tmp_path):
    moments, _ = moments_of(family, pictures, tmp_path)
    pixels = torch.cat([CENTRE.pixels(e) for e in data.examples])
    sample = family.pipe.vae.encode(pixels).latent_dist.sample(seeded())
    drawn = moments.draw(
        torch.arange(8), torch.zeros(8, dtype=torch.long), torch.randn(sample.shape, generator=seeded())
    )
    torch.testing.assert_close(drawn, sample, atol=1e-6, rtol=1e-6)


def test_draws_have_the_mean_and_the_variance_of_uncached_encoding(family, data, pictures, tmp_path):
    count, item = 2000, 5
    moments, _ = moments_of(family, pictures, tmp_path)
    posterior = family.pipe.vae.encode(CENTRE.pixels(data.examples[item])).latent_dist
    generator = seeded(1)
    fresh = torch.cat([posterior.sample(generator) for _ in range(count)])
    rows, views = torch.full((count,), item), torch.zeros(count, dtype=torch.long)
    drawn = moments.draw(rows, views, torch.randn(fresh.shape, generator=seeded(2)))
    error = fresh.std(0) * (2 / count) ** 0.5
    assert ((drawn.mean(0) - fresh.mean(0)).abs() < 5 * error).all()
    assert ((drawn.var(0) / fresh.var(0)).log().abs() < 5 * (4 / count) ** 0.5).all()


def test_a_second_call_reads_the_file_and_encodes_nothing(family, pictures, tmp_path):
    first, calls = moments_of(family, pictures, tmp_path)
    assert calls.passes > 0
    second, calls = moments_of(family, pictures, tmp_path)
    assert (calls.passes, calls.items) == (0, 8)
    assert_equal_moments(second, first, atol=0, rtol=0)


def test_interrupted_encoding_goes_on_where_its_files_end(family, data, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("difftuning_control.data.latents.SHARD", 3)
    whole, _ = moments_of(family, pictures, tmp_path / "whole", batch_size=1)

    def stop_at_the_fifth(count: int) -> None:
        stop_at_the_fifth.items += count
        if stop_at_the_fifth.items == 5:
            raise KeyboardInterrupt

    stop_at_the_fifth.items = 0
    with pytest.raises(KeyboardInterrupt):
        cached_moments(family, data, CENTRE, tmp_path / "parts", stop_at_the_fifth, batch_size=1)
    resumed, calls = moments_of(family, pictures, tmp_path / "parts", batch_size=1)
    assert (calls.passes, calls.items) == (5, 8)
    assert_equal_moments(resumed, whole, atol=0, rtol=0)


def other_picture(folder: Path, pipe) -> None:
    Image.new("RGB", (16, 16), "navy").save(folder / "3.png")


def other_caption(folder: Path, pipe) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("red 3", "blue 3"))


def other_weights(component: str):
    def change(folder: Path, pipe) -> None:
        next(getattr(pipe, component).parameters()).data.add_(0.1)

    return change


def other_precision(folder: Path, pipe) -> None:
    pipe.to(torch.bfloat16)


def nothing(folder: Path, pipe) -> None:
    pass


@pytest.mark.sample("unet")
@pytest.mark.parametrize(
    ("change", "framing", "again"),
    [
        (other_picture, CENTRE, True),
        (other_weights("vae"), CENTRE, True),
        (other_precision, CENTRE, True),
        (nothing, Framing(32), True),
        (nothing, Framing(16, flip=True), True),
        (nothing, Framing(16, crops=2), True),
        (other_caption, CENTRE, False),
        (other_weights("unet"), CENTRE, False),
        (other_weights("text_encoder"), CENTRE, False),
        (nothing, Framing(16, seed=7), False),
    ],
    ids=[
        "picture",
        "vae",
        "dtype",
        "resolution",
        "flip",
        "crops",
        "caption",
        "unet",
        "text_encoder",
        "seed of no crop",
    ],
)
def test_pictures_are_encoded_again_when_and_only_when_their_latents_would_differ(
    family, tmp_path, change, framing, again
):
    folder = write_pictures(tmp_path / "data")
    moments_of(family, folder, tmp_path / "cache")
    change(folder, family.pipe)
    _, calls = moments_of(family_of(family.pipe), folder, tmp_path / "cache", framing)
    assert (calls.passes > 0) == again


def test_mirrored_views_are_encodings_of_mirrored_pixels(family, tmp_path):
    write_noise(tmp_path / "0.png", 16, 16)
    write_noise(tmp_path / "1.png", 16, 24)
    moments, _ = moments_of(family, tmp_path, tmp_path / "cache", Framing(16, flip=True))
    pixels = torch.cat([CENTRE.pixels(e) for e in load_images(str(tmp_path)).examples])
    for view, shown in enumerate((pixels, pixels.flip(3))):
        mean, std = family.encode_moments(shown)
        found = LatentMoments(moments.mean[:][:, view], moments.std[:][:, view])
        assert_equal_moments(found, LatentMoments(mean, std), atol=1e-5, rtol=1e-5)


def test_crops_are_windows_of_the_picture_at_places_that_depend_on_the_seed(tmp_path):
    pixels = write_noise(tmp_path / "wide.png", 16, 60)
    (example,) = load_images(str(tmp_path)).examples
    whole = (pixels.float() / 127.5 - 1).permute(2, 0, 1)
    windows = whole.unfold(2, 16, 1).permute(2, 0, 1, 3)

    def places(framing: Framing) -> list[int]:
        views = framing.pixels(example)
        assert views.shape == (framing.views, 3, 16, 16)
        return [int((windows - view).abs().flatten(1).amax(1).argmin()) for view in views if (windows - view).any()]

    found = places(Framing(16, crops=4))
    assert len(found) == 4
    assert len(set(found)) > 1
    assert all(torch.allclose(v, windows[p], atol=1e-6) for v, p in zip(Framing(16, crops=4).pixels(example), found))
    assert places(Framing(16, crops=4)) == found
    assert places(Framing(16, crops=4, seed=1)) != found
    assert places(CENTRE) == [22]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    "cached", [lambda f, p, c: moments_of(f, p, c), lambda f, p, c: embeddings_of(f, c)], ids=["moments", "prompts"]
)
def test_a_damaged_file_is_made_again(family, pictures, tmp_path, cached, damage):
    cached(family, pictures, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    _, calls = cached(family, pictures, tmp_path)
    assert calls.passes > 0
    assert path.read_bytes() == whole


# --- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 32])
def test_cached_embeddings_are_the_stock_pipelines(family, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(type(family), "prompts_at_once", at_once)
    embeddings = cached_embeddings(family, PROMPTS, tmp_path, lambda count: None)
    stock = tiny_pipeline()
    expected, empty = stock.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[""] * len(PROMPTS))
    torch.testing.assert_close(embeddings.rows(PROMPTS)["prompt_embeds"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeddings.rows([""])["prompt_embeds"], empty[:1], atol=1e-5, rtol=1e-5)


def test_no_more_prompts_are_encoded_at_once_than_the_family_takes(family, tmp_path, monkeypatch):
    rows: list[int] = []
    encode = family.encode_prompts
    monkeypatch.setattr(family, "encode_prompts", lambda prompts: rows.append(len(prompts)) or encode(prompts))
    monkeypatch.setattr(type(family), "prompts_at_once", 3)
    cached_embeddings(family, [f"red {i}" for i in range(7)], tmp_path, lambda count: None)
    assert rows == [3, 3, 2]


def test_each_prompt_is_stored_once_and_the_empty_one_always(family, tmp_path):
    embeddings, _ = embeddings_of(family, tmp_path, ["red 1", "red 2", "red 1"])
    assert embeddings.index == {"": 0, "red 1": 1, "red 2": 2}
    assert len(embeddings.tensors["prompt_embeds"]) == 3


@pytest.mark.parametrize(
    ("change", "prompts", "again"),
    [
        (nothing, PROMPTS, False),
        (other_weights("unet"), PROMPTS, False),
        (other_weights("vae"), PROMPTS, False),
        (other_weights("text_encoder"), PROMPTS, True),
        (other_precision, PROMPTS, True),
        (nothing, [*PROMPTS, "blue"], True),
    ],
    ids=["nothing", "unet", "vae", "text_encoder", "dtype", "prompts"],
)
def test_prompts_are_encoded_again_when_and_only_when_their_embeddings_would_differ(
    family, tmp_path, change, prompts, again
):
    first, _ = embeddings_of(family, tmp_path)
    change(tmp_path, family.pipe)
    second, calls = embeddings_of(family_of(family.pipe), tmp_path, prompts)
    assert (calls.passes > 0) == again
    assert calls.items == len({"", *prompts})
    if not again:
        torch.testing.assert_close(in_memory(second), in_memory(first), atol=0, rtol=0)


def test_a_cache_that_was_deleted_is_made_again_the_same(family, pictures, tmp_path):
    first, _ = moments_of(family, pictures, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    second, _ = moments_of(family, pictures, tmp_path / "cache")
    assert_equal_moments(second, first, atol=0, rtol=0)
