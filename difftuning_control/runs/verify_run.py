"""What a run was made of and what it left, part by part against its record; nothing is loaded, all is hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.data.bank_pictures import pictures_of_bank
from difftuning_control.data.collection import Collection
from difftuning_control.data.datasets import Choice
from difftuning_control.data.examples import Columns, Row
from difftuning_control.data.prepare import validation_choice
from difftuning_control.data.sources import list_rows
from difftuning_control.errors import UserError
from difftuning_control.runs.audit import FILE, Chain, read_audit
from difftuning_control.runs.card import is_hub_id
from difftuning_control.runs.finished import finished_run
from difftuning_control.runs.manifest import HELD_OUT, INPUTS, digest_of_text, files_of_run, place_of, source_files
from difftuning_control.runs.places import SOURCES
from difftuning_control.runs.record import RECORD, RunRecord
from difftuning_control.runs.record_sections import BankRecord, Source
from difftuning_control.runs.start import start_of
from difftuning_control.system.digests import digest_of, digest_of_file
from difftuning_control.system.terminal import progress
from difftuning_control.system.untrusted import BYTES_PER_PIXEL

if TYPE_CHECKING:
    from difftuning_control.recipe.inputs import DataConfig
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.requests import Moved

EARLIER = "the run is of an earlier version, which wrote down no hashes of it"


@dataclass
class Part:
    """What was found of one part.

    Args:
        name: one of `requests.PARTS`, or a run of a pilot.
        checked: how many files, pictures or lines were compared.
        findings: item, what (changed, missing or added) and said, in order.
        unchecked: why it could not be checked, or is not all of it.
    """

    name: str
    checked: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)
    unchecked: str | None = None

    def find(self, item: str, what: str, said: str = "") -> None:
        self.findings.append({"item": item, "what": what, "said": said})

    @property
    def state(self) -> str:
        return "changed" if self.findings else "unchecked" if self.unchecked else "same"


def verify_run(
    run: Path,
    skip: Iterable[str] = (),
    head: str | None = None,
    seen: set[str] | None = None,
    relocated: Callable[[RunRecord], RunRecord] = lambda record: record,
    moved: Moved | None = None,
) -> tuple[list[Part], Chain]:
    """The parts of a run, and its audit.

    Args:
        skip: names of parts that are left out.
        head: a hash that the audit must have.
        seen: digests of inputs that were compared for other runs already and are left out here; added to.
        relocated: from a record of an earlier version to one that says where things lie now.
        moved: new places of the run's inputs.

    Raises:
        UserError: if there is no finished run.
    """
    chain = read_audit(run)
    try:
        record = relocated(finished_run(run, moved))
        recipe = record.recipe
    except UserError:
        if not chain.is_ended or chain.last_hash_of(RECORD) in (None, _digest_of(run / RECORD)):
            raise
        lost = Part("record", 1)  # it was finished once
        lost.find(RECORD, "changed" if (run / RECORD).is_file() else "missing", f"{FILE} tells of another")
        return [lost, audit_part(chain, head)], chain
    parts = [_record(run, record, chain), audit_part(chain, head, not record.has_hashes), _outputs(run, record)]
    for name, identity, check in _inputs(run, record, recipe):
        key = digest_of([name, identity])
        if seen is None or key not in seen:
            parts.append(Part(name, unchecked="left out as asked") if name in skip else check())
        if seen is not None:
            seen.add(key)
    return parts, chain


def _digest_of(path: Path) -> str | None:
    return digest_of_file(path) if path.is_file() else None


def _inputs(run: Path, record: RunRecord, recipe: Recipe) -> Iterator[tuple[str, Any, Callable[[], Part]]]:
    """What went in: each part's name, what its result depends on, and what makes it."""
    if record.sources is None:
        yield "base", None, lambda: Part("base", unchecked=EARLIER)
    for name, source in (record.sources or {}).items():
        yield name, source.to_dict(), partial(_source, name, source)
    data, control = recipe.data, recipe.control
    places = [("data", data.path, control.path)]
    if data.validation_path is not None:
        places.append(("validation", data.validation_path, control.validation_path))
    identity = [record.inputs, record.data.to_dict(), vars(data), vars(control), recipe.method]
    for name, path, conditions in places:
        yield name, identity, partial(_data, run, record, recipe, name, path, conditions)
    if record.bank is not None:
        identity = [record.bank.to_dict(), record.fingerprints.bank, vars(data)]
        yield "bank", identity, partial(_bank, record, record.bank, recipe)


# --- the record and the chain that vouches for it -------------------------------------------------------------------


def _record(run: Path, record: RunRecord, chain: Chain) -> Part:
    part = Part("record")
    if not record.has_hashes:
        part.unchecked = EARLIER
        return part
    part.checked = 1
    vouched = chain.last_hash_of(RECORD)
    if vouched is None:
        part.find(RECORD, "changed", f"{FILE} has no hash of it")
    elif vouched != digest_of_file(run / RECORD):
        part.find(RECORD, "changed", f"its hash is not the one in {FILE}")
    return part


