"""Prompts as a model is told them: their embeddings, row by row, and what the stock pipeline is given for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.components import Components
from difftuning_control.system.digests import digest_of
from difftuning_control.system.rows import Rows

SHOWN = 60  # characters of a prompt in a sentence on it


@dataclass(frozen=True)
class PromptEmbeddings:
    """The conditioning of a list of prompts, each different one stored once; entry "" is always there."""

    index: dict[str, int]
    tensors: Mapping[str, Tensor | Rows]

    def rows(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the family's `predict` takes for these prompts, each tensor (B, …)."""
        numbers = torch.tensor([self.index[p] for p in prompts])
        return {name: tensor[numbers] for name, tensor in self.tensors.items()}


class Prompting(Components):
    """The text encoders of a model, and with `offload` the embeddings that they have given.

    A family decides what `conditioning` means: a dict of tensors, one row a picture, that `encode_prompts` makes of
    prompts and `Family.denoiser_inputs` turns into the denoiser's own arguments. Nobody else looks into it.
    """

    cuts_prompts: ClassVar[bool] = True  # whether the stock pipeline cuts one that is longer than is taken
    _known: dict[str, dict[str, Tensor]]  # by prompt
    _remembered: list[PromptEmbeddings]

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The conditioning of these prompts, each tensor (B, …), as the stock pipeline makes it."""

    def check_prompts(self, prompts: list[str]) -> None:
        """Refuse prompts that the model has no condition for; nothing is encoded. Any text is one.

        Raises:
            UserError: with the prompt, for a class-conditional model without that class.
        """

    def tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        """The conditioning where `model` encodes prompts: `prompt_ids`, as the stock pipeline tokenizes them."""
        raise NotImplementedError

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has, and how many the text encoder takes; both count the end marks."""
        tokenizer = self.pipe.tokenizer
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids), tokenizer.model_max_length

    @property
    def conditioning_fingerprint(self) -> str:
        """Changes when what `encode_prompts` gives does."""
        encoders = {name: digest for name, digest in self.fingerprints.items() if name not in ("denoiser", "vae")}
        return digest_of([encoders, str(self.dtype)])

    def remember(self, embeddings: PromptEmbeddings) -> None:
        """Keep what prompts are encoded as, where `offload` makes encoding them again expensive."""
        if self.offload:
            self._remembered.append(embeddings)

    def _remember(self, prompt: str) -> bool:
        """Whether it is known what a prompt is encoded as; of the cached ones it is read."""
        if prompt not in self._known:
            embeddings = next((e for e in self._remembered if prompt in e.index), None)
            if embeddings is None:
                return False
            self._known[prompt] = {name: tensor[0] for name, tensor in embeddings.rows([prompt]).items()}
        return True

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """What the stock pipeline is given for these prompts; with `offload` it is their embeddings."""
        return self.embedding_arguments(prompts) if self.offload else {"prompt": list(prompts)}  # some write into it

    def embedding_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Embeddings of the prompts, and of the empty one for guidance, by the names of the pipeline's call."""
        fresh = [p for p in dict.fromkeys([*prompts, ""]) if not self._remember(p)]
        if fresh:
            with self.encoding():
                encoded = {name: tensor.cpu() for name, tensor in self.encode_prompts(fresh).items()}
            self._known |= {p: {name: t[i] for name, t in encoded.items()} for i, p in enumerate(fresh)}
        rows = {n: torch.stack([self._known[p][n] for p in prompts]) for n in self._known[""]}
        rows |= {f"negative_{n}": torch.stack([t] * len(prompts)) for n, t in self._known[""].items()}
        return {name: tensor.to(self.device) for name, tensor in rows.items()}


def cut_note(family: Prompting, prompts: Iterable[str], what: str) -> str | None:
    """A line on prompts of which the stock pipeline leaves out the end; None where there are none.

    Args:
        what: of whose prompts, such as "prompts of the bank"; those that are given twice count once.

    Raises:
        UserError: as `refuse_longer`, where they would not be cut.
    """
    given = list(dict.fromkeys(prompts))
    if not family.cuts_prompts:
        refuse_longer(family, given)
        return None
    sizes = {prompt: family.prompt_tokens(prompt) for prompt in given}
    cut = {prompt: length for prompt, (length, most) in sizes.items() if length > most}
    if not cut:
        return None
    first = next(iter(cut))
    shown = first if len(first) <= SHOWN else f"{first[:SHOWN]}…"
    return (
        f"note: {len(cut)} of {len(given)} {what} have more tokens than the text encoder takes ({shown!r} has "
        f"{cut[first]}, it takes {sizes[first][1]}); what follows is left out"
    )


def refuse_longer(family: Prompting, prompts: list[str]) -> None:
    """Refuse prompts that the stock pipeline would not cut.

    Raises:
        UserError: with the first one's number of tokens and the most that are taken.
    """
    for prompt in prompts:
        tokens, most = family.prompt_tokens(prompt)
        if tokens > most:
            raise UserError(
                f'the prompt "{prompt[:SHOWN]}…" has {tokens} tokens with what stands around it, and at most {most} '
                "are taken here; shorten it."
            )
