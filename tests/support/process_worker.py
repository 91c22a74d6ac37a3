"""What each process of `test_processes.py` runs under torchrun: several jobs, one after the other, in one start."""

import json
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

SHARD = 4  # small files, so that every process has some of them to make


class Stop(BaseException):
    pass


@contextmanager
def small_files():
    """Files of bank and caches with few entries each."""
    from difftuning_control.data import bank_draft, conditions
    from difftuning_control.data import latents as cache

    before = bank_draft.MOST, cache.SHARD, conditions.SHARD
    bank_draft.MOST = cache.SHARD = conditions.SHARD = SHARD
    try:
        yield
    finally:
        bank_draft.MOST, cache.SHARD, conditions.SHARD = before


def run(job: dict) -> None:
    """Train `job["recipe"]`, perhaps from a copy of another run's output, and perhaps only up to a step."""
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.training.loop import TrainingLoop
    from difftuning_control.verbs.train import train

    watch = TrainingLoop._watch

    def stopping(self, done):
        watch(self, done)
        if done == job.get("stop"):
            self.accelerator.wait_for_everyone()  # a checkpoint may still be written
            raise Stop

    TrainingLoop._watch = stopping
    try:
        train(Recipe.from_dict(job["recipe"]))
    except Stop:
        pass
    finally:
        TrainingLoop._watch = watch


def fail_on(rank: int) -> None:
    """Make one process stop with a sentence in the second step, while the others wait for its gradients."""
    import torch

    from difftuning_control.data.batches import BatchSource
    from difftuning_control.errors import UserError

    rows = BatchSource.rows

    def failing(self, step, forward=0):
        if step == 1 and torch.distributed.get_rank() == rank:
            raise UserError(f"process {rank} cannot read its rows")
        return rows(self, step, forward)

    BatchSource.rows = failing


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from accelerate import PartialState

    from difftuning_control import cli
    from difftuning_control.verbs import train as trainer

    together, PartialState.destroy_process_group = trainer.ending_together, lambda self, group=None: None
    trainer.ending_together = lambda accelerator: nullcontext()  # the processes live on after a job
    with small_files():
        if jobs.get("fail"):
            cli.main(["bank", "--config", jobs["fail"]])
        for job in jobs["train"]:
            state = PartialState(cpu=True)
            if job.get("copy") and state.is_main_process:
                shutil.copytree(job["copy"], job["recipe"]["output"])
            state.wait_for_everyone()
            run(job)
        if jobs.get("fail"):
            trainer.ending_together = together
            fail_on(1)
            cli.main(["train", "--config", jobs["fail"]])


if __name__ == "__main__":
    main()
