"""A knowledge bank depends on its request and its base alone, and is refused where either differs."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.framing import Framing
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.objective.rows import draw_items
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.system.processes import Share
from support.pictures import write_pictures
from support.tiny_sd import tiny_pipeline

REQUEST = BankRequest(("red 1", "red 2", "a blue square"), size=7, steps=2, resolution=16, seed=3)


def build(folder: Path, request: BankRequest = REQUEST, seed: int = 0, **settings) -> KnowledgeBank:
    """A bank of the tiny model, freshly made from its seed."""
    return KnowledgeBank.build(family_of(tiny_pipeline(seed)), folder, request, **{"batch_size": 2, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBank:
    return build(tmp_path_factory.mktemp("bank") / "undisturbed")


@pytest.fixture
def stored(undisturbed: KnowledgeBank, tmp_path: Path) -> Path:
    """A copy of the bank that may be spoilt."""
    return Path(shutil.copytree(undisturbed.folder, tmp_path / "stored"))


class Progress:
    """Counts items; raises once `stop` of them are done."""

    def __init__(self, stop: int | None = None):
        self.items, self.stop = 0, stop

    def __call__(self, count: int) -> None:
        self.items += count
        if self.stop is not None and self.items >= self.stop:
            raise KeyboardInterrupt


def assert_same_bank(found: KnowledgeBank, expected: KnowledgeBank) -> None:
    assert torch.equal(found.latents[:], expected.latents[:])
    assert (found.prompts, found.seeds) == (expected.prompts, expected.seeds)
    assert found.fingerprint == expected.fingerprint


# --- the same bank on every way -------------------------------------------------------------------------------------


@pytest.mark.sample("5")
@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_a_build_interrupted_after_some_items_ends_with_the_same_bank(undisturbed, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "bank", advance=Progress(stop))
    with pytest.raises(UserError, match="no complete bank"):
        KnowledgeBank.load(tmp_path / "bank")
    advance = Progress()
    assert_same_bank(build(tmp_path / "bank", advance=advance), undisturbed)
    assert advance.items == REQUEST.size
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_a_resumed_build_draws_no_finished_shard_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "bank", advance=Progress(stop=5))
    (partial,) = tmp_path.iterdir()
    before = {shard.name: shard.stat().st_mtime_ns for shard in partial.glob("*.safetensors")}
    assert len(before) == 3
    bank = build(tmp_path / "bank")
    assert {name: (bank.folder / name).stat().st_mtime_ns for name in before} == before


class Thread(Share):
    """A process's share, of threads in this one: what the first finds is told by a list and the barrier."""

    found: ClassVar[list[bool]] = []

    def agreed(self, value: bool) -> bool:
        if self.index == 0:
            self.found.append(value)
        self.wait()
        return self.found[-1]


def test_two_processes_build_the_same_bank_together(undisturbed, tmp_path):
    barrier = threading.Barrier(2, timeout=60)
    families = [family_of(tiny_pipeline()) for _ in range(2)]
    banks: dict[int, KnowledgeBank] = {}

    def process(index: int) -> None:
        share = Thread(index, 2, barrier.wait)
        banks[index] = KnowledgeBank.build(families[index], tmp_path / "bank", REQUEST, batch_size=2, share=share)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert_same_bank(banks[index], undisturbed)


@pytest.mark.sample("7")
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_changes_nothing_but_rounding(undisturbed, tmp_path, batch_size):
    bank = build(tmp_path / "bank", batch_size=batch_size)
    torch.testing.assert_close(bank.latents[:], undisturbed.latents[:], atol=1e-4, rtol=1e-4)
    assert bank.seeds == undisturbed.seeds


