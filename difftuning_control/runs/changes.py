"""What may change when a run is resumed, and what that makes of its identity.

Length, learning rate and its schedule may change, and whatever only watches. A run that was changed is no longer bit-
equal to an undisturbed one, so its identity becomes another: a digest of the recipe's and of all changes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import identity_settings, rows_of_step
from difftuning_control.runs.places import located
from difftuning_control.runs.record import RunRecord, read_run
from difftuning_control.runs.record_sections import ANEW, KEPT, Change, Fingerprints
from difftuning_control.system.digests import digest_of, digest_of_file

CHANGEABLE = (
    "training.max_steps",
    "training.learning_rate",
    "training.lr_scheduler",
    "training.lr_warmup_steps",
    "adapter.text_encoder_learning_rate",
)
WATCHING = "how often it saves, samples and validates"
PARTS = {
    "base": "the base's weights",
    "data": "the pictures or captions to tune on",
    "held_out": "the held-out pictures or captions",
    "bank": "the knowledge bank",
    "probe": "the conditions that fidelity is measured on",
    "control": "how conditions are made",
    "controlnet": "the ControlNet that training started from",
    "begin": "the weights that training began from",
}


@dataclass(frozen=True)
class Resumption:
    """How a run goes on.

    Args:
        identity: of the run from now on.
        changes: all changes, the newest last.
        finished: the record of a run that is finished and stays as it is.
        reopened: the record of a finished run that goes on from its result.
        is_new: whether the last of the changes was made just now.
    """

    identity: str
    changes: list[Change] = field(default_factory=list)
    finished: RunRecord | None = None
    reopened: RunRecord | None = None
    is_new: bool = False

    @property
    def said(self) -> list[str]:
        """What is to be told of a change that was made just now."""
        return change_lines(self.changes[-1]) if self.is_new else []

    @property
    def earlier(self) -> tuple[str, ...]:
        """Identities that checkpoints of this run may bear from before a change."""
        return tuple(change.identity for change in self.changes)


def resumption(
    output: Path,
    recipe: Recipe,
    fingerprints: Fingerprints,
    identity: str,
    processes: int,
    checkpoint: int | None,
) -> Resumption:
    """How the run in a folder goes on under a recipe.

    Args:
        recipe: with paths as they are today, but bank.prompts as it is written.
        fingerprints: of the inputs as they are today; that of the bank is None where it is still to be drawn.
        identity: of the recipe on them.
        checkpoint: the step of the newest checkpoint.

    Raises:
        UserError: naming all that must not have changed, key by key with both values.
    """
    record = read_run(output)
    if record is None:
        return Resumption(identity)
    _check_rows(output, record, recipe, processes)
    changes, complete = record.changes, record.is_complete
    if record.identity == continued(identity, changes):
        return Resumption(record.identity, changes, record if complete else None)
    growing = record.bank is not None and None in (record.fingerprints.bank, fingerprints.bank)
    if growing and checkpoint is None and not complete:  # then or now the bank was not whole
        _allowed(output, record, recipe, replace(fingerprints, bank=record.fingerprints.bank), growing)
        return Resumption(identity)
    keys = _allowed(output, record, recipe, fingerprints)
    done = record.steps if complete else checkpoint
    if done is None:  # nothing was trained that could be kept
        return Resumption(identity)
    if recipe.training.max_steps < done or (complete and recipe.training.max_steps == done):
        raise UserError(
            f"the run in {output} has done {done} steps, and training.max_steps is {recipe.training.max_steps}; give "
            f"more than {done} to go on, or begin a new run from its weights with --from {output}."
        )
    if complete and recipe.method == "controlnet" and recipe.adapter.on == "controlnet":
        raise UserError(
            f"the run in {output} is finished, and its LoRA is merged into its ControlNet, where training cannot go on "
            f"as it was; begin a new run from its weights with --from {output}."
        )
    change = Change(step=done, identity=record.identity, keys=keys, optimizer=ANEW if complete else KEPT)
    changes = [*changes, change]
    return Resumption(continued(identity, changes), changes, None, record if complete else None, True)


def refuse_changed(output: Path, recipe: Recipe, processes: int) -> None:
    """Refuse, before anything is drawn or encoded, what `resumption` would refuse by the recipe alone.

    Raises:
        UserError: naming all that must not have changed, key by key with both values.
    """
    record = read_run(output)
    if record is None:
        return
    _check_rows(output, record, recipe, processes)
    # what a schedule's file says is compared later
    old, new = (dict(_flat(identity_settings(r, {"path": None}))) for r in (_today(record, output), recipe))
    if refused := [_was(key, *values) for key, values in _differing(old, new) if key not in CHANGEABLE]:
        raise _refusal(output, refused)


def _check_rows(output: Path, record: RunRecord, recipe: Recipe, processes: int) -> None:
    before, now = record.rows_per_step, rows_of_step(recipe, processes)
    if before not in (None, now):
        raise UserError(
            f"the run in {output} had {before} rows to a step, and here they are {now} on {processes} processes; "
            "choose training.batch_size and training.gradient_accumulation_steps so that they are the same."
        )


def continued(identity: str, changes: list[Change]) -> str:
    """The identity of a run that was changed on its way."""
    return digest_of([identity, [change.to_dict() for change in changes]]) if changes else identity


def _allowed(
    output: Path, record: RunRecord, recipe: Recipe, fingerprints: Fingerprints, growing: bool = False
) -> dict[str, list[Any]]:
    """What has changed and may, by key with both values; `growing` where the identity may be another for the bank's
    sake alone."""
    differing = dict(_differing(_settings(_today(record, output), record), _settings(recipe, None)))
    refused = [_was(key, *values) for key, values in differing.items() if key not in CHANGEABLE]
    before = record.fingerprints.to_dict()
    for name, digest in fingerprints.to_dict().items():
        if before.get(name) != digest:
            refused.append(f"{PARTS[name]} {'have' if PARTS[name].endswith(('s', 'on')) else 'has'} changed")
    if not differing and not refused and not growing:
        refused.append("the run is of another version")
    if refused:
        raise _refusal(output, refused)
    return differing


def _today(record: RunRecord, output: Path) -> Recipe:
    """The record's recipe with paths as they are today, but bank.prompts as it was written, since its digest tells."""
    today = located(record, output).recipe
    return replace(today, bank=replace(today.bank, prompts=record.recipe.bank.prompts))


