"""What `difftune bench` measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from difftuning_control.errors import UserError
from difftuning_control.system.home import expand_paths

Part = Literal["lora", "controlnet", "difftuning", "bank", "startup", "memory", "profile", "total"]
PEERS = {"lora": "train_text_to_image_lora.py", "controlnet": "train_controlnet.py"}


@dataclass
class Bench:
    """What to time, on which model, and how often.

    Args:
        parts: lora and controlnet stand against diffusers' scripts, difftuning against plain tuning, bank against a
            loop over the stock pipeline, startup against the script; memory compares 10 pictures with many, profile
            says where a step's time goes, and total compares whole commands, with the script where peers has it.
        peers: folder with train_text_to_image_lora.py and train_controlnet.py of diffusers' examples; you fetch them.
        size: sd15 for randomly initialised weights of Stable Diffusion 1.5's size at 512 pixels, or embedded.
        rounds: each side runs so often, in turn.
        steps: optimizer steps that are timed in a round, after one that is not.
        batch_size: rows of a step.
        pictures: of the larger data set of `memory`.
        total_steps: of the trainings of `total`; when empty 200 of 10 rows (embedded), or 800 of 5 rows (sd15).
        threads: of torch, for all sides; its own choice when empty.
        output: folder of bench.json and of the runs.
    """

    parts: list[Part] = field(default_factory=lambda: ["difftuning", "bank", "startup", "profile"])
    peers: str | None = None
    size: Literal["sd15", "embedded"] = "embedded"
    rounds: int = 3
    steps: int = 4
    batch_size: int = 1
    pictures: int = 10_000
    total_steps: int | None = None
    threads: int | None = None
    output: str = "runs/bench"

    def __post_init__(self) -> None:
        expand_paths(self, "peers", "output")
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
            if part in PEERS and self.peers is None:
                raise UserError(f"{part} is compared with diffusers' {PEERS[part]}; name its folder by --peers.")
            if part in PEERS and not (Path(self.peers or "") / PEERS[part]).is_file():
                raise UserError(f"{self.peers} holds no {PEERS[part]}; fetch it from diffusers' examples.")
