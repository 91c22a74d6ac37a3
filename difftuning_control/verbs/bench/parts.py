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
from difftuning_control.families.hub import best_device, in_precision
from difftuning_control.families.loading import DTYPES, embedded_model, load_family
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.bench import inputs as bench_inputs
from difftuning_control.verbs.bench import total as total_time
from difftuning_control.verbs.bench.layers import flux
from difftuning_control.verbs.bench.models import SMALL, sd15_sized, sdxl_sized
from difftuning_control.verbs.bench.price import price
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.bench.sides import OURS, Timed, ours, peer, ratio, run
from difftuning_control.verbs.bench.step_profile import ProfiledLoop, loop_of, step_in_turn
from difftuning_control.verbs.bench.total import job_steps
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse

Loop = TypeVar("Loop", bound=TrainingLoop)
SIDES = {"sd15": 512, "sdxl": 1024, "embedded": 64}
PICTURES = 4  # of the timed trainings


@dataclass(frozen=True)
class Setting:
    """The folders, model and pictures of all parts."""

    bench: Bench
    work: Path

    @property
    def side(self) -> int:
        return SIDES[self.bench.size] // (8 if self.bench.small else 1)

    @property
    def model(self) -> Path:
        if self.bench.size == "embedded":
            return embedded_model()
        make = sd15_sized if self.bench.size == "sd15" else sdxl_sized
        return make(self.models / (self.bench.size + SMALL * self.bench.small), self.bench.small)

    @property
    def models(self) -> Path:
        folder = Path(self.bench.models).resolve() if self.bench.models is not None else self.work
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def data(self) -> Path:
        return bench_inputs.pictures(self.work / f"pictures-{self.side}-edges", PICTURES, self.side, edges=True)

    @property
    def device(self) -> torch.device:
        """Where what runs in this process does so, as its own processes choose it."""
        return best_device()

    @property
    def more(self) -> dict[str, Any]:
        """Keys of this trainer's recipe that all parts share."""
        return {"training__mixed_precision": self.bench.mixed_precision, "training__compile": self.bench.compile}

    def ours(self, part: str, steps: int, rows: int | None = None) -> list[str]:
        """`difftune train` for so many steps."""
        rows = rows or self.bench.batch_size
        return ours(part, self.model, self.data, self.work, self.side, steps, rows, **self.more)

    def peer(self, part: str, data: Path, work: Path, steps: int, rows: int) -> list[str] | None:
        """diffusers' script for as many; None where it is not there."""
        script = Path(self.bench.peers or "") / (self.bench.script(part) or "")
        if self.bench.peers is None or not script.is_file():
            return None
        return peer(part, script, self.model, data, work, self.side, steps, rows, self.bench.mixed_precision)

    def run(self, command: list[str], name: str) -> Timed:
        return run(command, self.work / name, self.bench.threads)

    def loop(self, command: list[str], kind: type[Loop]) -> Loop:
        """The training loop of a `difftune train` command, in this process."""
        if self.bench.threads is not None:
            torch.set_num_threads(self.bench.threads)
        _, found = parse(command[len(OURS) :])
        return loop_of(only(Recipe, found), kind)

    @property
    def clock_name(self) -> str:
        """On one thread CPU time, which other jobs disturb less; it is not a GPU's."""
        return "cpu" if self.bench.threads == 1 and self.device.type == "cpu" else "wall"

    def clock(self) -> float:
        """Seconds by that clock."""
        return time.process_time() if self.clock_name == "cpu" else time.perf_counter()


def against_peer(setting: Setting, part: str) -> dict[str, Any]:
    """Steps a second against diffusers' script, ours with warm caches; what filling them cost is told beside."""
    bench, steps = setting.bench, setting.bench.steps + 1
    mine = setting.ours(part, steps)
    theirs = setting.peer(part, setting.data, setting.work, steps, bench.batch_size)
    assert theirs is not None
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
        "device_peak": {"peer": max(a.device_peak for a, _ in rounds), "ours": max(b.device_peak for _, b in rounds)},
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
    loops = [setting.loop(command, TrainingLoop) for command in (plain, tuned)]
    each = bench.steps
    by_plain, by_tuned = step_in_turn(loops, bench.rounds * each, setting.clock)
    parts = [slice(n * each, (n + 1) * each) for n in range(bench.rounds)]
    return {"clock": setting.clock_name, "rows": rows, **ratio([(by_plain[p], by_tuned[p]) for p in parts])}


def bank(setting: Setting) -> dict[str, Any]:
    """Pictures a second of the bank against a loop over the stock pipeline, a prompt a call and four (DreamBooth's)."""

    if setting.bench.threads is not None:
        torch.set_num_threads(setting.bench.threads)
    on_gpu, dtype = setting.device.type == "cuda", DTYPES[setting.bench.mixed_precision]
    count = 64 if setting.bench.size == "embedded" else 32 if on_gpu else 2
    family = load_family(str(setting.model), dtype).to(setting.device)
    request = BankRequest([f"disc {i}" for i in range(count)], count, steps=10, resolution=setting.side)
    pipe = DiffusionPipeline.from_pretrained(setting.model, **in_precision(dtype)).to(setting.device)
    pipe.set_progress_bar_config(disable=True)
    together = BankConfig().batch_for(setting.side)

    def build() -> None:
        shutil.rmtree(setting.work / "timed-bank", ignore_errors=True)
        KnowledgeBank.build(family, setting.work / "timed-bank", request, batch_size=together)

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
    for number in range(setting.bench.rounds + 1):
        for name, draw in sides.items():
            begun = setting.clock()
            draw()
            ended = setting.clock()
            if number:  # the first round warms up
                seconds[name].append(ended - begun)
    return {
        "pictures": count,
        "clock": setting.clock_name,
        "a_second": count / median(seconds["bank"]),
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
    name = f"pictures-{setting.side}-{total_time.PICTURES}"
    data = bench_inputs.pictures(setting.work / name, total_time.PICTURES, setting.side)
    theirs = setting.peer("lora", data, work, done, rows)
    mine = ours("lora", setting.model, data, work, setting.side, done, rows, **setting.more)
    few = total_time.FEW if setting.device.type == "cpu" else total_time.FEW_ON_GPU
    return total_time.Job(steps, done, rows, work, mine, theirs, setting.run, few).measure(bench.rounds)


def profile(setting: Setting) -> dict[str, float]:
    """Where the time of a LoRA's step goes, in shares of its CPU time."""

    return setting.loop(setting.ours("lora", 1), ProfiledLoop).measure(setting.bench.steps)


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "lora": lambda setting: against_peer(setting, "lora"),
    "controlnet": lambda setting: against_peer(setting, "controlnet"),
    "difftuning": difftuning,
    "bank": bank,
    "startup": startup,
    "memory": memory,
    "profile": profile,
    "total": total,
    "price": price,
    "flux": flux,
}
