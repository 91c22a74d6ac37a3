"""A streamed data set as files: WebDataset tar shards, Parquet files, or a `metadata.jsonl` with pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from difftuning_control.data.datasets import Choice, bytes_of, files_of_split, literal, refuse_outside
from difftuning_control.data.examples import Read, Row, listed
from difftuning_control.data.images import EXTENSIONS
from difftuning_control.data.loading_faults import refuse_known
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
from difftuning_control.system.untrusted import as_lines, leads_outside, read_file

if TYPE_CHECKING:
    from difftuning_control.recipe.inputs import DataConfig

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
            refuse_known(config.path, error)
            raise UserError(
                f"{config.path} cannot be streamed ({type(error).__name__}); give a folder of WebDataset .tar shards "
                "whose first rows have files of the same endings, of Parquet files or with a metadata.jsonl, or a data "
                "set that this machine can reach."
            ) from None
        self.image = self._image_column(data.features or {})
        is_json = type((data.features or {}).get(config.caption_column)).__name__ == "Json"
        if data.features and not is_json:
            data = data.decode(False)  # the other columns of a row are of no concern
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
            names = {kind: listed((p.relative_to(self.folder).as_posix() for p in by_kind[kind]), 2) for kind in kinds}
            found = "; ".join(f"{len(by_kind[kind])} {KINDS[kind]} ({names[kind]})" for kind in kinds)
            what = f"files of several kinds, {found}" if kinds else "nothing that can be streamed"
            expected = "WebDataset .tar shards, Parquet files, or a metadata.jsonl"
            raise UserError(
                f"{self.folder} holds {what}; expected {expected}{', so take the others out' if kinds else ''}."
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
