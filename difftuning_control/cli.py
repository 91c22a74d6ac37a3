"""`difftune <verb>`: from a recipe to a tuned model, and what was gained. A mistake is one sentence and exit code 2."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
import sys
from contextvars import ContextVar
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from difftuning_control.errors import ChangedError, GatesFailedError, NonFiniteLossError, UserError
from difftuning_control.runs import audit
from difftuning_control.system.memory import no_memory
from difftuning_control.system.signals import Interrupted, watched
from difftuning_control.system.terminal import Record, activity, crashed, showing_activities, shown
from difftuning_control.verbs.commands import check_named
from difftuning_control.verbs.parse import PROGRAM, parse
from difftuning_control.verbs.runners import RUNNERS

TRAINER = "difftuning_control.verbs.train"
RUN: ContextVar[str | None] = ContextVar("run")  # the folder of the training that runs
TRAINERS = ("train", "resume", "bank", "evaluate", "analyze", "pilot")  # verbs that need it before anything else


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `difftune` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    RUN.set(None)
    audit.COMMAND.set([PROGRAM, *arguments])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import remarks on packages that are not needed here
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # what is cut of a prompt is refused or said by ourselves
    logging.setLogRecordFactory(Record)
    sys.excepthook = crashed
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what Windows pipes has a code page without λ
    with watched():
        try:
            _run(arguments)
        except ChangedError as error:
            sys.exit(_fail(error, str(error), 1))
        except UserError as error:
            sys.exit(_fail(error, str(error), 2))
        except NonFiniteLossError as error:
            sys.exit(_fail(error, str(error), 3))
        except GatesFailedError as error:
            sys.exit(_fail(error, str(error), 4))
        except (RuntimeError, MemoryError) as error:
            said = no_memory(error)
            if said is None:
                raise
            sys.exit(_fail(error, said, 2))
        except OSError as error:  # no space, no permission, a file where a folder should be
            place, reason = error.filename2 or error.filename or "a file", error.strerror or error
            said = f"{place} cannot be read or written ({reason}); mend that, or choose another place."
            sys.exit(_fail(error, said, 2))
        except KeyboardInterrupt as error:
            interrupt = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
            sys.exit(_fail(error, f"{interrupt.describe()}; {_again(interrupt)}.", interrupt.code))


def _run(arguments: list[str]) -> None:
    verb, command = parse(arguments)
    check_named(verb, command)
    if verb not in ("train", "resume", "bank") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{verb} runs in one process; start it without torchrun or accelerate launch.")
    if verb in TRAINERS and TRAINER not in sys.modules:
        _import_trainer()
    RUN.set(getattr(command, {"train": "output", "resume": "run"}.get(verb, ""), None))
    RUNNERS[verb](command)


def _again(interrupted: Interrupted) -> str:
    """How to go on: a training that has begun to write can be resumed, all else is given again."""
    folder = RUN.get()
    if folder is None:
        return "run the same command again"
    from difftuning_control.runs.record import RUNNING, read_run  # and with it torch, which the training has by now

    record = read_run(Path(folder))
    if interrupted.saved is not None or (record is not None and record.status == RUNNING):
        return f"go on with difftune resume {shlex.quote(folder)}"
    return "nothing was written yet; run the same command again"


def _import_trainer() -> None:
    """Import what trains, with all of torch, diffusers, transformers and peft behind it, and have Python's collector of
    cycles pass by the hundreds of thousands of objects that stay from then on: it takes a seventh of that time."""
    gc.disable()
    try:
        with showing_activities(sys.stdout.isatty()), activity("starting"):
            import_module(TRAINER)
        gc.freeze()
    finally:
        gc.enable()


def _fail(error: BaseException, message: str, code: int) -> int:
    """Say it once: of the processes of a machine the first, before they know each other, then the first that failed."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "speaks_for_all", False):
        print(f"{PROGRAM}: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