def audit_part(chain: Chain, head: str | None, is_earlier: bool = False) -> Part:
    """Whether the audit's chain is whole.

    Args:
        head: a hash that it must have.
        is_earlier: whether the record is of a version that may have kept no audit.
    """
    part = Part("audit", len(chain.entries))
    if is_earlier and not chain.entries:
        part.unchecked = EARLIER
        return part
    for fault in chain.faults:
        part.find(FILE, "changed" if chain.entries else "missing", fault)
    if head is not None and head not in chain.hashes:
        part.find(FILE, "changed", "it has no line with the hash that was kept: its end is missing, or it is another")
    return part


def _outputs(run: Path, record: RunRecord) -> Part:
    part, kept = Part("outputs"), {**record.outputs, **(record.files or {})}
    for name in record.discarded or ():  # by a pilot, which keeps the weights of its first seed
        kept.pop(name, None)
    there = dict(files_of_run(run))
    compare_files(part, kept, there)
    if not record.has_hashes:
        part.unchecked = f"but for the result: {EARLIER}"
        part.findings = [f for f in part.findings if f["what"] != "added"]
    return part


def compare_files(part: Part, kept: dict[str, str], there: dict[str, Path]) -> None:
    """Files by name against the hashes that were kept of them."""
    with progress(len(kept), f"verifying {part.name}") as advance:
        for name, digest in kept.items():
            part.checked += 1
            if name not in there:
                part.find(name, "missing")
            elif digest_of_file(there[name]) != digest:
                part.find(name, "changed")
            advance(1)
    for name in there.keys() - kept.keys():
        part.find(name, "added")


# --- what went in ---------------------------------------------------------------------------------------------------


def _source(name: str, source: Source) -> Part:
    """The base's files, those of the first ControlNet, or the file of a schedule."""
    part, place = Part(name), place_of(source.id, source.revision)
    if source.files is None:
        part.unchecked = f"its files could not be found when {source.id} was tuned"
    elif place is None and is_hub_id(source.id):
        part.unchecked = f"{source.id} at {source.revision} is not in this machine's cache of the Hub"
    elif place is None:
        part.find(source.id, "missing", _if_moved(SOURCES.get(name, name)))
    else:
        try:
            there = dict(start_of(place).files() if name == "begin" else source_files(place))
        except UserError as error:
            part.find(source.id, "missing", str(error))
            return part
        if is_hub_id(source.id) and source.revision is not None:  # another variant of that revision came beside it
            there = {name: path for name, path in there.items() if name in source.files}
        compare_files(part, source.files, there)
    return part


def _if_moved(role: str) -> str:
    return f"if it was moved, give its new place: --moved.{role}"


def _data(run: Path, record: RunRecord, recipe: Recipe, name: str, path: str, conditions: str | None) -> Part:
    """The pictures to tune on, or held-out ones, which are of the same place or of one of their own."""
    part, apart = Part(name), recipe.data.validation_path is not None
    if record.inputs is None:
        part.unchecked = EARLIER
    elif _inputs_are_whole(run, record, part):
        lines = (r for r in _lines(run) if not apart or (r["part"] == HELD_OUT) == (name == "validation"))
        if recipe.data.stream and name == "data":
            _streamed(part, record, recipe.data, lines)
        else:
            _pictures(part, record, recipe, path, conditions, lines)
    return part


def _inputs_are_whole(run: Path, record: RunRecord, part: Part) -> bool:
    """Whether the list of pictures can be relied on; that it cannot is a finding among the outputs already."""
    path = run / INPUTS
    if path.is_file() and digest_of_file(path) == record.inputs:
        return True
    part.unchecked = f"{INPUTS}, which lists the pictures, has changed or is missing"
    return False


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    with (run / INPUTS).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _pictures(
    part: Part,
    record: RunRecord,
    recipe: Recipe,
    path: str,
    conditions: str | None,
    lines: Iterable[dict[str, Any]],
) -> None:
    """Pictures, captions and conditions against the run's list of them."""
    data = recipe.data
    column = recipe.control.column if recipe.method == "controlnet" else None
    columns = Columns.of(data.image_column, data.caption_column, column, data.classes)
    try:
        choice = validation_choice(data) if part.name == "validation" else Choice(data.split)
        masking = data.masking if part.name == "data" else None
        if _is_gone(part, record, conditions, "control" if part.name == "data" else "control_validation"):
            conditions = None
        if masking is not None and _is_gone(part, record, masking.folder, "masks"):
            masking = None
        rows, bad = list_rows(
            path, columns, data.captioning, conditions, data.classes, choice, masking, recipe.folders_apart
        )
    except UserError as error:
        _cannot_be_read(part, record, path, error)
        return
    by_name: dict[str, list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows):
        by_name.setdefault(row.name, []).append((number, row))
    order: dict[str, list[int]] = {}
    with progress(len(rows), f"verifying {part.name}") as advance:
        for line in lines:
            part.checked += 1
            there = by_name.get(line["name"])
            if there:
                number, row = there.pop(0)
                order.setdefault(line["part"], []).append(number)
                _picture(part, line, row, data)
            else:
                part.find(line["name"], "missing", bad.pop(line["name"], ""))
            advance(1)
    limited = data.limit is not None and part.name == "data"  # then what comes after the last of them is not used
    limit = max((max(numbers) for numbers in order.values()), default=0) if limited else len(rows)
    skipped = record.data.skipped
    for name, rest in by_name.items():
        if name not in skipped and any(number < limit for number, _ in rest):
            part.find(name, "added")
    for name, reason in bad.items():
        if name not in skipped:
            part.find(name, "added", reason)
    if not part.findings and any(numbers != sorted(numbers) for numbers in order.values()):
        part.find(path, "changed", "the same pictures, in another order")


