"""The embedded model's text side: a CLIP tokenizer with a vocabulary of its own (transformers 5) and a text model."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from variants import COLOURS, MANNERS

TEXT_LENGTH = 24
WIDTH = 256
VOCABULARY = 2048
STYLES = ("noto", "twemoji", "emojione", "fxemoji", "blob")
FURTHER_WORDS = (
    "line icon",
    "flat icon",
    "black and white",
    "a photo of the",
    "small tilted mirrored",
    "a sketch of an",
)


def corpus(names: list[str]) -> list[str]:
    """What the vocabulary is learned from: the names, and what the captions say beside them, often enough to count."""
    said = [f"{manner} {style} emoji {colour}" for manner in MANNERS for style in STYLES for colour in COLOURS]
    return names + said + [f"on a {colour} background" for colour in COLOURS] * 20 + list(FURTHER_WORDS) * 20


def train_tokenizer(names: list[str], vocabulary: int = VOCABULARY) -> CLIPTokenizer:
    """A CLIP tokenizer with a byte-level BPE vocabulary."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    words = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([re.sub(r"\s+", " ", text.lower()) for text in corpus(names)], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TEXT_LENGTH)


def kept_tokenizer(folder: Path, names: list[str]) -> CLIPTokenizer:
    """The tokenizer of this folder, trained where there is none: equal counts are merged in no fixed order, so that a
    second one has other numbers for the same words."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(names).save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").replace(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, projection_dim=WIDTH, **size, **special
    )
    return CLIPTextModel(config)
