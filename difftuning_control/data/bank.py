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
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from torch import Tensor

from difftuning_control.data.bank_draft import MANIFEST, BankDraft, digest_of_manifest
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import Solver
from difftuning_control.system.digests import DIGEST, digest_of, digest_of_file
from difftuning_control.system.durable import alone
from difftuning_control.system.processes import ALONE, Share
from difftuning_control.system.rows import Files, Rows, StoredFile

if TYPE_CHECKING:
    from difftuning_control.data.bank_growth import GrowingBank
    from difftuning_control.families.family import Family

FORMAT = 1


def retained_prompt(kind: str, own: str, turn: int) -> str:
    """The prompt of a retention row: `own`, the `empty` one, or `both`: its own in even turns, the empty one in odd."""
    return own if kind == "own" or (kind == "both" and turn % 2 == 0) else ""


def retained_prompts(kind: str, own: Sequence[str]) -> list[str]:
    """What rows are measured with: their `own` prompts, the `empty` one, or `both` in turn."""
    return [retained_prompt(kind, prompt, turn) for turn, prompt in enumerate(own)]


@dataclass(frozen=True)
class BankRequest:
    """What a bank should hold.

    Args:
        prompts: item i is drawn for prompt i mod len(prompts); [""] for unconditional samples.
        size: number of items.
        guidance_scale: classifier-free guidance while sampling, in diffusers' convention (1 is none).
        steps: sampling steps.
        resolution: side in pixels.
        seed: of the whole bank.
        solver: own is the pipeline's own scheduler, dpmsolver++ DPM-Solver++, for models that predict noise or v.
    """

    prompts: Sequence[str] = ("",)
    size: int = 1000
    guidance_scale: float = 1.5
    steps: int = 25
    resolution: int = 512
    seed: int = 0
    solver: Solver = "own"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('a bank needs at least one prompt; give [""] for unconditional samples.')
        if self.solver not in get_args(Solver):
            raise UserError(f"the bank's solver is {self.solver!r}; expected any of {', '.join(get_args(Solver))}.")
        for name, least in (("size", 1), ("steps", 1), ("resolution", 8), ("guidance_scale", 0)):
            if getattr(self, name) < least:
                raise UserError(f"the bank's {name} is {getattr(self, name)}; expected at least {least}.")

    def prompt_of(self, item: int) -> str:
        return self.prompts[item % len(self.prompts)]

    def seed_of(self, item: int) -> int:
        """The seed of one item's generator, a number below 2⁶³."""
        return int(np.random.SeedSequence([self.seed, item]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def identity(self, family: Family) -> dict[str, Any]:
        """Everything that an item's latents depend on.

        Raises:
            UserError: if the solver is not for this model.
        """
        return {
            "format": FORMAT,
            "base": family.fingerprints,
            "dtype": str(family.dtype),
            "scheduler": family.sampler_settings(self.solver),
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
    `sizes` (N, 6) are those of `Framing.sizes` where the bank is of real pictures and the family takes them. `growing`
    draws the items of a bank that was not whole when it was opened, see `GrowingBank`.

    Raises:
        UserError: if there are no latents, or another number of prompts, seeds or sizes.
    """

    latents: Tensor | Rows
    prompts: list[str]
    seeds: list[int] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sizes: Tensor | None = None
    growing: GrowingBank | None = None

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
        """Of what it holds, wherever it lies.

        Raises:
            RuntimeError: if it is not whole, so that nobody knows what it is going to hold.
        """
        if not self.is_whole:
            raise RuntimeError("a bank has no fingerprint before it is whole.")
        return digest_of({k: v for k, v in self.manifest.items() if k != "source"})

    @property
    def files(self) -> list[StoredFile]:
        """The shards of a bank that was loaded."""
        assert isinstance(self.latents, Rows)
        return self.latents.files.files

    @property
    def is_whole(self) -> bool:
        return self.growing is None or self.growing.is_whole

    def retained_prompts(self, kind: str) -> list[str]:
        """What the items are measured with, as `retained_prompts` says."""
        return retained_prompts(kind, self.prompts)

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
        share: Share = ALONE,
    ) -> KnowledgeBank:
        """Sample the pretrained model and store the bank in `folder`; a complete bank there is loaded instead.

        Shards already written by an interrupted build are kept. With several processes each draws its own shards, and
        process 0 completes the bank.

        Args:
            batch_size: items sampled at once.
            advance: told of the number of items done.
            share: this process's part of the work.

        Raises:
            UserError: if `folder` holds another bank, or something that is no bank.
        """
        draft = BankDraft(family, request, Path(folder), batch_size)
        draft.check_folder()
        if share.agreed(draft.is_whole):
            advance(request.size)
            return cls.of(draft)
        with alone(draft.folder) if share.index == 0 else nullcontext():
            share.wait()  # until no other job is at it; perhaps that one has completed the bank
            if not draft.is_whole:
                for shard in share.numbers(len(draft.shards)):
                    if draft.there(shard) is None:
                        draft.draw(shard)
                    advance(len(draft.shards[shard]))
            share.wait()
            if share.index == 0 and not draft.is_whole:
                draft.complete()
            share.wait()
        return cls.load(draft.folder)

    @classmethod
    def of(cls, draft: BankDraft) -> KnowledgeBank:
        """The whole bank that lies where a draft's is wanted.

        Raises:
            UserError: if it is another one.
        """
        bank = cls.load(draft.folder, base=draft.family)
        differing = [k for k, v in draft.identity.items() if bank.manifest["identity"].get(k) != v]
        if differing:
            raise UserError(
                f"{draft.folder} holds a bank with another {', '.join(differing)}; choose another folder or delete it."
            )
        return bank

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
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            identity, names = manifest["identity"], manifest["shards"]
            files = names | {"prompts.jsonl": manifest["prompts"]}
            if any(Path(name).name != name for name in files):
                raise ValueError("a shard that lies elsewhere")
            damaged = DIGEST in manifest and manifest[DIGEST] != digest_of_manifest(manifest)
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
