"""What there is to measure on one GPU, in half an hour and without a network: one JSON and one table.

    python tests/gpu/measure.py --peers peers --output results     # on the GPU, from the folder of `make gpu-pack`
    python tests/gpu/measure.py --tiny --output build/gpu-tiny     # the same at tiny sizes, on a CPU

Every part is a command of its own with a limit of time: a part that fails, or takes too long, is written down with what
it said, and the others go on. A second call leaves out what is done. Models have random weights and are made there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT, TABLE = "gpu.json", "gpu.md"
LEAST = 20.0  # seconds that a part is not begun without
CLI = [sys.executable, "-m", "difftuning_control.cli"]
KINDS = ("lora", "controlnet")


@dataclass(frozen=True)
class Part:
    """A command, and where it leaves its result.

    Args:
        name: as the table has it.
        command: that is run in the checkout.
        minutes: that it may take.
        result: the JSON that it leaves; what it printed last where there is none.
    """

    name: str
    command: list[str]
    minutes: float
    result: Path | None = None


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how much of it."""

    models: tuple[str, ...] = ("sd15", "sdxl")
    batches: tuple[int, ...] = (1, 4, 8)
    rounds: int = 1
    steps: int = 10
    precision: str = "bf16"
    compilers: tuple[str, ...] = ("inductor",)
    flags: tuple[str, ...] = ()
    quantization: str = "nf4"
    tests: tuple[str, ...] = ("tests",)
    benchmark: bool = True
    recipes: tuple[str, ...] = ()  # cases of recipes.py; all when empty
    minutes: float = 4.0  # of one benchmark


TINY = Sizes(
    models=("sd15",),
    batches=(1,),
    rounds=1,
    steps=1,
    precision="no",
    compilers=(),
    flags=("--small=true", "--threads=1"),
    quantization="",
    tests=("tests/objective/test_noise.py",),
    benchmark=False,
    recipes=("z_image_lora, float8", "--small"),
    minutes=20.0,
)


def parts(sizes: Sizes, output: Path, peers: Path | None) -> list[Part]:
    """All parts, those first that are worth most."""

    def bench(name: str, what: str, model: str, **more: Any) -> Part:
        return _bench(name, sizes, output, what, size=model, peers=peers if what != "bank" else None, **more)

    first, *others = sizes.batches
    found = [_bench("flux", sizes, output, "flux", quantization=sizes.quantization)]
    for model in sizes.models:
        found += [bench(f"{model} {what}", what, model) for what in ("bank", "total")]
        found += [bench(f"{model} {kind}, batch {first}", kind, model, batch_size=first) for kind in KINDS]
    cases = ["--only", *sizes.recipes] if sizes.recipes else []
    told = ["--work", str(output / "recipes"), "--output", str(output / "recipes.json"), *cases]
    found.append(Part("recipes", [sys.executable, "tests/gpu/recipes.py", *told], 3 * sizes.minutes))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.tests]
    found.append(Part("tests", tests, 8.0))
    for model in sizes.models:
        for compiler in sizes.compilers:
            name = f"{model} lora, batch {first}, {compiler}"
            found.append(bench(name, "lora", model, batch_size=first, compile=compiler))
        for batch in others:
            found += [bench(f"{model} {kind}, batch {batch}", kind, model, batch_size=batch) for kind in KINDS]
    if sizes.benchmark:
        cells = ["--cells", "lora-8", "--work", str(output / "pilot")]
        found.append(Part("embedded pilot", [sys.executable, "examples/emoji/adapters.py", *cells], 10.0))
    return found


def _bench(name: str, sizes: Sizes, output: Path, what: str, peers: Path | None = None, **more: Any) -> Part:
    """`difftune bench` in a folder of its own; models of a size are made once, and lie beside."""
    folder = output / _plain(name)
    flags = {
        "parts": json.dumps([what]),
        "rounds": sizes.rounds,
        "steps": sizes.steps,
        "mixed_precision": sizes.precision,
        "models": output / "models",
        "output": folder,
        "peers": peers or "",
        **more,
    }
    given = [f"--{key}={value}" for key, value in flags.items() if value != ""]
    return Part(name, [*CLI, "bench", *given, *sizes.flags, "--overwrite"], sizes.minutes, folder / "bench.json")


def _plain(name: str) -> str:
    """A part's name as that of a file."""
    return name.replace(", ", "-").replace(" ", "-")


