"""`difftune verify`: is all that a run or a pilot was made of, and all that it left, still what it was?

Every file is hashed anew, in pieces, and compared with what the run wrote down; no model is loaded and no picture
decoded, so the cost is that of reading all bytes once. `run.json` itself is vouched for by the audit's chain.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from difftuning_control.audit import FILE, Chain
from difftuning_control.errors import UserError
from difftuning_control.pilot_files import SETTINGS
from difftuning_control.verify_pilot import verify_pilot
from difftuning_control.verify_run import Part, verify_run
from difftuning_control.words import harmless

PARTS = ("record", "audit", "outputs", "base", "controlnet", "schedule", "data", "validation", "bank")
SHOWN = 20  # findings of a part that are printed


@dataclass(frozen=True)
class VerifyRequest:
    """Check that all that a run was made of, and all that it left, is still what it was: difftune verify RUN.

    Args:
        run: folder of a finished run, or of a finished pilot.
        head: a hash of the audit's chain that was kept elsewhere; the chain must still have it.
        skip: parts to leave out: base, controlnet, schedule, data, validation, bank.
        strict: what cannot be checked, or is left out, counts as changed.
        json: print the result as JSON.
    """

    run: str
    head: str | None = None
    skip: list[str] = field(default_factory=list)
    strict: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        if self.head is not None and re.fullmatch(r"[0-9a-f]{64}", self.head) is None:
            raise UserError(f"head is {harmless(self.head)!r}; expected the 64 hexadecimal digits of a line's hash.")
        strange = [name for name in self.skip if name not in PARTS[3:]]
        if strange:
            raise UserError(f"skip names {harmless(strange[0])!r}; expected any of {', '.join(PARTS[3:])}.")


def verify(request: VerifyRequest) -> dict[str, Any]:
    """What `--json` prints: `status` (same or changed), `unchecked` (names of parts), `parts`, `head` and `torn`.

    Raises:
        UserError: if there is no finished run, and no finished pilot.
    """
    folder = Path(request.run)
    if (folder / SETTINGS).is_file():
        parts, chain = verify_pilot(folder, request.skip, request.head)
    else:
        parts, chain = verify_run(folder, request.skip, request.head)
    return _result(request, parts, chain)


def _result(request: VerifyRequest, found: list[Part], chain: Chain) -> dict[str, Any]:
    unchecked = [part.name for part in found if part.unchecked is not None]
    changed = any(part.findings for part in found) or (request.strict and bool(unchecked))
    return {
        "run": request.run, "status": "changed" if changed else "same", "unchecked": unchecked,
        "parts": [{"part": p.name, "state": p.state, **{k: v for k, v in asdict(p).items() if k != "name"}}
                  for p in found],
        "head": chain.head, "torn": chain.torn,
    }  # fmt: skip


# --- what is printed ------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as text, at most 20 findings of each part."""
    lines = []
    for part in result["parts"]:
        said = f": {harmless(part['unchecked'])}" if part["unchecked"] else ""
        state = {"same": "as it was", "changed": f"{len(part['findings'])} differ", "unchecked": "not checked"}
        lines.append(f"{part['part']:<11}{part['checked']:>8}  {state[part['state']]}{said}")
        for found in part["findings"][:SHOWN]:
            more = f" ({harmless(found['said'])})" if found["said"] else ""
            lines.append(f"  {found['what']:<8} {harmless(found['item'])}{more}")
        if len(part["findings"]) > SHOWN:
            lines.append(f"  … and {len(part['findings']) - SHOWN} more")
    if result["torn"]:
        lines.append(f"note: {result['torn']} line of {FILE} was cut off while it was written, as by a power cut.")
    lines.append(f"head of the audit: {result['head'] or 'none'}")
    return "\n".join(lines)
