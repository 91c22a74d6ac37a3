"""`difftune verify`: is all that a run or a pilot was made of, and all that it left, still what it was?

Every file is hashed anew, in pieces, and compared with what the run wrote down; no model is loaded and no picture
decoded, so the cost is that of reading all bytes once. `run.json` itself is vouched for by the audit's chain.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from difftuning_control.audit import FILE, Chain
from difftuning_control.pilot_files import SETTINGS
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.system.text import harmless
from difftuning_control.verify_pilot import verify_pilot
from difftuning_control.verify_run import Part, verify_run

SHOWN = 20  # findings of a part that are printed


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
