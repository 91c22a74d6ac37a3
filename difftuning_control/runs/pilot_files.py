"""What a pilot leaves in its folder and in those of its runs, and how that comes into records that can be verified."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from difftuning_control.evaluation.pilot_figures import VOTE
from difftuning_control.runs.audit import Session, read_audit
from difftuning_control.runs.manifest import files_of_run
from difftuning_control.runs.pilot_record import RESULT, SETTINGS, PilotRecord
from difftuning_control.runs.record import RECORD, read_run
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import AUDIT

REPORT = "report.html"
VOUCHED = (RESULT, REPORT, VOTE)  # by the pilot's audit; the settings go on changing
ADDED = re.compile(r"(figures|guidance|outside)\.json|pictures-(\d+|outside)/.*")  # to the folder of a run


@contextmanager
def kept_aside(run: Path) -> Iterator[None]:
    """Holds what the pilot added to a run's folder while the run is trained again, which ends with the same weights."""
    aside = run.with_name(f".{run.name}-aside")  # what a stop left there comes back as well
    for name, path in files_of_run(run):
        if ADDED.fullmatch(name):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside / name)
    yield
    for path in [p for p in aside.rglob("*") if p.is_file()]:
        place = run / path.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(aside, ignore_errors=True)


def settle(run: Path) -> None:
    """Take into a run's record what the pilot added to its folder and took away, and have its audit vouch for that.

    All else keeps the hash that the run gave it. A run that diverged has no such record.
    """
    record = read_run(run)
    if record is None or not record.is_complete:
        return
    there = dict(files_of_run(run))
    files = {n: h for n, h in (record.files or {}).items() if n in there or not n.startswith("step-")}
    files |= {n: digest_of_file(p) for n, p in there.items() if ADDED.fullmatch(n)}
    now = replace(record, files=files, discarded=sorted(n for n in record.outputs if n not in there))
    chain = read_audit(run)
    if chain.has_another(run):  # an edited record is not vouched for
        return
    if now == record and chain.is_ended and chain.last_hash_of(RECORD) == digest_of_file(run / RECORD):
        return
    with Session(run) as session:
        session.begin(digest_of_file(run / "recipe.yaml"))
        now.write(run)
        session.artefacts = {RECORD: digest_of_file(run / RECORD)}


def records_of(output: Path) -> dict[str, str]:
    """The hash of every run's record, by the run's folder below the pilot's."""
    return {place.relative_to(output).as_posix(): digest_of_file(place / RECORD) for place in _runs(output)}


def files_of_pilot(output: Path) -> dict[str, Path]:
    """The pilot's own files by name; runs and the bank have records of theirs."""
    files = {}
    for folder, names in _walk(output):
        for name in names:
            if not name.startswith(".") and not (folder == output and name in (SETTINGS, AUDIT, *VOUCHED)):
                files[(folder / name).relative_to(output).as_posix()] = folder / name
    return files


def write_pilot(record: PilotRecord, output: Path) -> None:
    """Write a pilot's record, with the hashes of its own files and of its runs' records."""
    record.files = {name: digest_of_file(path) for name, path in files_of_pilot(output).items()}
    record.records = records_of(output)
    record.write(output)


def _runs(output: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(output):
        folders.sort()
        if RECORD in names:
            folders.clear()
            yield Path(place)


def _walk(output: Path) -> Iterator[tuple[Path, list[str]]]:
    for place, folders, names in os.walk(output):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if place != str(output) and (RECORD in names or "manifest.json" in names):
            folders.clear()
        else:
            yield Path(place), sorted(names)
