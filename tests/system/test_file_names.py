"""Names of files that are made from prompts."""

from __future__ import annotations

import pytest

from difftuning_control.system.text import file_stem


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Two words, and more!", "two-words-and-more"),
        ("赤いりんご", "赤いりんご"),
        ("Красное яблоко", "красное-яблоко"),
        ("हिन्दी भाषा", "हिन्दी-भाषा"),
        ("café au lait", "café-au-lait"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\x00b\nc\u202ed", "a-b-c-d"),
        ("赤" * 60, "赤" * 40),  # 120 bytes
        ("...", "empty"),
        ("", "empty"),
        ("word " * 40, ("word-" * 12)[:-1]),
    ],
)
def test_fault_15_18_a_name_keeps_letters_of_every_script(prompt, expected, tmp_path):
    name = file_stem(prompt)
    assert name == expected
    assert len(f"000-{name}.png".encode()) <= 255
    (tmp_path / f"000-{name}.png").write_bytes(b"")
