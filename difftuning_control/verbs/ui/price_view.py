"""What a training will take, on the page: the numbers of `training/price.py` in a table and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RECORD, RunRecord, read_run
from difftuning_control.system.terminal import duration
from difftuning_control.verbs.ui.captions import COLUMN
from difftuning_control.verbs.ui.form import recipe_of_words, train_words
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.pictures_view import pictures_of
from difftuning_control.verbs.ui.places import EMBEDDED, Places
from difftuning_control.verbs.ui.render import render

WORDS = {
    "load": "load the model",
    "encode": "encode pictures and captions",
    "bank": "draw the knowledge bank, from the pretrained model",
    "analysis": "measure the schedule",
    "validation": "measure the losses",
    "training": "train",
    "sampling": "draw pictures to watch",
}


def price_page(places: Places, preset: str, fields: Mapping[str, str], others: Mapping[str, str]) -> str:
    """What the training of a form takes, or what it would refuse before it begins.

    Args:
        preset, fields, others: as `train_words` takes them.
    """
    import_models()
    from difftuning_control.training.price import price_of  # saves diffusers until somebody asks

    try:
        words, _ = train_words(places, preset, fields, others)
        recipe = recipe_of_words(words)
        refuse_unready(places, recipe)
        price = price_of(recipe, earlier_runs(places))
    except UserError as error:
        return render("text", title=f"It cannot start like this: {error}", good=False, text="")
    names = list(dict.fromkeys([*price.seconds, *price.forwards]))
    rows = [(WORDS[n], price.forwards.get(n), duration(price.seconds[n]) if n in price.seconds else "") for n in WORDS]
    training = price.recipe.training
    return render(
        "price",
        rows=[row for name, row in zip(WORDS, rows) if name in names],
        total=duration(sum(price.seconds.values())) if price.seconds else None,
        forwards=sum(price.forwards.values()),
        price=price,
        steps=training.max_steps,
        batch=training.batch_size,
        memory=_memory(price.memory),
    )


def refuse_unready(places: Places, recipe: Recipe) -> None:
    """Refuse pictures that training would, in the words of the page.

    Raises:
        UserError: with how many they are.
    """
    data = recipe.data
    taken = data.captioning.of_none is not None or data.classes is not None
    if data.skip_bad or taken or data.caption_column != COLUMN:
        return  # which the Pictures page does not know of
    if data.path in EMBEDDED or not Path(data.path).is_dir():
        return
    pictures = pictures_of(places, data.path, data.resolution or 8)
    bad = [picture for picture in pictures if picture.problems]
    if bad:
        named = ", ".join(picture.name for picture in bad[:3]) + (" and others" if len(bad) > 3 else "")
        raise UserError(
            f"{len(bad)} of the {len(pictures)} pictures have no caption or cannot be read ({named}); mend them on the "
            "Pictures page."
        )


def earlier_runs(places: Places) -> list[RunRecord]:
    """The records of the page's runs, the newest first."""
    folders = [path.parent for path in (places.folder / "runs").glob(f"*/{RECORD}")]
    newest = sorted(folders, key=lambda folder: (folder / RECORD).stat().st_mtime, reverse=True)
    return [record for folder in newest if (record := read_run(folder)) is not None]


def _memory(memory: Any) -> dict[str, Any] | None:
    """Bytes in words."""
    if memory is None:
        return None
    parts = {"denoiser": memory.denoiser, "others": memory.others, "training": memory.training, "total": memory.total}
    return {name: _size(value) for name, value in parts.items()} | {"trained": memory.trained}


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
