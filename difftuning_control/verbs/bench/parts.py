"""Each part of the benchmark: both sides in turn, round by round, so that a noisy machine is noisy for both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.families.loading import embedded_model, load_family
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.bench import inputs as bench_inputs
from difftuning_control.verbs.bench import total as total_time
from difftuning_control.verbs.bench.settings import PEERS, Bench
from difftuning_control.verbs.bench.sides import OURS, Timed, ours, peer, ratio, run
from difftuning_control.verbs.bench.step_profile import ProfiledLoop, loop_of, step_in_turn
from difftuning_control.verbs.bench.total import job_steps
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse

Loop = TypeVar("Loop", bound=TrainingLoop)
SIDES = {"sd15": 512, "embedded": 64}
PICTURES = 4  # of the timed trainings


@dataclass(frozen=True)
class Setting:
    """The folders, model and pictures of all parts."""

    bench: Bench
    work: Path

    @property
    def side(self) -> int:
        return SIDES[self.bench.size]

    @property
    def model(self) -> Path:
        return embedded_model() if self.bench.size == "embedded" else bench_inputs.sd15_sized(self.work / "sd15")

    @property
    def data(self) -> Path:
        return bench_inputs.pictures(self.work / "pictures", PICTURES, self.side, edges=True)

    def ours(self, part: str, steps: int, rows: int | None = None) -> list[str]:
        """`difftune train` for so many steps."""
        return ours(part, self.model, self.data, self.work, self.side, steps, rows or self.bench.batch_size)

    def run(self, command: list[str], name: str) -> Timed:
        return run(command, self.work / name, self.bench.threads)


def against_peer(setting: Setting, part: str) -> dict[str, Any]:
    """Steps a second against diffusers' script, ours with warm caches; what filling them cost is told beside."""
    bench, steps = setting.bench, setting.bench.steps + 1
    assert bench.peers is not None
    mine = setting.ours(part, steps)
    theirs = peer(part, bench.peers, setting.model, setting.data, setting.work, setting.side, steps, bench.batch_size)
    shutil.rmtree(setting.work / "cache", ignore_errors=True)
    one = setting.ours(part, 1)
    cold, warm = setting.run(one, "cold"), setting.run(one, "warm")
    rounds: list[tuple[Timed, Timed]] = []
    for number in range(bench.rounds):
        rounds.append((setting.run(theirs, f"peer-{part}-{number}"), setting.run(mine, f"ours-{part}-{number}")))
    result: dict[str, Any] = {
        "wall": ratio([(a.steps, b.steps) for a, b in rounds]),
        "cpu": ratio([(a.cpu, b.cpu) for a, b in rounds]),
        "first_step": {
            "peer": median(a.first_step or 0.0 for a, _ in rounds),
            "ours": median(b.first_step or 0.0 for _, b in rounds),
        },
        "peak": {"peer": max(a.peak for a, _ in rounds), "ours": max(b.peak for _, b in rounds)},
        "caching": {"seconds": cold.seconds - warm.seconds, "pictures": PICTURES},
    }
    for clock in ("steps", "cpu"):
        result[f"seconds_{clock}"] = {
            name: [median(getattr(r[i], clock)) for r in rounds] for i, name in enumerate(("peer", "ours"))
        }
    return result


def difftuning(setting: Setting) -> dict[str, Any]:
    """A step with a share of bank rows against a plain one of as many rows, step by step in turn in one process."""

    bench, rows = setting.bench, max(setting.bench.batch_size, 5)
    plain = setting.ours("lora", 1, rows)
    bank = {
        "tuning.retention_ratio": 0.2,
        "tuning.retention_weight": 0.1,
        "bank.size": 8,
        "bank.steps": 2,
        "bank.path": setting.work / "bank",
    }
    shared = [flag for flag in plain if not flag.startswith("--tuning.")]
    tuned = [*shared, *(f"--{k}={v}" for k, v in bank.items()), '--tuning.schedule={"kind": "power", "tau": 1.0}']
    loops = [_loop(setting, command, TrainingLoop) for command in (plain, tuned)]
    each = bench.steps
    by_plain, by_tuned = step_in_turn(loops, bench.rounds * each, _clock(setting))
    parts = [slice(n * each, (n + 1) * each) for n in range(bench.rounds)]
    return {"clock": _clock_name(setting), "rows": rows, **ratio([(by_plain[p], by_tuned[p]) for p in parts])}


def _loop(setting: Setting, command: list[str], kind: type[Loop]) -> Loop:
    """The training loop of a `difftune train` command, in this process."""

    if setting.bench.threads is not None:
        torch.set_num_threads(setting.bench.threads)
    _, found = parse(command[len(OURS) :])
    return loop_of(only(Recipe, found), kind)


def _clock_name(setting: Setting) -> str:
    """On one thread CPU time, which other jobs disturb less."""
    return "cpu" if setting.bench.threads == 1 else "wall"


def _clock(setting: Setting) -> Callable[[], float]:
    return time.process_time if _clock_name(setting) == "cpu" else time.perf_counter


