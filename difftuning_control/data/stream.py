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
from glob import escape
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from difftuning_control.data.checker import Checker, trigger_alone
from difftuning_control.data.datasets import Choice, bytes_of, files_of_split, literal, refuse_outside
from difftuning_control.data.examples import Example, ImageData, Read, Row, listed, with_reasons
from difftuning_control.data.images import EXTENSIONS, decode_image, refuse_unread
from difftuning_control.data.names import in_either_form
from difftuning_control.data.sources import place_of_data
from difftuning_control.data.splits import (
    ALL,
    TRAIN,
    below,
    chosen,
    is_hidden,
    is_of_split,
    splits_of_pictures,
    taken,
    visible_files,
)
from difftuning_control.errors import UserError
from difftuning_control.system.digests import digest_of
from difftuning_control.system.hub import hub_or_cache
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, as_lines, leads_outside, read_file

if TYPE_CHECKING:
    from difftuning_control.recipe.inputs import DataConfig

LANES, BLOCK = 64, 128
KINDS = {"webdataset": "*.tar", "parquet": "*.parquet", "json": "metadata.jsonl"}


class Collection:
    """The files of a streamed data set, by path or by Hub name; any of them can be read from its first row on.

    Raises:
        UserError: if there are none, of several kinds, or without pictures or captions.
    """

    def __init__(self, config: DataConfig):
        import datasets  # saves a second where nothing is streamed

        self.config, self.folder = config, place_of_data(config.path)
        self.notes: list[str] = []
        self.split: str | None = None  # of the pictures that a metadata.jsonl of several splits names
        choice = Choice(config.split)
        self.kind, paths = self._find(choice) if self.folder.is_dir() else ("", [])
        self.places = [path.parent for path in paths]
        self.names = [path.relative_to(self.folder).as_posix() for path in paths]
        names: Any = {"path": config.path, "split": config.split or TRAIN}
        if paths:
            names = {"path": self.kind, "data_files": {TRAIN: [escape(literal(p)) for p in paths]}, "split": TRAIN}
        try:
            with hub_or_cache(config.path):
                data = datasets.load_dataset(**names, streaming=True)
                self.columns = list(data.features or next(iter(data)))
        except Exception as error:
            raise UserError(
                f"{config.path} cannot be streamed ({type(error).__name__}); give a folder of WebDataset .tar shards "
                "whose first rows have files of the same endings, of Parquet files or with a metadata.jsonl, or a data "
                "set that this machine can reach."
            ) from None
        self.image = self._image_column(data.features or {})
        if self.kind != "json":
            data = data.cast_column(self.image, datasets.Image(decode=False))
        known = (config.caption_column, *(("txt", "caption", "json") if self.kind == "webdataset" else ()))
        others = (self.image, config.image_column, "file_name", "label", "__key__", "__url__")
        if config.captioning.finds_none(self.columns, known, others):
            raise UserError(
                f"{config.path} has no column {config.caption_column!r}, only {', '.join(self.columns)}; name it with "
                "--data.caption_column."
            )
        self.notes += config.captioning.hidden_by_default(config.path, self.columns, known, others)
        self.data, self.files = data, data.num_shards
        sizes = [(p.relative_to(self.folder).as_posix(), p.stat().st_size) for p in paths]
        split = self.split if paths else config.split
        shown = [config.path if not paths else self.kind, sizes, self.files, *([split] if split is not None else [])]
        self.fingerprint = digest_of(shown)

    def _find(self, choice: Choice) -> tuple[str, list[Path]]:
        """The kind of the folder's files, and those of the chosen split."""
        by_kind = {kind: visible_files(self.folder, pattern) for kind, pattern in KINDS.items()}
        kinds = [kind for kind, paths in by_kind.items() if paths]
        if len(kinds) != 1:
            what = "files of several kinds" if kinds else "nothing that can be streamed"
            raise UserError(
                f"{self.folder} holds {what}; expected WebDataset .tar shards, Parquet files, or a metadata.jsonl."
            )
        paths = by_kind[kinds[0]]
        refuse_outside(paths, self.folder)
        pictures = (
            [p for p in visible_files(self.folder) if p.suffix.lower() in EXTENSIONS] if kinds == ["json"] else []
        )
        splits = splits_of_pictures(self.folder, pictures) if paths[0].parent == self.folder else {}
        if splits:
            split = chosen(splits, choice.split, choice.prefer, self.folder, choice.option)
            self.split = None if split == ALL else split
            left = len(set(pictures).difference(*splits.values()))
            self.notes = taken(self.folder, split, splits, left, choice.option)
            return kinds[0], paths[:1]
        paths, self.notes = files_of_split(self.folder, paths, choice)
        return kinds[0], paths

    def _image_column(self, features: Any) -> str:
        import datasets  # saves a second where nothing is streamed

        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        wanted = "file_name" if self.kind == "json" else self.config.image_column
        if wanted in self.columns:
            return wanted
        if self.kind == "webdataset" and pictures:  # named by the files' endings
            return pictures[0]
        raise UserError(
            f"{self.config.path} has no column {wanted!r}, only {', '.join(self.columns)}; name it with "
            "--data.image_column."
        )

    def rows(self, file: int, start: int = 0) -> Iterator[Row]:
        """The rows of a file, from row `start` on.

        Raises:
            UserError: where it cannot be read to its end.
        """
        number = -1
        stored = iter(self.data.shard(self.files, file))
        while True:
            try:
                row = next(stored)
            except StopIteration:
                return
            except Exception as error:  # of tarfile, pyarrow and datasets, of many kinds
                place = f"file {file}" if file >= len(self.names) else self.names[file]
                raise UserError(
                    f"{place} of {self.config.path} cannot be read from row {number + 1} on ({type(error).__name__}); "
                    "mend that, or take the file out."
                ) from None
            number += 1
            if number >= start and not self._passed_over(row, file):
                yield Row(self._name(row, file, number), self._reader(row[self.image], file), self._caption(row))

    def _passed_over(self, row: dict[str, Any], file: int) -> bool:
        """Whether a row is of a hidden file in a shard, or of another split than the one that is wanted."""
        if self.split is not None:
            place = below(self.folder, self.places[file] / str(row[self.image]))
            return leads_outside(place, self.folder) is None and not is_of_split(self.folder, place, self.split)
        return self.kind == "webdataset" and is_hidden(PurePosixPath(str(row.get("__key__") or "")))

    def _name(self, row: dict[str, Any], file: int, number: int) -> str:
        return str(row.get("__key__") or row.get("file_name") or f"row {number} of file {file}")

    def _caption(self, row: dict[str, Any]) -> Any:
        beside = ("txt", "caption") if self.kind == "webdataset" else ()
        for value in map(row.get, (self.config.caption_column, *beside)):
            if value not in (None, "", b""):  # an empty file hides none
                text = _text_of(value) if self.kind == "webdataset" else None  # as it lies beside other pictures
                return value if text is None else as_lines(text.removeprefix("\ufeff"))
        table = row.get("json")
        return table.get(self.config.caption_column) if isinstance(table, dict) else None

    def _reader(self, cell: Any, file: int) -> Read:
        def read(most: int) -> bytes:
            if self.kind == "json":
                path = in_either_form(below(self.folder, self.places[file] / str(cell)))
                if leads_outside(path, self.folder) is not None:
                    raise UserError("is named by metadata.jsonl but lies outside the folder")
                if is_hidden(path, self.folder):
                    raise UserError("is named by metadata.jsonl but is hidden (a dot begins its path)")
                return read_file(path, most)
            if cell is None and self.kind == "webdataset":
                raise UserError(f"has no picture that ends with .{self.image}, as the first ones of its shards do")
            if "://" in str((cell or {}).get("path")) and cell["bytes"] is None:
                raise UserError("is a file of its own in a data set of the Hub; leave data.stream out")
            return bytes_of(cell, [self.folder], most)

        return read