@dataclass
class Pack:
    """Runs parts one after the other, and keeps what came of them.

    Args:
        output: folder of the results, and of what the parts work with.
        minutes: for all of them in this call.
        now: a clock, in seconds.
    """

    output: Path
    minutes: float = 30.0
    now: Callable[[], float] = time.monotonic
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / RESULT
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))["parts"]
        self._ends = self.now() + 60 * self.minutes

    def run(self, todo: Sequence[Part]) -> dict[str, Any]:
        """Run what is not done yet; returns what the JSON holds."""
        for part in todo:
            if self.found.get(part.name, {}).get("state") == "done":
                continue
            left = self._ends - self.now()
            if left < LEAST:
                self.found[part.name] = {"state": "left out", "said": "no time was left; call it again"}
            else:
                print(f"{part.name} …", flush=True)
                self.found[part.name] = self._run(part, min(left, 60 * part.minutes))
            self._write()
        return self._write()

    def _run(self, part: Part, limit: float) -> dict[str, Any]:
        """What came of one part, whatever happens in it."""
        log = self.output / f"{_plain(part.name)}.log"
        begun, state = self.now(), "done"
        with log.open("w", encoding="utf-8") as out:
            group = {"start_new_session": True} if os.name == "posix" else {}
            process = subprocess.Popen(part.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, **group)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                _end(process)
                code, state = None, "too long"
        if code:
            state = "failed"
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        values: dict[str, Any] = {"state": state, "seconds": round(self.now() - begun, 1), "said": " ".join(said)}
        if part.result is not None and part.result.is_file():
            found = json.loads(part.result.read_text(encoding="utf-8"))
            values |= {"parts": found["parts"], "settings": found["settings"]}
        return values

    def _write(self) -> dict[str, Any]:
        values = {"machine": machine(), "parts": self.found}
        path = self.output / RESULT
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
        (self.output / TABLE).write_text(table(values), encoding="utf-8")
        return values


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part with what it started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def machine() -> dict[str, Any]:
    """What all was measured on."""
    import torch

    from difftuning_control.runs.identity import versions

    found: dict[str, Any] = {"device": "cpu", "versions": versions(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory}
    return found


# --- the table --------------------------------------------------------------------------------------------------------

GIB = 2**30


def table(values: dict[str, Any]) -> str:
    """Markdown for docs/results.md: a row for each comparison, then what failed and what was left out."""
    said = values["machine"]
    lines = [
        f"On {said['device']}, torch {said['versions']['torch']}, diffusers {said['versions']['diffusers']}:",
        "",
        "| what | this trainer | diffusers | ratio | memory, this trainer | memory, diffusers |",
        "|---|---|---|---|---|---|",
    ]
    more = []
    for name, part in values["parts"].items():
        for kind, found in part.get("parts", {}).items():
            if kind in KINDS:
                lines.append(_against_peer(name, found))
            elif kind == "bank":
                ratios = ", ".join(f"{found[n]['ratio']:.2f} times a {n}" for n in ("loop of 1", "loop of 4"))
                lines.append(f"| {name}: pictures/s | {found['a_second']:.2f} | | {ratios} | | |")
            elif kind == "total":
                more.append(_total(name, found))
            elif kind == "flux":
                lines.append(
                    f"| {name} ({found['quantization'] or 'unquantised'}), added up from {found['units']} of "
                    f"{found['of_units']} units: s a step | {found['seconds_a_step']:.2f} | | | "
                    f"{found['peak_in_all'] / GIB:.1f} GiB | |"
                )
        if part["state"] != "done":
            more.append(f"- {name}: {part['state']} ({part['said']})")
        elif "parts" not in part:
            more.append(f"- {name}: {part['said']} ({part['seconds']:.0f} s)")
    return "\n".join([*lines, "", *more]) + "\n"


def _against_peer(name: str, found: dict[str, Any]) -> str:
    peaks = found["device_peak"] if found["device_peak"]["ours"] else found["peak"]
    speeds = [1 / found["seconds_steps"][side][0] for side in ("ours", "peer")]
    memory = [f"{peaks[side] / GIB:.1f} GiB" for side in ("ours", "peer")]
    shown = " | ".join([f"{speeds[0]:.2f}", f"{speeds[1]:.2f}", f"{found['wall']['ratio']:.2f}", *memory])
    return f"| {name}: steps/s | {shown} |"


def _total(name: str, found: dict[str, Any]) -> str:
    seconds = ", ".join(f"{side} {sorted(s)[len(s) // 2]:.0f} s" for side, s in found["seconds"]["wall"].items())
    ratios = ", ".join(f"{pair} {ratio:.2f}" for pair, ratio in found["ratios"]["wall"].items())
    how = ", added up from parts" if found["added_up"] else ""
    return f"- {name}, {found['steps']} steps of {found['rows']} rows{how}: {seconds}; {ratios}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="folder of gpu.json and gpu.md")
    parser.add_argument("--peers", type=Path, help="folder of diffusers' training scripts")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all parts together")
    parser.add_argument("--only", nargs="*", help="names of parts, or the words that they begin with")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    asked = parser.parse_args(given)
    todo = parts(TINY if asked.tiny else Sizes(), asked.output.resolve(), asked.peers and asked.peers.resolve())
    if asked.only:
        todo = [part for part in todo if part.name.startswith(tuple(asked.only))]
    if asked.list:
        print("\n".join(f"{part.name} ({part.minutes:g} min at most)" for part in todo))
        return
    values = Pack(asked.output.resolve(), asked.minutes).run(todo)
    print(table(values))


if __name__ == "__main__":
    main()
