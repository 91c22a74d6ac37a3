"""What a verb prints of a finished run: its losses, where the time went, fidelity, gates, and what to do next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from difftuning_control.runs.gate_results import GateResults
from difftuning_control.runs.gates import stop_if_failed
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.terminal import sample_command, say


def print_run(run: RunRecord, output: str) -> None:
    """What came of a training, and whether it passes its gates.

    Raises:
        GatesFailedError: if it fails one.
    """
    from accelerate import PartialState  # saves torch for the verbs that train nothing

    from difftuning_control.training.phases import spent_line

    if not PartialState().is_main_process:
        return
    say(f"done: {output} ({run.status})")
    for role, losses in run.losses.items():
        say(f"  validation loss on {role}: base {losses.base.mean:.4f}, tuned {losses.tuned.mean:.4f}")
    if run.phases is not None:
        say(f"  {spent_line(run.phases)}")
    _print_control(run)
    _print_places(run, output)
    print_gates(run.gates)
    stop_if_failed(run.gates, output)


def print_gates(judged: GateResults | None) -> None:
    """Each gate and whether it was passed; nothing where none was judged."""
    if judged is not None:
        for name, line in judged.lines.items():
            say(f"  gate {'passed' if judged.figures[name].passed else 'FAILED'}: {line}")


def _print_control(run: RunRecord) -> None:
    """How well a ControlNet follows its conditions, and on which pictures nothing was found."""
    if run.control is None:
        return
    blank = run.control.blank
    if blank:
        names = ", ".join(blank[:5]) + (", …" if len(blank) > 5 else "")
        say(f"note: the annotator found nothing on {len(blank)} of {run.data.pictures} pictures: {names}")
    curve = run.fidelity
    if curve is None:
        return
    name, change = curve.main, curve.convergence
    said = "no convergence that can be told from noise"
    if change is not None:
        way = "suddenly" if change.sudden else "gradually"
        said = f"converged {way} at step {change.step:.0f} (from {change.start:.0f} to {change.end:.0f})"
    say(
        f"  fidelity on held-out conditions ({curve.kind}, {name}): without control {curve.without[name]:.3f}, "
        f"after {curve.steps[-1]} steps {curve.values[-1]:.3f}; {said}"
    )


def _print_places(run: RunRecord, output: str) -> None:
    """Where to look, and what to do next."""
    samples = Path(output) / "samples"
    if samples.is_dir():
        say(f"  pictures: {samples}")
    say(f"  report: {Path(output) / 'report.html'}")
    control = " --control photo.png" if run.control is not None else ""
    say(f"next: {sample_command(output, run.prompts or (), control)}")
    if run.control is None:
        asked = shlex.quote(json.dumps([output]))
        say(f"      difftune evaluate --runs {asked}   (what it still draws for other prompts, among others)")
