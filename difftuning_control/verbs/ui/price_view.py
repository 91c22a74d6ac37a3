"""What a training will take, on the page: the numbers of `training/price.py` in a table and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftuning_control.data.checker import Checker
from difftuning_control.data.datasets import Choice, is_dataset
from difftuning_control.data.examples import Columns, with_reasons
from difftuning_control.data.sources import list_rows
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RECORD, RunRecord, read_run
from difftuning_control.system.terminal import duration
from difftuning_control.verbs.ui.form import recipe_of_words, train_words
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.pictures_view import MOST
from difftuning_control.verbs.ui.places import EMBEDDED, Places
from difftuning_control.verbs.ui.render import render

NAMED = 3  # pictures with a fault
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
        refuse_unready(recipe)
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


def refuse_unready(recipe: Recipe) -> None:
    """Refuse words that training would, and pictures of a folder, in the words of the page; of many only the first are
    looked at.

    Raises:
        UserError: with how many they are.
    """
    data, control = recipe.data, recipe.control
    data.captioning.refuse_secrets()
    folder = Path(data.path)
    is_judged = data.path not in EMBEDDED and folder.is_dir() and not is_dataset(folder)
    if data.skip_bad or data.stream or not is_judged:
        return
    column = control.column if recipe.method == "controlnet" else None
    columns = Columns.of(data.image_column, data.caption_column, column, data.classes)
    choice, apart = Choice(data.split), recipe.folders_apart
    rows, bad = list_rows(data.path, columns, data.captioning, control.path, data.classes, choice, data.masking, apart)
    checker = Checker(True, data.captioning, data.max_pixels, data.masking)
    for row in rows[:MOST]:
        checker.example(row)
    bad = {**bad, **checker.bad}
    if bad:
        count = len({*bad, *(row.name for row in rows)})
        more = " and others" if len(bad) > NAMED else ""
        raise UserError(
            f"{len(bad)} of the {count} pictures have no caption or cannot be used: "
            f"{with_reasons(dict(list(bad.items())[:NAMED]))}{more}; mend them (captions on the Pictures page)."
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
