"""What may change when a run is resumed, and what that makes of its identity.

Length, learning rate and its schedule may change, and whatever only watches. A run that was changed is no longer bit-
equal to an undisturbed one, so its identity becomes another: a digest of the recipe's and of all changes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe, recipe_of
from difftuning_control.runs.places import located
from difftuning_control.runs.record import identity_settings, read_run, rows_of_step
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
        changes: all changes, the newest last: `step`, `identity` before it, `keys` with both values, and whether the
            optimizer's state was `kept` or begins `anew`.
        finished: the record of a run that is finished and stays as it is.
        reopened: the record of a finished run that goes on from its result.
        is_new: whether the last of the changes was made just now.
    """

    identity: str
    changes: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] | None = None
    reopened: dict[str, Any] | None = None
    is_new: bool = False

    @property
    def said(self) -> list[str]:
        """What is to be told of a change that was made just now."""
        return change_lines(self.changes[-1]) if self.is_new else []

    @property
    def earlier(self) -> tuple[str, ...]:
        """Identities that checkpoints of this run may bear from before a change."""
        return tuple(change["identity"] for change in self.changes)


def resumption(
    output: Path,
    recipe: Recipe,
    fingerprints: dict[str, Any],
    identity: str,
    processes: int,
    checkpoint: int | None,
) -> Resumption:
    """How the run in a folder goes on under a recipe.

    Args:
        recipe: with paths as they are today, but bank.prompts as it is written.
        fingerprints: of the inputs as they are today.
        identity: of the recipe on them.
        checkpoint: the step of the newest checkpoint.

    Raises:
        UserError: naming all that must not have changed, key by key with both values.
    """
    record = read_run(output)
    if record is None:
        return Resumption(identity)
    before, now = record.get("rows_per_step"), rows_of_step(recipe, processes)
    if before not in (None, now):
        raise UserError(
            f"the run in {output} had {before} rows to a step, and here they are {now} on {processes} processes; "
            "choose training.batch_size and training.gradient_accumulation_steps so that they are the same."
        )
    changes, complete = record.get("changes", []), record["status"] == "complete"
    if record["identity"] == continued(identity, changes):
        return Resumption(record["identity"], changes, record if complete else None)
    keys = _allowed(output, record, recipe, fingerprints)
    done = record["steps"] if complete else checkpoint
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
    change = {"step": done, "identity": record["identity"], "keys": keys, "optimizer": "anew" if complete else "kept"}
    changes = [*changes, change]
    return Resumption(continued(identity, changes), changes, None, record if complete else None, True)


def continued(identity: str, changes: list[dict[str, Any]]) -> str:
    """The identity of a run that was changed on its way."""
    return digest_of([identity, changes]) if changes else identity


def _allowed(
    output: Path, record: dict[str, Any], recipe: Recipe, fingerprints: dict[str, Any]
) -> dict[str, list[Any]]:
    """What has changed and may, by key with both values."""
    today = located(record, output)
    today["recipe"]["bank"]["prompts"] = record["recipe"]["bank"]["prompts"]  # the bank's own digest tells of these
    differing = dict(_differing(record, today, recipe))
    refused = [f"{key} was {a!r} and is {b!r}" for key, (a, b) in differing.items() if key not in CHANGEABLE]
    for name, found in fingerprints.items():
        if record["fingerprints"].get(name) != found:
            refused.append(f"{PARTS[name]} {'have' if PARTS[name].endswith(('s', 'on')) else 'has'} changed")
    if not differing and not refused:
        refused.append("the run is of another version")
    if refused:
        raise UserError(
            f"the run in {output} had another recipe, base or data: {'; '.join(refused)}; only "
            f"{', '.join(CHANGEABLE)} and {WATCHING} may change; resume with the same, begin a new run with --from "
            f"{output}, or start afresh with --overwrite."
        )
    return differing


def _differing(record: dict[str, Any], today: dict[str, Any], recipe: Recipe) -> Iterator[tuple[str, list[Any]]]:
    """Keys that decide the weights and have other values than before, in the recipe's order."""
    old, new = _settings(recipe_of(today), record), _settings(recipe, None)
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            yield key, [old.get(key), new.get(key)]


def _settings(recipe: Recipe, record: dict[str, Any] | None) -> dict[str, Any]:
    """What decides the weights, by dotted key; of the file of a schedule its digest."""
    path, digest = recipe.tuning.schedule.file, None
    if path is not None and record is not None:
        kept = record.get("sources", {}).get("schedule", {}).get("files") or {}
        digest = next(iter(kept.values()), None)
    elif path is not None:
        digest = digest_of_file(Path(path).expanduser())
    return dict(_flat(identity_settings(recipe, {"path": digest})))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def change_lines(change: dict[str, Any]) -> list[str]:
    """What is said of a change, in sentences."""
    keys = ", ".join(f"{key} {a} → {b}" for key, (a, b) in change["keys"].items())
    lines = [f"from step {change['step']} on: {keys}; the run is no longer bit-equal to an undisturbed one."]
    if change["optimizer"] == "anew":
        lines.append("a finished run keeps no optimizer state: it goes on from its result with a fresh one.")
    return lines
