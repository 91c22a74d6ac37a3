"""What `difftune bench` measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import Quantization
from difftuning_control.recipe.training import Precision
from difftuning_control.system.home import expand_paths

Part = Literal["lora", "controlnet", "difftuning", "bank", "startup", "memory", "profile", "total", "price", "flux"]
PEERS = {"lora": "train_text_to_image_lora.py", "controlnet": "train_controlnet.py"}
PEERS_XL = {"lora": "train_text_to_image_lora_sdxl.py", "controlnet": "train_controlnet_sdxl.py"}


@dataclass
class Bench:
    """What to time, on which model, and how often.

    Args:
        parts: lora and controlnet stand against diffusers' scripts, difftuning against plain tuning, bank against a
            loop over the stock pipeline; startup is the time to this trainer's first step, memory compares 10 pictures
            with many, profile says where a step's time goes, and total compares whole commands, with the script where
            peers has it. price adds a whole run up from parts that are timed one by one, for a model too large for
            total on a CPU. flux times FLUX.1's layers, at two depths, and adds up what all of them take.
        peers: folder with train_text_to_image_lora.py and train_controlnet.py of diffusers' examples, or their sdxl
            siblings; you fetch them.
        size: sd15 for randomly initialised weights of Stable Diffusion 1.5's size at 512 pixels, sdxl for those of XL's
            at 1024, or embedded.
        small: a tenth of the width of these, and an eighth of the side, to try a benchmark out.
        mixed_precision: of all sides: no, bf16 or fp16.
        compile: training.compile of this trainer; nothing when empty.
        quantization: of the transformer of flux: nf4, int8, float8, or nothing when empty.
        rounds: each side runs so often, in turn.
        steps: optimizer steps that are timed in a round, after one that is not.
        batch_size: rows of a step.
        pictures: of the larger data set of `memory`.
        total_steps: of the trainings of total and price; when empty 200 of 10 rows (embedded), or 800 of 5 rows (sd15).
        threads: of torch, for all sides; its own choice when empty.
        models: folder of the models that are made, for several benchmarks; output when empty.
        output: folder of bench.json and of the runs.
    """

    parts: list[Part] = field(default_factory=lambda: ["difftuning", "bank", "startup", "profile"])
    peers: str | None = None
    size: Literal["sd15", "sdxl", "embedded"] = "embedded"
    small: bool = False
    mixed_precision: Precision = "no"
    compile: Literal["inductor", "aot_eager"] | None = None
    quantization: Quantization | None = None
    rounds: int = 3
    steps: int = 4
    batch_size: int = 1
    pictures: int = 10_000
    total_steps: int | None = None
    threads: int | None = None
    models: str | None = None
    output: str = "runs/bench"

    def __post_init__(self) -> None:
        expand_paths(self, "peers", "models", "output")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise UserError(f"parts is {self.parts}; give those to be measured, each once.")
        for name, least in (
            ("rounds", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("pictures", 11),
            ("threads", 1),
            ("total_steps", 3),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; expected at least {least}.")
        for part in self.parts:
            script = self.script(part)
            if script is not None and self.peers is None:
                raise UserError(f"{part} is compared with diffusers' {script}; name its folder by --peers.")
            if script is not None and not (Path(self.peers or "") / script).is_file():
                raise UserError(f"{self.peers} holds no {script}; fetch it from diffusers' examples.")
        if self.small and self.size == "embedded" and self.parts != ["flux"]:
            raise UserError("small is of sizes sd15 and sdxl, and of flux; the embedded model is small.")
        if self.quantization is not None and "flux" not in self.parts:
            raise UserError("quantization is of the part flux; leave it out.")

    def script(self, part: str) -> str | None:
        """The file of diffusers' script that a part is compared with; None where it is compared with none."""
        return (PEERS_XL if self.size == "sdxl" else PEERS).get(part)
