"""A run while it trains, from what lies in its folder: how far it is, its losses, its pictures, its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftuning_control.evaluation.report.lines import Line, line_chart
from difftuning_control.evaluation.report.training import BAND, ROLES, loss_chart
from difftuning_control.runs.history import METRICS, read_history
from difftuning_control.runs.record import RECORD, read_run
from difftuning_control.verbs.ui.files import picture_address
from difftuning_control.verbs.ui.jobs import RUNNING, STOPPED, TRAINING, Job, Jobs
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import render

WIDE, NARROW = 900, 380
MOST_GRIDS = 4


def jobs_table(places: Places, jobs: list[Job], chosen: str | None) -> str:
    """What the page started, the newest first."""
    rows = [(job, places.name(Path(job.output))) for job in jobs]
    return render("jobs", rows=rows, chosen=chosen)


def progress(places: Places, job: Job | None) -> str:
    """How far a job is, with the losses and the bands of a training."""
    if job is None:
        return render("progress", job=None, name="", done=0, end=0, latest={}, charts=[], bands=[])
    run = Path(job.output)
    record = read_run(run) if job.verb in TRAINING else None
    history = _history(run) if record is not None else []
    end = 0 if record is None else int(record.recipe_values.get("training", {}).get("max_steps", 0))
    return render(
        "progress",
        job=job,
        name=places.name(run),
        done=max((row["step"] for row in history), default=0),
        end=end,
        latest={ROLES[r]: v for r in ROLES if (v := _last(history, f"{r}_loss")) is not None},
        charts=[(cls, loss_chart(run, width)) for cls, width in (("wide", WIDE), ("narrow", NARROW)) if history],
        bands=[chart for role in ROLES if (chart := _bands(history, role))],
    )


def pictures(job: Job | None) -> str:
    """The grids of a training, the newest first: the pretrained model's pictures above those of the step."""
    folder = Path(job.output) / "samples" if job is not None and job.verb in TRAINING else None
    grids = sorted(folder.glob("step-*.png"), reverse=True)[:MOST_GRIDS] if folder is not None else []
    return render("grids", grids=[(int(p.stem[5:]), picture_address(p, 1536)) for p in grids])


def stopping(job: Job) -> str:
    """What a job does that was told to stop."""
    if job.state == STOPPED:
        return "It is taken out of the queue."
    return "It saves a checkpoint, and ends." if job.verb in TRAINING else "It ends; what it had begun is not whole."


def log(jobs: Jobs, job: Job | None) -> str:
    """The end of what a job printed."""
    return render("text", title="", good=True, text=jobs.log(job) if job is not None else "")


def changed(job: Job | None) -> tuple[Any, ...]:
    """A value that differs whenever there is something new to show of a job."""
    if job is None:
        return ()
    run = Path(job.output)
    return (job.name, job.state, *(_time(p) for p in (run / RECORD, run / METRICS, run / "samples")))


def chosen_job(jobs: list[Job], name: str | None) -> Job | None:
    """The one of a name; else what runs now, or the newest."""
    running = [job for job in jobs if job.state == RUNNING]
    named = [job for job in jobs if job.name == name]
    return next(iter([*named, *running, *jobs]), None)


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _history(run: Path) -> list[dict[str, Any]]:
    try:
        return [row for row in read_history(run) if isinstance(row.get("step"), int)]
    except (OSError, ValueError, AttributeError):  # not begun, or half written
        return []


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(history) if key in row), None)


def _bands(history: list[dict[str, Any]], role: str) -> tuple[str, str] | None:
    """The losses on held-out rows by noise level: earlier steps faint, the last one full."""
    found: dict[int, dict[float, float]] = {}
    for row in history:
        bands = {float(m[2]): v for key, v in row.items() if (m := BAND.fullmatch(key)) and m[1] == role}
        if bands:
            found[row["step"]] = bands
    if not found:
        return None
    steps = list(found)
    lines = [
        Line(
            f"step {step}", sorted(found[step]), [found[step][u] for u in sorted(found[step])], role, step != steps[-1]
        )
        for step in steps
    ]
    title = f"{ROLES[role]}: loss by noise level u at step {steps[-1]}, earlier ones faint"
    return title, line_chart(title, lines, "noise level u", None, 460, 220)