def _was(key: str, before: Any, now: Any) -> str:
    return f"{key} was {before!r} and is {now!r}"


def _refusal(output: Path, refused: list[str]) -> UserError:
    return UserError(
        f"the run in {output} had another recipe, base or data: {'; '.join(refused)}; only "
        f"{', '.join(CHANGEABLE)} and {WATCHING} may change; resume with the same, begin a new run with --from "
        f"{output}, or start afresh with --overwrite."
    )


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Keys that decide the weights and have other values than before, in the recipe's order."""
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            yield key, [old.get(key), new.get(key)]


def _settings(recipe: Recipe, record: RunRecord | None) -> dict[str, Any]:
    """What decides the weights, by dotted key; of the file of a schedule its digest."""
    path, digest = recipe.tuning.schedule.file, None
    if path is not None and record is not None:
        source = (record.sources or {}).get("schedule")
        files = (source.files if source is not None else None) or {}
        digest = next(iter(files.values()), None)
    elif path is not None:
        digest = digest_of_file(Path(path).expanduser())
    return dict(_flat(identity_settings(recipe, {"path": digest})))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def change_lines(change: Change) -> list[str]:
    """What is said of a change, in sentences."""
    keys = ", ".join(f"{key} {a} → {b}" for key, (a, b) in change.keys.items())
    lines = [f"from step {change.step} on: {keys}; the run is no longer bit-equal to an undisturbed one."]
    if change.optimizer == ANEW:
        lines.append("a finished run keeps no optimizer state: it goes on from its result with a fresh one.")
    return lines
