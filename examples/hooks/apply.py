"""Insert the lines of a hook into a training script of diffusers.

    python examples/hooks/apply.py examples/hooks/train_controlnet.txt train_controlnet.py > train_controlnet_tuned.py

A hook is a text: what it is for, then parts of lines, each with the beginning of the script's line that it goes before.
"""

import sys
from pathlib import Path

MARK = "@@ before: "


def parts_of(hook: str) -> list[tuple[str, list[str]]]:
    """Where each part goes, and its lines."""
    found: list[tuple[str, list[str]]] = []
    for line in hook.splitlines():
        if line.startswith(MARK):
            found.append((line.removeprefix(MARK), []))
        elif found:
            found[-1][1].append(line)
    return found


def apply(hook: str, script: str) -> str:
    """The script with the hook's lines, indented as the lines that they go before.

    Raises:
        ValueError: if a place is not in the script, or is there more than once.
    """
    lines = script.splitlines()
    places: dict[int, list[str]] = {}
    for begin, added in parts_of(hook):
        found = [i for i, line in enumerate(lines) if line.strip().startswith(begin)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} lines of the script begin with {begin!r}; expected one. Is it the version that the hook "
                "is for?"
            )
        line = lines[found[0]]
        indent = line[: len(line) - len(line.lstrip())]
        places[found[0]] = [indent + text if text else "" for text in "\n".join(added).strip("\n").splitlines()]
    return "\n".join(text for i, line in enumerate(lines) for text in (*places.get(i, []), line)) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    hook, script = (Path(name).read_text(encoding="utf-8") for name in sys.argv[1:])
    try:
        print(apply(hook, script), end="")
    except ValueError as error:
        sys.exit(str(error))
