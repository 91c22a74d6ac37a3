"""Pictures that are read while training, for collections that fit no disk: files → lanes → blocks → rows.

A collection is a list of files: WebDataset tar shards, Parquet files, or a `metadata.jsonl` with pictures beside it.
Lane l of L reads files l, l + L, … to their ends, over and over, each time in another order, and its rows are shuffled
in blocks. Row r of an optimizer step comes from lane r mod L, so which picture it holds depends on the seed, the step
and r alone, on any number of processes; a process reads the lanes of its rows only, and where their number divides L,
nobody else reads them. Nothing is kept but a block a lane: latents and prompts are encoded in the step, and a resumed
run reads its lanes forward to their places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from difftuning_control.data.checker import Checker, trigger_alone, trigger_unset
from difftuning_control.data.collection import Collection
from difftuning_control.data.examples import Example, ImageData, Row, listed, with_reasons
from difftuning_control.data.images import decode_image, refuse_unread
from difftuning_control.errors import UserError
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.untrusted import BYTES_PER_PIXEL

if TYPE_CHECKING:
    from difftuning_control.recipe.inputs import DataConfig

LANES, BLOCK = 64, 128
Check = Callable[[Example], object]  # raises a UserError for a picture that is not to be used


class Lane:
    """An endless sequence of a collection's rows, read forward, the rows of each block in an order of its own."""

    def __init__(self, number: int, files: list[int], seed: int, read: Callable[[int], Iterator[Row]]):
        self.number, self.files, self.seed, self.read = number, files, seed, read
        self._begin()

    def _begin(self) -> None:
        self._stream, self._number, self._block = self._endless(), -1, list[Row]()

    def _endless(self) -> Iterator[Row]:
        for epoch in count():
            is_any = False
            for i in np.random.default_rng(step_seed(self.seed, self.number, epoch)).permutation(len(self.files)):
                for row in self.read(self.files[i]):
                    is_any = True
                    yield row
            if not is_any:
                raise UserError("a part of the streamed data set has no rows to tune on; give larger files, or more.")

    def candidates(self, position: int) -> list[Row]:
        """The row at a position, and those that stand in for it where it cannot be used."""
        number, place = divmod(position, BLOCK)
        if number < self._number:
            self._begin()
        while self._number < number:
            self._block, self._number = list(islice(self._stream, BLOCK)), self._number + 1
        order = np.random.default_rng(step_seed(self.seed, self.number, number, 1)).permutation(BLOCK)
        return [self._block[order[(place + k) % BLOCK]] for k in range(BLOCK)]