def _streamed(part: Part, record: RunRecord, data: DataConfig, lines: Iterable[dict[str, Any]]) -> None:
    """Names and sizes of the files of a stream, and the pictures at its beginning that were held out."""
    wanted = {line["name"]: line for line in lines}
    try:
        collection = Collection(data)
        part.checked = 1
        if collection.fingerprint != record.fingerprints.data:
            part.find(data.path, "changed", "the names or sizes of its files")
        rows = collection.rows(0)
        while wanted and (row := next(rows, None)) is not None:
            if (line := wanted.pop(row.name, None)) is not None:
                part.checked += 1
                _picture(part, line, row, data)
    except UserError as error:
        _cannot_be_read(part, record, data.path, error)
        return
    for name in wanted:
        part.find(name, "missing")
    part.unchecked = "but for names and sizes of its files and what was held out: it was streamed"


def _cannot_be_read(part: Part, record: RunRecord, path: str, error: UserError) -> None:
    """A finding where the pictures lay on this machine."""
    if path in record.data.local:
        part.find(path, "missing", f"{str(error).rstrip('.')}; {_if_moved(part.name)}")
    else:
        part.unchecked = str(error)


def _is_gone(part: Part, record: RunRecord, place: str | None, role: str) -> bool:
    """Whether a folder beside the pictures is no longer there, which is a finding of its own."""
    gone = place is not None and place in record.places.values() and not Path(place).is_dir()
    if gone:
        part.find(str(place), "missing", _if_moved(role))
    return gone


def _picture(part: Part, line: dict[str, Any], row: Row, data: DataConfig) -> None:
    name = row.name
    caption = data.captioning.of(row.caption) if row.caption is None or isinstance(row.caption, str) else None
    if caption is None:
        part.find(name, "missing", "its caption")
    elif digest_of_text(caption) != line["caption"]:
        part.find(name, "changed", "its caption")
    for read, digest, what in (
        (row.read, line["picture"], "the picture"),
        (row.condition, line["condition"], "its condition"),
        (row.mask, line.get("mask"), "its mask"),
    ):
        if digest is None or read is None:
            continue
        try:
            content = read(data.max_pixels * BYTES_PER_PIXEL)
        except (OSError, UserError) as error:
            part.find(name, "missing", f"{what} cannot be read ({error})")
            continue
        if hashlib.sha256(content).hexdigest() != digest:
            part.find(name, "changed", what)


def _bank(record: RunRecord, bank: BankRecord, recipe: Recipe) -> Part:
    """The bank's manifest against the run's fingerprint of it, and each shard against the manifest."""
    fingerprint = record.fingerprints.bank
    part, folder = Part("bank"), Path(bank.folder)
    if bank.pictures:
        return _bank_of_pictures(fingerprint, recipe, part, folder, record.classes is not None)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shards, prompts = dict(manifest["shards"]), manifest["prompts"]
    except FileNotFoundError:
        part.find(str(folder / "manifest.json"), "missing", _if_moved("bank"))
        return part
    except (OSError, ValueError, KeyError, TypeError):
        part.find(str(folder / "manifest.json"), "changed", "it cannot be read")
        return part
    part.checked = 1
    if digest_of(manifest) != fingerprint:
        part.find("manifest.json", "changed", "it is of another bank, or was edited")
    there = {p.name: p for p in sorted(folder.iterdir()) if not p.name.startswith(".")}
    for name in ("manifest.json", FILE):
        there.pop(name, None)
    compare_files(part, {**shards, "prompts.jsonl": prompts}, there)
    return part


def _bank_of_pictures(fingerprint: str | None, recipe: Recipe, part: Part, folder: Path, has_classes: bool) -> Part:
    """Real source pictures, which are one thing: that one of them changed is told, not which."""
    try:
        pictures = pictures_of_bank(folder, recipe.data, has_classes)
    except UserError as error:
        part.find(str(folder), "changed" if folder.is_dir() else "missing", f"{error} ({_if_moved('bank')})")
        return part
    part.checked = len(pictures)
    earlier = {"source": str(folder), "pictures": pictures.fingerprint}  # an earlier version counted its place
    if fingerprint not in (digest_of({"pictures": pictures.fingerprint}), digest_of(earlier)):
        part.find(str(folder), "changed", "a picture or a caption in it, or their order")
    return part
