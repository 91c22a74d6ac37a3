"""`difftune verify`: is all that a run or a pilot was made of, and all that it left, still what it was?

Every file is hashed anew, in pieces, and compared with what the run wrote down; no model is loaded and no picture
decoded, so the cost is that of reading all bytes once. `run.json` itself is vouched for by the audit's chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.requests import Moved, VerifyRequest
from difftuning_control.runs.audit import FILE, Chain, read_audit
from difftuning_control.runs.kept import place_of_run
from difftuning_control.runs.pilot_files import VOUCHED, files_of_pilot, records_of
from difftuning_control.runs.pilot_record import RESULT, SETTINGS, PilotRecord, read_pilot
from difftuning_control.runs.record import RECORD, RunRecord, read_run
from difftuning_control.runs.verify_run import EARLIER, Part, audit_part, compare_files, verify_run
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.text import harmless

SHOWN = 20  # findings of a part that are printed


def verify(request: VerifyRequest) -> dict[str, Any]:
    """What `--json` prints: `status` (same or changed), `unchecked` (names of parts), `parts`, `head` and `torn`.

    Raises:
        UserError: if there is no finished run, and no finished pilot.

    Of a step that a run kept (`RUN/step-000010`) the whole run is verified.
    """
    folder = place_of_run(request.run)[0]
    if (folder / SETTINGS).is_file():
        parts, chain = verify_pilot(folder, request.skip, request.head, request.moved)
    else:
        parts, chain = verify_run(folder, request.skip, request.head, moved=request.moved)
    return _result(request, parts, chain)


def _result(request: VerifyRequest, parts: list[Part], chain: Chain) -> dict[str, Any]:
    unchecked = [part.name for part in parts if part.unchecked is not None]
    changed = any(part.findings for part in parts) or (request.strict and bool(unchecked))
    return {
        "run": request.run,
        "status": "changed" if changed else "same",
        "unchecked": unchecked,
        "parts": [
            {"part": p.name, "state": p.state, **{k: v for k, v in asdict(p).items() if k != "name"}} for p in parts
        ],
        "head": chain.head,
        "torn": chain.torn,
    }


# --- what is printed ------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as text, at most 20 findings of each part."""
    lines = []
    for part in result["parts"]:
        said = f": {harmless(part['unchecked'])}" if part["unchecked"] else ""
        state = {"same": "as it was", "changed": f"{len(part['findings'])} differ", "unchecked": "not checked"}
        lines.append(f"{part['part']:<11}{part['checked']:>8}  {state[part['state']]}{said}")
        for finding in part["findings"][:SHOWN]:
            more = f" ({harmless(finding['said'])})" if finding["said"] else ""
            lines.append(f"  {finding['what']:<8} {harmless(finding['item'])}{more}")
        if len(part["findings"]) > SHOWN:
            lines.append(f"  … and {len(part['findings']) - SHOWN} more")
    if result["torn"]:
        lines.append(f"note: {result['torn']} line of {FILE} was cut off while it was written, as by a power cut.")
    lines.append(f"head of the audit: {result['head'] or 'none'}")
    return "\n".join(lines)


OWN = ("record", "audit", "outputs")  # of each run


def verify_pilot(
    output: Path, skip: Iterable[str] = (), head: str | None = None, moved: Moved | None = None
) -> tuple[list[Part], Chain]:
    """The parts of a pilot, those of its inputs, and one for each run; and the pilot's audit.

    Raises:
        UserError: if the pilot is not finished.
    """
    chain, record = read_audit(output), Part("record")
    vouched = {name: chain.last_hash_of(name) for name in VOUCHED}
    for name, digest in vouched.items():
        if digest is not None:
            record.checked += 1
            if not (output / name).is_file():
                record.find(name, "missing")
            elif digest_of_file(output / name) != digest:
                record.find(name, "changed", f"its hash is not the one in {FILE}")
    if vouched[RESULT] is None and not (output / RESULT).is_file():
        raise UserError(f"the pilot {output} is not finished; give the same command again, it goes on.")
    pilot = read_pilot(output)
    if pilot is None:
        if not record.findings:
            record.find(RESULT, "changed", "it cannot be read")
        return [record, audit_part(chain, head)], chain
    outputs = Part("outputs")
    if pilot.files is None:
        record.unchecked = outputs.unchecked = EARLIER.replace("the run", "the pilot")
    else:
        compare_files(outputs, pilot.files, files_of_pilot(output))
    runs = _runs(output, pilot, skip, outputs, moved)
    return [record, audit_part(chain, head), outputs, *runs], chain


def _runs(output: Path, pilot: PilotRecord, skip: Iterable[str], outputs: Part, moved: Moved | None) -> list[Part]:
    inputs: dict[str, Part] = {}
    runs, seen, there = [], set[str](), records_of(output)
    records = pilot.records if pilot.records is not None else there
    for name, digest in records.items():
        part = Part(name, 1)
        runs.append(part)
        if there.get(name) != digest:
            said = "the pilot left another" if name in there else ""
            part.find(RECORD, "changed" if name in there else "missing", said)
            continue
        run = read_run(output / name)
        if run is not None and not run.is_complete:
            continue  # it diverged, and left nothing
        relocated = partial(_relocated, old=pilot.output, output=output)
        for of_run in verify_run(output / name, skip, None, seen, relocated, moved)[0]:
            if of_run.name in OWN:
                part.checked += of_run.checked
                part.findings += of_run.findings
                part.unchecked = part.unchecked or of_run.unchecked
            elif of_run.name in inputs:
                inputs[of_run.name].checked += of_run.checked
                inputs[of_run.name].findings += of_run.findings
            else:
                inputs[of_run.name] = of_run
    for name in there.keys() - records.keys():
        outputs.find(name, "added", "a run")
    return [*inputs.values(), *runs]


def _relocated(record: RunRecord, old: str, output: Path) -> RunRecord:
    """The record of a run whose bank and schedule lie in the pilot's folder, wherever that was moved."""

    def now(place: str) -> str:
        inside = Path(place).is_relative_to(old) and not Path(place).exists()
        return str(output / Path(place).relative_to(old)) if inside else place

    bank, sources = record.bank, record.sources or {}
    if bank is not None:
        bank = replace(bank, folder=now(bank.folder))
    if "schedule" in sources:
        sources = sources | {"schedule": replace(sources["schedule"], id=now(sources["schedule"].id))}
    return replace(record, bank=bank, sources=sources if record.sources is not None else None)