class Stream:
    """A streamed data set as a run uses it: rows to hold out, captions for the bank, and the pictures of every step.

    Args:
        holdout: how many pictures are held out: the first usable ones of the first file.
        seed: of the order.
    """

    def __init__(self, config: DataConfig, holdout: int, seed: int):
        self.config, self.seed, self.holdout = config, seed, holdout
        self.collection = Collection(config)
        self.begin = 0  # the first row of the first file to tune on
        self.held: set[str] = set()  # digests of held-out pictures
        self._bad: dict[str, str] = {}
        self._copies: dict[str, None] = {}
        self._bare: dict[str, None] = {}  # pictures without words of their own
        self._unset: dict[str, None] = {}  # pictures whose captions hold a place for a trigger that is not given
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._wanted: list[list[Row]] = []  # of the pictures that were last given: their rows, and what stands in

    def head(self, check: Check = lambda example: None) -> ImageData:
        """The pictures that are held out.

        Args:
            check: refuses some of them.
        """
        held_out: dict[str, Example] = {}
        skipped: dict[str, str] = {}
        rows = self.collection.rows(0)
        while len(held_out) < self.holdout:
            part = list(islice(rows, self.holdout - len(held_out)))
            if not part:
                raise UserError(
                    f"the first file of {self.config.path} has fewer than {self.holdout} usable rows to hold out; name "
                    "a data.validation_path, or lower training.validation_size."
                )
            self.begin += len(part)
            checker = Checker(self.config.skip_bad, self.config.captioning, self.config.max_pixels)
            examples = [e for row in part if (e := checker.example(row)) is not None and checker.takes(e, check)]
            checker.stop_if_bad(self.config.path)
            held_out |= {e.name: e for e in examples}
            skipped |= checker.bad
        return ImageData(self.config.path, list(held_out.values()), skipped)

    def captions(self, most: int) -> list[str]:
        """The captions of the first `most` rows to tune on."""
        files = range(self.collection.files)
        rows = (row for file in files for row in self._read(file))
        captions = [self._caption_of(row) for row in islice(rows, most)]
        if not any(c is not None for c in captions):
            raise UserError(f"{self.config.path} has no captions to tune on; see --data.caption_column.")
        return [c for c in captions if c is not None]

    def pictures(self, step: int, rows: range, total: int, decoded: Callable[..., Any]) -> list[Example]:
        """The pictures of some rows of a step that has `total` target rows in all, decoded by `decoded` (a map)."""
        self._wanted = [self._candidates(step, row, total) for row in rows]
        decoded_rows = list(decoded(self._usable, self._wanted))
        for example, is_bare, bad in decoded_rows:
            self._bad |= bad
            self._note(example, is_bare)
        return [example for example, _, _ in decoded_rows]

    def checked(self, examples: list[Example], check: Check) -> list[Example]:
        """The pictures that `pictures` gave last, or where bad ones are skipped, for one that `check` refuses the first
        of those that stand in for it that it takes.

        Raises:
            UserError: with the name of a picture that it refuses.
        """
        taken = []
        for example, candidates in zip(examples, self._wanted):
            try:
                check(example)
            except UserError:
                example, is_bare, bad = self._usable(candidates, check)
                for met in (self._copies, self._bare, self._unset):
                    for name in bad:
                        met.pop(name, None)
                self._bad |= bad
                self._note(example, is_bare)
            taken.append(example)
        return taken

    def _candidates(self, step: int, row: int, total: int) -> list[Row]:
        lanes = 1 << (min(self.collection.files, total, LANES).bit_length() - 1)
        lane = row % lanes
        position = step * len(range(lane, total, lanes)) + row // lanes
        return self._lane(lane, lanes).candidates(position)

    def _note(self, example: Example, is_bare: bool) -> None:
        """What `notes` will say of a picture that is tuned on."""
        if example.digest in self.held:
            self._copies[example.name] = None
        if is_bare:
            self._bare[example.name] = None
        if self.config.captioning.has_placeholder(example.caption):
            self._unset[example.name] = None

    def notes(self) -> list[str]:
        """What there is to say, once rows were read, of those that this process met."""
        lines = [f"left out of {self.config.path}: {with_reasons(self._bad)}"] if self._bad else []
        if self._copies:
            lines.append(
                f"{len(self._copies)} pictures of {self.config.path} that were tuned on are held out too "
                f"({listed(self._copies)}), so the loss on held-out pictures says too little; take the copies out"
            )
        met = f"of the pictures that were read of {self.config.path}"
        lines += trigger_alone(self.config.captioning, len(self._bare), met)
        return lines + trigger_unset(len(self._unset), met)

    def _lane(self, number: int, lanes: int) -> Lane:
        key = (number, lanes)
        if key not in self._lanes:
            order = np.random.default_rng(self.seed).permutation(self.collection.files)
            self._lanes[key] = Lane(number, order[number::lanes].tolist(), self.seed, self._read)
        return self._lanes[key]

    def _read(self, file: int) -> Iterator[Row]:
        return self.collection.rows(file, self.begin if file == 0 else 0)

    def _caption_of(self, row: Row) -> str | None:
        return self.config.captioning.of(row.caption if isinstance(row.caption, str) else None)

    def _usable(
        self, candidates: list[Row], check: Check = lambda example: None
    ) -> tuple[Example, bool, dict[str, str]]:
        """The first of these rows that can be used, only the first of all unless bad ones are skipped; whether it has
        no words of its own; and what is wrong with those before it."""
        bad: dict[str, str] = {}
        for row in candidates if self.config.skip_bad else candidates[:1]:
            try:
                check(example := self._example(row))
                return example, row.is_bare, bad
            except (UserError, OSError) as error:
                bad.setdefault(row.name, str(getattr(error, "strerror", None) or error))
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{name} in {self.config.path} {reason}; mend it, or leave such rows out: --data.skip_bad true."
        )

    def _example(self, row: Row) -> Example:
        """A row with its picture in memory."""
        caption = row.usable_caption(self.config.captioning)
        refuse_unread(row.name)
        content = row.read(self.config.max_pixels * BYTES_PER_PIXEL)
        image = decode_image(content, self.config.max_pixels)
        return Example(row.name, caption, hashlib.sha256(content).hexdigest(), lambda: image, size=image.size)


@dataclass(frozen=True)
class StreamedData(ImageData):
    """What stands for the pictures of a stream, which are not known: none, and a fingerprint of their files."""

    digest: str = ""

    @property
    def fingerprint(self) -> str:
        return self.digest
