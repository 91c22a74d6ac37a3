"""At least a hundred kills at seeded moments of every phase; after each the same command ends as if undisturbed.

`make test-faults` prints the table.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from conftest import tiny_pipeline, write_pictures

from .harness import PHASES, Moment, broken_audits, contents, import_what_it_imported, run

pytestmark = pytest.mark.slow
KINDS = (signal.SIGKILL, signal.SIGTERM)
LINKS = 5  # a command is killed up to so many times before it may end
# commands by phase; what is in the cache already is met no more, so that kills there are few to a command
CHAINS = {"caching": 10, "annotating": 10, "bank building": 5, "training": 5, "checkpointing": 6, "exporting": 5}
STOPPED = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM)}
SEED = 0


def flags(values: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def commands(model: Path, pictures: Path, work: Path) -> dict[str, list[str]]:
    """A command by scenario, each as a user would give it again after any interruption."""
    common = {
        "model.id": model,
        "data.path": pictures,
        "data.cache": work / "cache",
        "data.holdout": 0.25,
        "bank.size": 70,
        "bank.steps": 1,
        "bank.batch_size": 35,
    }
    training = {
        "training.max_steps": 6,
        "training.batch_size": 5,
        "training.checkpoint_every": 2,
        "training.resume": "true",
        "training.validation_size": 2,
        "training.validate_every": 3,
        "training.sample_every": 0,
        "training.ema_decay": 0.9,
        "output": work / "run",
    }
    fidelity = {"control.fidelity.every": 3, "control.fidelity.size": 2, "control.fidelity.steps": 1}
    return {
        "bank": ["bank", *flags(common | {"bank.path": work / "bank", "bank.size": 140})],
        "train": ["train", *flags(common | training | {"training.save_at": "[3]"})],
        "controlnet": [
            "train",
            *flags(common | training | fidelity | {"method": "controlnet", "control.annotator": "canny"}),
        ],
        "export": ["export", str(work.parent / "finished"), "--to", str(work / "export"), "--overwrite"],
    }


AIMED = {
    "bank building": "bank",
    "caching": "train",
    "annotating": "controlnet",
    "training": "train",
    "checkpointing": "train",
    "exporting": "export",
}


def again(root: Path) -> None:
    shutil.rmtree(root / "work", ignore_errors=True)
    (root / "work").mkdir()


def test_no_kill_loses_anything(tmp_path, capsys):
    """Chains of kills at calls of one phase and, at last, at a random time; each ends with a run that is left alone."""
    rng = random.Random(SEED)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    given = commands(tmp_path / "model", write_pictures(tmp_path / "pictures"), tmp_path / "work")
    undisturbed, seconds, calls = {}, {}, {}
    for name, command in given.items():
        for _ in range(2):  # the second one with everything imported, and for what no two runs share
            again(tmp_path)
            outcome = run(command, tmp_path)
            assert outcome.code == 0, outcome.said
            import_what_it_imported(tmp_path)
            found = contents(tmp_path / "work")
            assert found.keys() == undisturbed.setdefault(name, found).keys()
            assert [n for n in found if found[n] != undisturbed[name][n]] == []
        seconds[name], calls[name] = outcome.seconds, outcome.calls
        if name == "train":
            shutil.copytree(tmp_path / "work" / "run", tmp_path / "finished")
    kills, lost = Counter(), []
    for chain, phase in [(c, p) for c in range(max(CHAINS.values())) for p in PHASES if c < CHAINS[p]]:
        name = AIMED[phase]
        count = calls[name].count(phase)
        again(tmp_path)
        story = []
        for link in range(LINKS):
            kind = KINDS[(chain + link) % 2]
            spread = 1 + int((chain + rng.random()) * count / CHAINS[phase])  # over all of the phase
            place = spread if link == 0 else rng.randint(1, max(1, count // 2))
            moment = Moment(kind, phase, min(place, count))
            if link == LINKS - 1:
                moment = Moment(kind, seconds=rng.random() * seconds[name])
            outcome = run(given[name], tmp_path, moment)
            story.append((moment, outcome.code, outcome.said[-300:]))
            if outcome.code in STOPPED[kind]:
                kills[outcome.struck, kind.name] += 1
            elif outcome.code != 0:
                lost.append((name, story))
            if outcome.code == 0:
                break
        last = run(given[name], tmp_path)
        found, expected = contents(tmp_path / "work"), undisturbed[name]
        differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        differing += broken_audits(tmp_path)
        if last.code != 0 or differing:
            lost.append((name, story, last.code, last.said[-2000:], differing))
        with capsys.disabled():
            print(f"{phase} {chain + 1}/{CHAINS[phase]}: kills {sum(kills.values())}, lost {len(lost)}", flush=True)
    with capsys.disabled():
        print(f"\n{'phase':<16}{'SIGKILL':>9}{'SIGTERM':>9}")
        for phase in ("starting", *PHASES):
            print(f"{phase:<16}{kills[phase, 'SIGKILL']:>9}{kills[phase, 'SIGTERM']:>9}")
        print(f"kills: {sum(kills.values())}, lost: {len(lost)}")
    assert not lost, "\n\n".join(map(str, lost[:5]))
    assert sum(kills.values()) >= 100
    assert all(kills[phase, kind.name] for phase in PHASES for kind in KINDS)
