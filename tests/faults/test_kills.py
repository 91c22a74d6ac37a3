"""At least a hundred kills at seeded moments of every phase; after each the same command ends as if undisturbed.

`make test-faults` prints the table.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter

import pytest

from support.pictures import write_pictures
from support.tiny_sd import tiny_pipeline

from .harness import PHASES, Moment, again, broken_audits, commands, contents, import_what_it_imported, run

pytestmark = pytest.mark.slow
KINDS = (signal.SIGKILL, signal.SIGTERM)
LINKS = 5  # a command is killed up to so many times before it may end
# commands by phase; what is in the cache already is met no more, so that kills there are few to a command
CHAINS = {"caching": 10, "annotating": 10, "bank building": 5, "training": 5, "checkpointing": 6, "exporting": 5}
STOPPED = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM)}
SEED = 0


AIMED = {
    "bank building": "bank",
    "caching": "train",
    "annotating": "controlnet",
    "training": "train",
    "checkpointing": "train",
    "exporting": "export",
}


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
