"""The knowledge bank: samples of the pretrained model, drawn before tuning, that retention trains on.

A bank is a directory of safetensors shards and a manifest. Latents are stored as the sampler left them, never decoded
and encoded again. Item i depends on the bank's seed and on i alone, so an interrupted or distributed build ends with
the same items; across batch sizes they are equal up to floating-point rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.system.digests import DIGEST, digest_of, digest_of_file
from difftuning_control.system.durable import alone, place, sweep, write_json
from difftuning_control.system.rows import Files, Rows, StoredFile, open_checked
from difftuning_control.system.tensors import write_checked

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

SHARD = 64
FORMAT = 1


@dataclass(frozen=True)
class BankRequest:
    """What a bank should hold.

    Args:
        prompts: item i is drawn for prompt i mod len(prompts); [""] for unconditional samples.
        size: number of items.
        guidance_scale: classifier-free guidance while sampling, in diffusers' convention (1 is none).
        steps: sampling steps of the pipeline's own scheduler.
        resolution: side in pixels.
        seed: of the whole bank.
    """

    prompts: Sequence[str] = ("",)
    size: int = 1000
    guidance_scale: float = 1.5
    steps: int = 25
    resolution: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('a bank needs at least one prompt; give [""] for unconditional samples.')
        for name, least in (("size", 1), ("steps", 1), ("resolution", 8), ("guidance_scale", 0)):
            if getattr(self, name) < least:
                raise UserError(f"the bank's {name} is {getattr(self, name)}; expected at least {least}.")

    def prompt_of(self, item: int) -> str:
        return self.prompts[item % len(self.prompts)]

    def seed_of(self, item: int) -> int:
        """The seed of one item's generator, a number below 2⁶³."""
        return int(np.random.SeedSequence([self.seed, item]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def identity(self, family: Family) -> dict[str, Any]:
        """Everything that an item's latents depend on."""
        return {
            "format": FORMAT,
            "base": family.fingerprints,
            "dtype": str(family.dtype),
            "scheduler": family.sampler_settings(),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "resolution": self.resolution,
            "seed": self.seed,
            "size": self.size,
            "prompts": digest_of(list(self.prompts)),
        }


@dataclass(frozen=True)
class KnowledgeBank:
    """Latents of the pretrained model's samples, (N, C, h, w) float32 in the denoiser's scale, and their prompts.

    Of a bank on disk they stay there, and what is indexed is read; `latents[:]` are all of them as a tensor.
    `sizes` (N, 6) are those of `Framing.sizes` where the bank is of real pictures and the family takes them.

    Raises:
        UserError: if there are no latents, or another number of prompts, seeds or sizes.
    """

    latents: Tensor | Rows
    prompts: list[str]
    seeds: list[int] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sizes: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.latents)
        found = {"prompts": len(self.prompts)}
        found |= {"seeds": len(self.seeds)} if self.seeds else {}
        found |= {"sizes": len(self.sizes)} if self.sizes is not None else {}
        wrong = [f"{n} {name}" for name, n in found.items() if n != count]
        if not count or wrong:
            raise UserError(f"a bank has {' and '.join([f'{count} latents', *wrong])}; expected as many, at least 1.")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def fingerprint(self) -> str:
        """Of what it holds, wherever it lies."""
        return digest_of({k: v for k, v in self.manifest.items() if k != "source"})

    def retained_prompts(self, kind: str) -> list[str]:
        """What the items are trained and measured with: `own`, or the empty prompt for all (`empty`)."""
        return self.prompts if kind == "own" else [""] * len(self)

    def __getitem__(self, items: Tensor) -> Tensor:
        """The latents of the items (n,) long, (n, C, h, w): what `DiffTuningObjective.add_bank_rows` asks for."""
        return self.latents[items]

    def part(self, start: int, length: int) -> KnowledgeBank:
        """Items start … start + length − 1."""
        rows = slice(start, start + length)
        sizes = self.sizes[rows] if self.sizes is not None else None
        return replace(
            self,
            latents=self.latents.narrow(0, start, length),
            prompts=self.prompts[rows],
            seeds=self.seeds[rows],
            sizes=sizes,
        )

    @classmethod
    def build(
        cls,
        family: Family,
        folder: str | Path,
        request: BankRequest,
        *,
        batch_size: int = 32,
        advance: Callable[[int], object] = lambda count: None,
        process_index: int = 0,
        num_processes: int = 1,
        wait: Callable[[], object] = lambda: None,
    ) -> KnowledgeBank:
        """Sample the pretrained model and store the bank in `folder`; a complete bank there is loaded instead.

        Shards already written by an interrupted build are kept. With several processes each draws its own shards and
        `wait` is their barrier; process 0 completes the bank.

        Args:
            batch_size: items sampled at once.
            advance: told of the number of items done.

        Raises:
            UserError: if `folder` holds another bank, or something that is no bank.
        """
        folder = Path(folder)
        identity = request.identity(family)
        if (folder / "manifest.json").exists():
            bank = cls.load(folder, base=family)
            differing = [k for k, v in identity.items() if bank.manifest["identity"].get(k) != v]
            if differing:
                raise UserError(
                    f"{folder} holds a bank with another {', '.join(differing)}; choose another folder or delete it."
                )
            advance(request.size)
            return bank
        partial = folder.with_name(f".{folder.name}.{digest_of(identity)}.partial")
        if folder.exists() and any(folder.glob("bank-*.safetensors")):
            raise UserError(f"{folder} holds a bank without its manifest.json; delete it to build it again.")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no bank; choose another folder for the bank.")
        with alone(folder) if process_index == 0 else nullcontext():
            wait()  # until no other job is at it; perhaps that one has completed the bank
            if not (folder / "manifest.json").exists():
                partial.mkdir(exist_ok=True)
                for shard in range(process_index, -(-request.size // SHARD), num_processes):
                    _build_shard(family, request, partial, shard, batch_size, advance)
            wait()
            if process_index == 0 and not (folder / "manifest.json").exists():
                _complete(family, request, identity, partial, folder)
            wait()
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path, base: Family | None = None) -> KnowledgeBank:
        """A complete bank, each shard checked against the manifest's hash.

        Args:
            base: the model about to be tuned; a bank of another base is refused.

        Raises:
            UserError: if there is no complete bank, a shard is missing or damaged, or the base is another one.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            identity, names = manifest["identity"], manifest["shards"]
            files = names | {"prompts.jsonl": manifest["prompts"]}
            if any(Path(name).name != name for name in files):
                raise ValueError("a shard that lies elsewhere")
            damaged = DIGEST in manifest and manifest[DIGEST] != _digest_of_manifest(manifest)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder} holds no complete bank (no readable manifest.json); delete it to build it again."
            ) from None
        if damaged:
            raise UserError(f"{folder}/manifest.json is damaged; delete the bank {folder} and build it again.")
        if base is not None:
            _check_base(folder, identity, base)
        for name, digest in files.items():
            path = folder / name
            if not path.exists() or digest_of_file(path) != digest:
                state = "is damaged" if path.exists() else "is missing"
                raise UserError(f"{path} {state}; delete the bank {folder} and build it again.")
        latents = Files([StoredFile(folder / name) for name in names]).rows("latents")
        prompts = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in prompts]
        return cls(latents, [r["prompt"] for r in rows], [r["seed"] for r in rows], manifest, folder)

    @classmethod
    def from_latents(
        cls, latents: Tensor | Rows, prompts: list[str], source: str, digest: str, sizes: Tensor | None = None
    ) -> KnowledgeBank:
        """A bank of real source pictures, given as latents in the denoiser's scale."""
        return cls(latents, prompts, manifest={"source": source, "pictures": digest}, sizes=sizes)


def _build_shard(
    family: Family,
    request: BankRequest,
    folder: Path,
    shard: int,
    batch_size: int,
    advance: Callable[[int], object],
) -> None:
    path = folder / f"bank-{shard:05d}.safetensors"
    items = range(shard * SHARD, min((shard + 1) * SHARD, request.size))
    if open_checked(path) is not None:
        advance(len(items))
        return
    parts = []
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        generators = [torch.Generator().manual_seed(request.seed_of(i)) for i in chunk]
        latents = family.sample(
            [request.prompt_of(i) for i in chunk],
            generators,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            resolution=request.resolution,
        )
        parts.append(latents.cpu())
        advance(len(chunk))
    write_checked(path, {"latents": torch.cat(parts)})


def _complete(family: Family, request: BankRequest, identity: dict[str, Any], partial: Path, folder: Path) -> None:
    sweep(partial)
    shards = sorted(partial.glob("bank-*.safetensors"))
    rows = [{"item": i, "prompt": request.prompt_of(i), "seed": request.seed_of(i)} for i in range(request.size)]
    lines = [json.dumps(row) for row in rows]
    (partial / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "identity": identity,
        "model": str(getattr(family.pipe.config, "_name_or_path", "")),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "shards": {path.name: digest_of_file(path) for path in shards},
        "prompts": digest_of_file(partial / "prompts.jsonl"),
    }
    write_json(partial / "manifest.json", manifest | {DIGEST: _digest_of_manifest(manifest)})
    if folder.exists():
        folder.rmdir()
    place(partial, folder)


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    return digest_of({k: v for k, v in manifest.items() if k != DIGEST})


def _check_base(folder: Path, identity: dict[str, Any], base: Family) -> None:
    differing = [name for name, value in base.fingerprints.items() if identity["base"].get(name) != value]
    if differing:
        raise UserError(
            f"the bank {folder} was drawn from another base (its {', '.join(differing)} differ); "
            "build a bank of this base, or name the right one."
        )
    if identity["dtype"] != str(base.dtype):
        raise UserError(
            f"the bank {folder} was drawn in {identity['dtype']}, the base is loaded in {base.dtype}; use one dtype."
        )
