"""Tokenizers of a few words, made as the transformers that is installed has them made.

Since transformers 5 they take a vocabulary. Before, CLIP's reads `vocab.json` and `merges.txt`; those of T5 and Gemma
take a tokenizer of the library tokenizers.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

TAKE_VOCABULARIES = int(version("transformers").partition(".")[0]) >= 5
T5_WORDS = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
GEMMA_WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127)), "\n"]


def tiny_tokenizer(length: int = 16):
    """CLIP's, of single bytes and the word `red`."""
    import transformers  # saves it in tests that make no model

    alphabet = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>")]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if TAKE_VOCABULARIES:
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    with TemporaryDirectory() as folder:
        words, pairs = write_clip_files(Path(folder), vocabulary, merges)
        return transformers.CLIPTokenizer(str(words), str(pairs), model_max_length=length)


def write_clip_files(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tuple[Path, Path]:
    """`vocab.json` and `merges.txt`, which is all that the CLIP tokenizer of transformers 4 reads."""
    words, pairs = folder / "vocab.json", folder / "merges.txt"
    words.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    pairs.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    return words, pairs


def tiny_t5_tokenizer():
    """T5's, of single letters."""
    import transformers  # saves it in tests that make no model

    vocabulary = [(word, float(-i)) for i, word in enumerate(T5_WORDS)]
    if TAKE_VOCABULARIES:
        return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def tiny_gemma_tokenizer(words: list[str] = GEMMA_WORDS):
    """Gemma's, of single letters."""
    import transformers  # saves it in tests that make no model

    vocabulary = {word: i for i, word in enumerate(words)}
    settings = {"model_max_length": 2048, "add_bos_token": True}
    if TAKE_VOCABULARIES:
        return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], **settings)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return transformers.GemmaTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", **settings)
