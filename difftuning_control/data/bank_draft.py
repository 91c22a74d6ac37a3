"""A knowledge bank that is not whole yet: its shards, drawn in any order into a temporary folder beside its own.

A shard is what is drawn at once. Item i depends on the bank's seed and on i alone, and a shard on nothing but its own
items, so the bank is the same in whichever order its shards are drawn, and by whom.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.errors import UserError
from difftuning_control.system.digests import DIGEST, digest_of, digest_of_file
from difftuning_control.system.durable import PARTIAL, hidden, place, sweep, write_json
from difftuning_control.system.rows import StoredFile, open_checked
from difftuning_control.system.tensors import write_checked

if TYPE_CHECKING:
    from difftuning_control.data.bank import BankRequest
    from difftuning_control.families.family import Family

MOST = 64  # items of a shard
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BankDraft:
    """A bank that is to be drawn. Who draws shards is alone at that, see `durable.alone`.

    Args:
        folder: where the bank is going to lie.
        batch_size: items sampled at once.
    """

    family: Family
    request: BankRequest
    folder: Path
    batch_size: int = 32

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.request.identity(self.family)

    @cached_property
    def shards(self) -> list[range]:
        """The items of each shard."""
        size, step = self.request.size, min(self.batch_size, MOST)
        return [range(start, min(start + step, size)) for start in range(0, size, step)]

    @property
    def partial(self) -> Path:
        """Where the shards lie until all are there."""
        key = digest_of([self.identity, len(self.shards[0])])
        return hidden(self.folder, f".{key}{PARTIAL}")

    @property
    def is_whole(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def check_folder(self) -> None:
        """Refuse a folder that holds something else than a whole bank.

        Raises:
            UserError: saying what.
        """
        if self.is_whole or not self.folder.exists():
            return
        if any(self.folder.glob("bank-*.safetensors")):
            raise UserError(f"{self.folder} holds a bank without its manifest.json; delete it to build it again.")
        if self.folder.resolve() == Path.cwd():  # which a bank that is whole could not take the place of
            raise UserError("the bank's folder is the current one; give another, such as bank.")
        if any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no bank; choose another folder for the bank.")

    def path(self, shard: int) -> Path:
        return self.partial / f"bank-{shard:05d}.safetensors"

    def there(self, shard: int) -> StoredFile | None:
        """A shard that was drawn, whenever; None where it was not, or is damaged."""
        return open_checked(self.path(shard))

    def draw(self, shard: int) -> None:
        """Sample the pretrained model for a shard, and write it."""
        items, request = self.shards[shard], self.request
        with self.family.solved_by(request.solver):
            latents = self.family.sample(
                [request.prompt_of(i) for i in items],
                [torch.Generator().manual_seed(request.seed_of(i)) for i in items],
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                resolution=request.resolution,
            )
        self.partial.mkdir(exist_ok=True)
        write_checked(self.path(shard), {"latents": latents.cpu()})

    def complete(self) -> None:
        """Make the bank of its shards, all of which are there; other drafts for its folder are deleted."""
        partial, request = self.partial, self.request
        sweep(partial)
        rows = [{"item": i, "prompt": request.prompt_of(i), "seed": request.seed_of(i)} for i in range(request.size)]
        lines = [json.dumps(row) for row in rows]
        (partial / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        manifest = {
            "identity": self.identity,
            "model": str(getattr(self.family.pipe.config, "_name_or_path", "")),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "shards": {path.name: digest_of_file(path) for path in map(self.path, range(len(self.shards)))},
            "prompts": digest_of_file(partial / "prompts.jsonl"),
        }
        write_json(partial / MANIFEST, manifest | {DIGEST: digest_of_manifest(manifest)})
        if self.folder.exists():
            self.folder.rmdir()
        place(partial, self.folder)
        for other in self.folder.parent.glob(f".{escape(self.folder.name)}.*{PARTIAL}"):
            shutil.rmtree(other, ignore_errors=True)


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    return digest_of({k: v for k, v in manifest.items() if k != DIGEST})