@pytest.mark.sample("1")
@pytest.mark.parametrize("size", [1, 4, 9])
def test_an_item_is_the_same_in_banks_of_any_size(undisturbed, tmp_path, size):
    bank = build(tmp_path / "bank", replace(REQUEST, size=size))
    both = min(size, REQUEST.size)
    assert len(bank) == size
    torch.testing.assert_close(bank.latents[:both], undisturbed.latents[:both], atol=1e-4, rtol=1e-4)
    assert (bank.seeds[:both], bank.prompts[:both]) == (undisturbed.seeds[:both], undisturbed.prompts[:both])


@pytest.mark.sample("1.0-epsilon")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_items_are_exactly_what_the_stock_pipeline_draws(tmp_path, prediction_type, guidance_scale):
    request = replace(REQUEST, size=4, guidance_scale=guidance_scale)
    pipe = tiny_pipeline(prediction_type=prediction_type)
    bank = KnowledgeBank.build(family_of(pipe), tmp_path / "bank", request, batch_size=1)
    stock = tiny_pipeline(prediction_type=prediction_type)
    for latents, prompt, seed in zip(bank.latents, bank.prompts, bank.seeds):
        drawn = stock(
            prompt,
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images[0]
        assert torch.equal(latents, drawn)


def test_items_differ_and_take_their_prompts_in_turn(undisturbed):
    assert undisturbed.prompts == [REQUEST.prompts[i % 3] for i in range(7)]
    assert undisturbed.seeds == [REQUEST.seed_of(i) for i in range(7)]
    assert len({digest(item) for item in undisturbed.latents}) == 7


def digest(latents: Tensor) -> bytes:
    return latents.numpy().tobytes()


@pytest.mark.sample("seed")
@pytest.mark.parametrize("change", [{"guidance_scale": 4.0}, {"steps": 3}, {"seed": 4}], ids=lambda c: next(iter(c)))
def test_what_the_request_says_of_sampling_changes_every_item(undisturbed, tmp_path, change):
    bank = build(tmp_path / "bank", replace(REQUEST, **change))
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(bank.latents, undisturbed.latents))
    assert bank.fingerprint != undisturbed.fingerprint


def test_the_manifest_says_what_the_bank_was_drawn_from(undisturbed):
    family = family_of(tiny_pipeline())
    manifest = json.loads((undisturbed.folder / "manifest.json").read_text())
    expected = {"base": family.fingerprints, "dtype": "torch.float32", "steps": 2, "guidance_scale": 1.5, "size": 7}
    assert {name: manifest["identity"][name] for name in expected} == expected
    assert manifest["identity"]["scheduler"]["class"] == "DDIMScheduler"
    assert set(manifest["versions"]) >= {"torch", "diffusers"}
    assert len(manifest["shards"]) == 4  # of what is drawn at once


# --- reuse and refusal ----------------------------------------------------------------------------------------------


def test_a_complete_bank_is_loaded_instead_of_drawn(undisturbed, stored):
    family = family_of(tiny_pipeline())
    passes = []
    family.denoiser.register_forward_hook(lambda *_: passes.append(1))
    advance = Progress()
    assert_same_bank(KnowledgeBank.build(family, stored, REQUEST, advance=advance), undisturbed)
    assert_same_bank(KnowledgeBank.load(stored, family), undisturbed)
    assert (passes, advance.items) == ([], 7)


def test_a_bank_without_its_manifest_is_refused_and_kept(undisturbed, stored):
    (stored / "manifest.json").unlink()
    before = sorted(p.name for p in stored.iterdir())
    with pytest.raises(UserError, match=r"a bank without its manifest\.json; delete it"):
        build(stored)
    assert sorted(p.name for p in stored.iterdir()) == before


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_bank_of_another_base_is_refused(stored, component):
    pipe = tiny_pipeline()
    next(getattr(pipe, component).parameters()).data[0] += 1e-3
    for use in (KnowledgeBank.load, lambda folder, base: KnowledgeBank.build(base, folder, REQUEST)):
        with pytest.raises(UserError, match=f"another base .*{component.replace('unet', 'denoiser')}"):
            use(stored, family_of(pipe))