def _text_of(value: Any) -> str | None:
    """What a member of a shard says, of some endings as bytes; None where it is no text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


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
        self._lanes: dict[tuple[int, int], Lane] = {}

    def head(self) -> ImageData:
        """The pictures that are held out."""
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
            examples = [e for row in part if (e := checker.example(row)) is not None]
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
        lanes = 1 << (min(self.collection.files, total, LANES).bit_length() - 1)
        wanted = []
        for row in rows:
            lane = row % lanes
            position = step * len(range(lane, total, lanes)) + row // lanes
            wanted.append(self._lane(lane, lanes).candidates(position))
        decoded_rows = list(decoded(self._usable, wanted))
        for example, is_bare, bad in decoded_rows:
            self._bad |= bad
            if example.digest in self.held:
                self._copies[example.name] = None
            if is_bare:
                self._bare[example.name] = None
        return [example for example, _, _ in decoded_rows]

    def notes(self) -> list[str]:
        """What there is to say, once rows were read, of those that this process met."""
        lines = [f"left out of {self.config.path}: {with_reasons(self._bad)}"] if self._bad else []
        if self._copies:
            lines.append(
                f"{len(self._copies)} pictures of {self.config.path} that were tuned on are held out too "
                f"({listed(self._copies)}), so the loss on held-out pictures says too little; take the copies out"
            )
        met = f"of the pictures that were read of {self.config.path}"
        return lines + trigger_alone(self.config.captioning, len(self._bare), met)

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

    def _usable(self, candidates: list[Row]) -> tuple[Example, bool, dict[str, str]]:
        """The first of these rows that can be used, only the first of all unless bad ones are skipped; whether it has
        no words of its own; and what is wrong with those before it."""
        bad: dict[str, str] = {}
        for row in candidates if self.config.skip_bad else candidates[:1]:
            try:
                caption = row.usable_caption(self.config.captioning)
                refuse_unread(row.name)
                content = row.read(self.config.max_pixels * BYTES_PER_PIXEL)
                return _decoded(row.name, caption, content, self.config.max_pixels), row.is_bare, bad
            except (UserError, OSError) as error:
                bad.setdefault(row.name, str(getattr(error, "strerror", None) or error))
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{name} in {self.config.path} {reason}; mend it, or leave such rows out: --data.skip_bad true."
        )


def _decoded(name: str, caption: str, content: bytes, max_pixels: int) -> Example:
    """A picture that is in memory already."""
    image = decode_image(content, max_pixels)
    return Example(name, caption, hashlib.sha256(content).hexdigest(), lambda: image, size=image.size)


@dataclass(frozen=True)
class StreamedData(ImageData):
    """What stands for the pictures of a stream, which are not known: none, and a fingerprint of their files."""

    digest: str = ""

    @property
    def fingerprint(self) -> str:
        return self.digest
