"""A knowledge bank that grows while training begins: its items are drawn when a step first asks for them.

It ends as the same bank, bit for bit, as one that was drawn ahead. Whoever changes the model meanwhile sees to it that
the pretrained one draws, by `around`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_draft import BankDraft
from difftuning_control.system.durable import alone
from difftuning_control.system.rows import StoredFile
from difftuning_control.system.rows_to_come import FilesToCome
from difftuning_control.system.terminal import activity


class GrowingBank:
    """Draws a bank's shards one by one.

        with GrowingBank(draft) as growing:
            growing.bank.latents[3]     # draws the shard of item 3, if it was not drawn yet
            growing.finish()            # draws what is left; the bank lies in its folder then

    While it is open and the bank is not whole, no other job on this machine draws the same bank.

    Args:
        around: what is open while a shard is drawn.
        show: whether a line is printed for each.
    """

    def __init__(
        self,
        draft: BankDraft,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        show: bool = False,
    ):
        self.draft, self.around, self.show = draft, around, show
        self.drawn, self.seconds, self.is_whole = 0, 0.0, False  # items by this process, and what they took
        self._files = FilesToCome([len(items) for items in draft.shards], self._file)
        self._alone = ExitStack()
        request = draft.request
        items = range(request.size)
        self.bank = KnowledgeBank(
            self._files.rows("latents"),
            [request.prompt_of(i) for i in items],
            [request.seed_of(i) for i in items],
            {"identity": draft.identity},
            draft.folder,
            growing=self,
        )

    def __enter__(self) -> GrowingBank:
        self._alone.enter_context(alone(self.draft.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another job draw the bank; what was drawn stays for whoever goes on with it."""
        self._files.close()
        self._alone.close()

    @property
    def has_all(self) -> bool:
        """Whether nothing is left to draw."""
        return self.left == 0

    @property
    def left(self) -> int:
        """The number of items that are still to be drawn, or were drawn by an earlier process and not yet asked for."""
        return sum(len(items) for shard, items in enumerate(self.draft.shards) if not self._files.is_made(shard))

    def finish(self) -> None:
        """Draw what is left, and make the bank whole; `bank` is read from its folder from then on."""
        for shard in range(len(self._files)):
            self._files.file(shard)
        self._files.close()
        self.draft.complete()
        whole = KnowledgeBank.load(self.draft.folder)
        self._files.move(whole.files)
        self.bank.manifest.update(whole.manifest)  # which parts of the bank share
        self.is_whole = True
        self._alone.close()

    def _file(self, shard: int) -> StoredFile:
        found = self.draft.there(shard)
        if found is None:
            items = self.draft.shards[shard]
            begun = time.monotonic()
            detail = f"{items.start + 1} to {items.stop} of {self.draft.request.size}"
            with activity("knowledge bank", self.show, detail), self.around():
                self.draft.draw(shard)
            self.seconds += time.monotonic() - begun
            self.drawn += len(items)
            found = self.draft.there(shard)
            assert found is not None
        return found


def grown(
    draft: BankDraft, kept: ExitStack, around: Callable[[], AbstractContextManager[object]], show: bool
) -> KnowledgeBank:
    """The bank that is wanted: the whole one that is there, or one that grows.

    Args:
        kept: keeps it open.

    Raises:
        UserError: if the folder holds another bank, or something that is no bank.
    """
    draft.check_folder()
    if not draft.is_whole:
        growing = kept.enter_context(GrowingBank(draft, around, show))
        if not draft.is_whole:
            return growing.bank
        growing.close()  # the job that we waited for has completed it
    return KnowledgeBank.of(draft)