def bank(setting: Setting) -> dict[str, Any]:
    """Pictures a second of the bank against a loop over the stock pipeline, a prompt a call and four (DreamBooth's)."""

    if setting.bench.threads is not None:
        torch.set_num_threads(setting.bench.threads)
    count = 64 if setting.bench.size == "embedded" else 2
    family = load_family(str(setting.model))
    request = BankRequest([f"disc {i}" for i in range(count)], count, steps=10, resolution=setting.side)
    pipe = DiffusionPipeline.from_pretrained(setting.model)
    pipe.set_progress_bar_config(disable=True)

    def build() -> None:
        shutil.rmtree(setting.work / "timed-bank", ignore_errors=True)
        KnowledgeBank.build(family, setting.work / "timed-bank", request)

    def loop(together: int) -> Callable[[], None]:
        def draw() -> None:
            for start in range(0, count, together):
                prompts = [request.prompt_of(i) for i in range(start, min(start + together, count))]
                pipe(
                    prompts,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    height=setting.side,
                    width=setting.side,
                )

        return draw

    sides = {"bank": build, "loop of 1": loop(1), "loop of 4": loop(4)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    clock = _clock(setting)
    for number in range(setting.bench.rounds + 1):
        for name, draw in sides.items():
            begun = clock()
            draw()
            ended = clock()
            if number:  # the first round warms up
                seconds[name].append(ended - begun)
    return {
        "pictures": count,
        "clock": _clock_name(setting),
        **{
            name: ratio([([a], [b]) for a, b in zip(seconds[name], seconds["bank"])])
            for name in sides
            if name != "bank"
        },
    }


def startup(setting: Setting) -> dict[str, Any]:
    """Seconds from the command to the end of the first step, with warm caches."""
    command = setting.ours("lora", 1)
    setting.run(command, "warm")
    found = [setting.run(command, f"startup-{n}").first_step or 0.0 for n in range(setting.bench.rounds)]
    return {"seconds": median(found), "least": min(found), "most": max(found)}


def memory(setting: Setting) -> dict[str, Any]:
    """The most memory of each command on ten pictures and on many, in bytes."""
    found: dict[str, dict[str, int]] = {}
    for count in (10, setting.bench.pictures):
        data = bench_inputs.pictures(setting.work / f"pictures-{count}", count, 64)
        judged = bench_inputs.pictures(setting.work / f"judged-{count}", count, 64, seed=1)  # that no run was tuned on
        work = setting.work / f"memory-{count}"
        train = ours("lora", embedded_model(), data, work, 64, 2, 4)[2:]
        control = [
            "--method=controlnet",
            "--control.annotator=canny",
            "--control.fidelity.every=0",
            f"--output={work}/controlnet",
        ]
        study = [f"--data.path={data}", f"--data.cache={work}/cache", "--bank.size=16", "--bank.steps=2", "--overwrite"]
        few = ["--pictures=8", "--steps=2", "--seeds=[0]", "--overwrite", f"--output={work}/evaluation"]
        commands = {
            "train": train,
            "train controlnet": [
                *[f for f in train if not f.startswith(("--method", "--output", "--adapter"))],
                *control,
            ],
            "bank": ["bank", *[f for f in study if f != "--overwrite"]],
            "analyze": ["analyze", *study, f"--output={work}/analysis", "--analysis.rows=16"],
            "evaluate": ["evaluate", f'--runs=["{work}/ours-lora"]', f"--data={judged}", f"--source={data}", *few],
        }
        for name, command in commands.items():
            timed = setting.run([*OURS, *command], f"memory-{count}-{name.replace(' ', '-')}")
            found.setdefault(name, {})[str(count)] = timed.peak
    return found


def total(setting: Setting) -> dict[str, Any]:
    """From the command to the saved LoRA."""
    bench, work = setting.bench, setting.work / "total"
    steps, done, rows = job_steps(bench)
    data = bench_inputs.pictures(setting.work / f"pictures-{total_time.PICTURES}", total_time.PICTURES, setting.side)
    script = Path(bench.peers or "") / PEERS["lora"]
    theirs = None
    if bench.peers is not None and script.is_file():
        theirs = peer("lora", bench.peers, setting.model, data, work, setting.side, done, rows)
    mine = ours("lora", setting.model, data, work, setting.side, done, rows)
    return total_time.Job(steps, done, rows, work, mine, theirs, setting.run).measure(bench.rounds)


def profile(setting: Setting) -> dict[str, float]:
    """Where the time of a LoRA's step goes, in shares of its CPU time."""

    return _loop(setting, setting.ours("lora", 1), ProfiledLoop).measure(setting.bench.steps)


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "lora": lambda setting: against_peer(setting, "lora"),
    "controlnet": lambda setting: against_peer(setting, "controlnet"),
    "difftuning": difftuning,
    "bank": bank,
    "startup": startup,
    "memory": memory,
    "profile": profile,
    "total": total,
}