def test_a_bank_of_another_precision_is_refused(undisturbed):
    family = family_of(tiny_pipeline())
    family.fingerprints  # noqa: B018  the weights' digests as they were in float32
    family.pipe.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"torch\.float32, the base is loaded in torch\.bfloat16"):
        KnowledgeBank.load(undisturbed.folder, family)


def flipped_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, flipped_byte])
@pytest.mark.parametrize("name", ["bank-00001.safetensors", "prompts.jsonl", "manifest.json"])
def test_a_bank_with_a_missing_or_damaged_file_is_refused(stored, name, damage):
    damage(stored / name)
    with pytest.raises(UserError, match="build it again"):
        KnowledgeBank.load(stored)


@pytest.mark.sample("size")
@pytest.mark.parametrize(
    "change",
    [{"guidance_scale": 4.0}, {"steps": 3}, {"seed": 4}, {"size": 6}, {"prompts": ("blue",)}, {"resolution": 32}],
    ids=lambda c: next(iter(c)),
)
def test_a_folder_with_a_bank_of_another_request_is_refused_and_kept(undisturbed, stored, change):
    with pytest.raises(UserError, match=f"another {next(iter(change))}"):
        build(stored, replace(REQUEST, **change))
    assert_same_bank(KnowledgeBank.load(stored), undisturbed)


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no bank"):
        build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"size": 0}, "size is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"resolution": 4}, "resolution is 4"),
    ],
)
def test_requests_out_of_range_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(REQUEST, **change)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_draws_are_items_and_follow_the_generator(undisturbed):
    drawn = [draw_items(undisturbed, 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert undisturbed[drawn[0]].shape == (20, *undisturbed.latents.shape[1:])
    assert torch.equal(undisturbed[drawn[0]], undisturbed.latents[:][drawn[0]])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert undisturbed[draw_items(undisturbed, 2)].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("captions", [True, False])
def test_a_folder_of_real_pictures_can_be_the_bank(family, tmp_path, captions):
    folder = write_pictures(tmp_path / "pictures", count=5)
    if not captions:
        (folder / "metadata.jsonl").unlink()
    bank = prepare_bank(family, BankConfig(path=str(folder)), DataConfig(cache=str(tmp_path / "cache")), [], 16)
    examples = load_images(str(folder), need_captions=False).examples
    mean, _ = family.encode_moments(torch.cat([Framing(16).pixels(e) for e in examples]))
    torch.testing.assert_close(bank.latents[:], mean * 0.7, atol=1e-5, rtol=1e-5)
    assert bank.prompts == [f"red {i}" if captions else "" for i in range(5)]
    assert bank[draw_items(bank, 3)].shape == (3, 4, 8, 8)


JOB = """
import os, sys, time
from pathlib import Path

from difftuning_control import BankRequest, KnowledgeBank, load_family
from difftuning_control.system.processes import Share

model, folder, met = sys.argv[1:]


class Met(Share):
    def agreed(self, value):
        print(value)
        (Path(met) / str(os.getpid())).touch()
        end = time.monotonic() + 100
        while len(os.listdir(met)) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        return value


request = BankRequest(("red",), size=40, steps=12, resolution=16)
print(KnowledgeBank.build(load_family(model), folder, request, batch_size=4, share=Met()).fingerprint)
"""


@pytest.mark.wide
def test_two_jobs_that_want_the_same_bank_at_once_both_get_it(tmp_path, model_dir):
    """Each goes on once both have found that it is not there."""
    (tmp_path / "met").mkdir()
    (tmp_path / "banks").mkdir()
    command = [sys.executable, "-c", JOB, str(model_dir), str(tmp_path / "banks" / "bank"), str(tmp_path / "met")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert [there for there, _ in found] == ["False", "False"]
    assert found[0] == found[1]
    assert sorted(p.name for p in (tmp_path / "banks").iterdir()) == ["bank"]
