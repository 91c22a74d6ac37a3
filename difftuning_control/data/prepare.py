"""The data of a recipe: pictures read and checked, the knowledge bank drawn or read, latents encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_draft import MANIFEST, BankDraft
from difftuning_control.data.bank_pictures import pictures_of_bank
from difftuning_control.data.bank_prompts import bank_prompts
from difftuning_control.data.bank_request import request_of
from difftuning_control.data.caption_lengths import check_caption, may_cut, refuse_long
from difftuning_control.data.datasets import Choice
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData, listed, with_reasons
from difftuning_control.data.framing import Framing
from difftuning_control.data.labels import check_classes
from difftuning_control.data.latents import Part, cached_moments
from difftuning_control.data.masks import loss_weights
from difftuning_control.data.sources import load_images
from difftuning_control.data.splits import FOR_JUDGING
from difftuning_control.data.stream import Stream, StreamedData
from difftuning_control.errors import UserError
from difftuning_control.families.prompts import cut_note
from difftuning_control.recipe.inputs import HELD_OUT, MOST_SAMPLES, BankConfig, DataConfig
from difftuning_control.recipe.masking import Masking
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.digests import digest_of
from difftuning_control.system.processes import ALONE, Share
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from difftuning_control.families.family import Family


def cache_folder(data: DataConfig) -> Path:
    """Where caches and banks lie when the recipe names no place."""
    if data.cache is None:
        try:
            root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # a user that the machine does not know
            raise UserError("there is no home folder for the cache; name a folder with --data.cache.") from None
        return Path(root) / "difftuning-control"
    folder = Path(data.cache).expanduser()
    if folder.is_file():
        raise UserError(f"data.cache is {folder}, a file; expected a folder.")
    return folder


def resolution_of(family: Family, data: DataConfig) -> int:
    """The side of the pictures in pixels; a UserError if the model cannot take it."""
    side = data.resolution or family.native_resolution
    family.check_resolution(side, "data.resolution")
    return side


def silent(line: str) -> None:
    """Say nothing."""


def read_data(recipe: Recipe, tell: Callable[[str], object] = silent) -> tuple[ImageData, ImageData]:
    """Pictures to tune on and held-out ones.

    Args:
        tell: is given lines on what was left out of them.

    Raises:
        UserError: also where they are to be streamed, which only training does.
    """
    config = recipe.data
    if config.stream:
        raise UserError("data.stream is for train and bank, and this reads all pictures; leave it out, name a sample.")
    data = _read(recipe, config.path, recipe.control.path, Choice(config.split), config.masking)
    if config.limit is not None:
        data = replace(data, examples=data.examples[: config.limit])
    if config.validation_path is not None:
        held_out = _read_validation(recipe)
    else:
        data, held_out = data.split(config.holdout)
    for line in (*data.notes, *held_out.notes, *copies_held_out(data, held_out)):
        tell(line)
    return data, held_out


def _read_validation(recipe: Recipe) -> ImageData:
    assert recipe.data.validation_path is not None
    choice = validation_choice(recipe.data)
    return _read(recipe, recipe.data.validation_path, recipe.control.validation_path, choice)


def _read(
    recipe: Recipe, path: str, conditions: str | None, choice: Choice, masking: Masking | None = None
) -> ImageData:
    config = recipe.data
    return load_images(
        path,
        caption_column=config.caption_column,
        image_column=config.image_column,
        default_caption=config.default_caption,
        trigger=config.trigger,
        skip_bad=config.skip_bad,
        max_pixels=config.max_pixels,
        classes=config.classes,
        condition_column=recipe.control.column if recipe.method == "controlnet" else None,
        condition_path=conditions,
        choice=choice,
        masking=masking,
        apart=recipe.folders_apart,
    )


def validation_choice(config: DataConfig) -> Choice:
    """Which split of data.validation_path is wanted."""
    return Choice(config.validation_split, FOR_JUDGING, "--data.validation_split")


def copies_held_out(data: ImageData, held_out: ImageData) -> list[str]:
    """What to say where held-out pictures are tuned on too, byte for byte."""
    tuned = {e.digest: e.name for e in data.examples}
    both = {e.name: tuned[e.digest] for e in held_out.examples if e.digest in tuned}
    if not both:
        return []
    names = listed(f"{name} (as {other})" if name != other else name for name, other in both.items())
    return [
        f"{len(both)} of the {len(held_out)} held-out pictures are tuned on too: {names}; so the loss on held-out "
        "pictures says too little; take the copies out"
    ]


def read_stream(
    recipe: Recipe, family: Family, tell: Callable[[str], object] = silent
) -> tuple[Stream, ImageData, ImageData]:
    """A streamed data set, what stands for its pictures, and held-out ones.

    Args:
        tell: is given lines on what was left out of them.

    Raises:
        UserError: also where the model is told classes, all of which must be known.
    """
    config = recipe.data
    if family.class_conditional:
        raise UserError(
            "data.stream is true, and all classes of this model must be known before training; leave it out."
        )
    held = config.holdout > 0 and config.validation_path is None
    stream = Stream(config, recipe.training.validation_size if held else 0, recipe.training.seed)
    held_out = stream.head(check_caption(family, config))
    if config.validation_path is not None:
        held_out = _read_validation(recipe)
    stream.held = {e.digest for e in held_out.examples}
    left = f"left out of the held-out pictures: {with_reasons(held_out.skipped)}"
    for line in (*stream.collection.notes, *held_out.notes, *([left] if held_out.skipped and held else [])):
        tell(line)
    return stream, StreamedData(config.path, [], held_out.skipped, digest=stream.collection.fingerprint), held_out


def check_captions(family: Family, recipe: Recipe, data: ImageData, held_out: ImageData) -> None:
    """Refuse captions that the text encoder would cut, unless that is wanted, and classes that the model has not.

    Raises:
        UserError: naming the first ten such pictures.
    """
    check_classes(family, recipe, data, held_out)
    if not may_cut(family, recipe.data):
        refuse_long(family, (*data.examples, *held_out.examples))


def prepare_bank(
    family: Family,
    config: BankConfig,
    data: DataConfig,
    captions: list[str],
    resolution: int,
    accelerator: Accelerator | None = None,
    tell: Callable[[str], object] = silent,
    size: int = MOST_SAMPLES,
    grow: Callable[[BankDraft], KnowledgeBank] | None = None,
) -> KnowledgeBank:
    """The bank that the recipe asks for: loaded if it is there, built if not, or encoded from a folder of pictures.

    Args:
        size: where the recipe's is auto and no bank lies at its path.
        tell: is given lines on what was left out of these, and of the prompts.
        grow: what makes the bank of its draft; drawn whole, by all processes, when None.
    """
    path = Path(config.path).expanduser() if config.path is not None else None
    share = ALONE if accelerator is None else Share.of(accelerator)
    show = share.index == 0
    if path is not None and path.is_file():
        raise UserError(f"bank.path is {path}, a file; expected a folder of a bank or of pictures.")
    if path is not None and path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).exists():
        return _bank_of_pictures(family, path, data, resolution, show, share, tell)
    prompts = bank_prompts(family, config, [data.captioning.untriggered(caption) for caption in captions])
    request = request_of(family, config, path, prompts, resolution, size)
    if config.prompts != "captions" and (note := cut_note(family, request.prompts, "prompts of the bank")):
        tell(note)
    folder = path or cache_folder(data) / "banks" / digest_of(request.identity(family))
    draft = BankDraft(family, request, folder, config.batch_for(resolution))
    if family.offload and not share.agreed(draft.is_whole):  # all prompts at once, and not batch by batch
        cached_embeddings(family, list(request.prompts), cache_folder(data), lambda count: None, share=share)
    if grow is not None:
        return grow(draft)
    with progress(request.size, "knowledge bank", show) as advance:
        return KnowledgeBank.build(
            family,
            folder,
            request,
            batch_size=draft.batch_size,
            advance=advance,
            share=share,
        )


def _bank_of_pictures(
    family: Family,
    path: Path,
    data: DataConfig,
    resolution: int,
    show: bool,
    share: Share,
    tell: Callable[[str], object],
) -> KnowledgeBank:
    """Real source pictures instead of samples, see `pictures_of_bank`."""
    pictures = pictures_of_bank(path, data, family.class_conditional)
    for line in pictures.notes:
        tell(line)
    with progress(len(pictures), "bank pictures", show) as advance:
        moments = cached_moments(family, pictures, Framing(resolution), cache_folder(data), advance, share=share)
    latents, captions = moments.first_views(family.scale_latents), [e.caption for e in pictures.examples]
    sizes = sizes_of(family, pictures, Framing(resolution))
    return KnowledgeBank.from_latents(
        latents, captions, str(path), pictures.fingerprint, sizes[:, 0] if sizes is not None else None
    )


def sizes_of(family: Family, data: ImageData, framing: Framing) -> torch.Tensor | None:
    """What was done to every view of every picture, (N, views, 6), where the family is told of it."""
    return torch.stack([framing.sizes(e) for e in data.examples]) if family.takes_sizes and len(data) else None


def encoded(
    family: Family,
    data: ImageData,
    resolution: int,
    cache: Path,
    advance: Callable[[int], object],
    share: Share = ALONE,
) -> Part:
    """Pictures in the middle of their frames, as rows to measure on."""
    prompts = [e.caption for e in data.examples]
    if not prompts:
        return Part(torch.empty(0), [])
    framing = Framing(resolution)
    latents = cached_moments(family, data, framing, cache, advance, share=share).first_views(family.scale_latents)
    sizes, weights = sizes_of(family, data, framing), loss_weights(data, framing, latents.shape[1:])
    return Part(latents, prompts, *(part[:, 0] if part is not None else None for part in (sizes, weights)))


def hold_out(bank: KnowledgeBank, size: int) -> tuple[KnowledgeBank, KnowledgeBank]:
    """Bank items to train on and, from its end, items that only validation sees: at most a fifth."""
    if len(bank) < 2:
        return bank, bank
    kept = max(1, min(size, len(bank) // HELD_OUT))
    cut = len(bank) - kept
    return bank.part(0, cut), bank.part(cut, kept)
