"""What a training will take, on the page: the numbers of `training/price.py` in a table and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difftuning_control.runs.record import RECORD, RunRecord, read_run
from difftuning_control.system.terminal import duration
from difftuning_control.verbs.ui.form import recipe_of_words, train_words
from difftuning_control.verbs.ui.places import Places
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
    """What the training of a form takes.

    Args:
        preset, fields, others: as `train_words` takes them.

    Raises:
        UserError: for whatever the training would refuse before it loads the model.
    """
    from difftuning_control.training.price import price_of  # saves diffusers until somebody asks

    words, _ = train_words(places, preset, fields, others)
    found = price_of(recipe_of_words(words), earlier_runs(places))
    names = list(dict.fromkeys([*found.seconds, *found.forwards]))
    rows = [(WORDS[n], found.forwards.get(n), duration(found.seconds[n]) if n in found.seconds else "") for n in WORDS]
    training = found.recipe.training
    return render(
        "price",
        rows=[row for name, row in zip(WORDS, rows) if name in names],
        total=duration(sum(found.seconds.values())) if found.seconds else None,
        forwards=sum(found.forwards.values()),
        price=found,
        steps=training.max_steps,
        batch=training.batch_size,
        memory=_memory(found.memory),
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
