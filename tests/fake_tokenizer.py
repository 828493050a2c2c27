"""Small tokenizers made on the spot: one of each kind, as chat models have them."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "the cat sat on the mat, the dog sat on the log", "hello world, hello again and again",
    "def f(x):\n    return x + 1\n", "你好世界，你好吗？我很好。", "今天天气很好，我们去公园。",
    "naïve café, 12345 67890", "😀😀 👩‍👩‍👧 🇨🇳", "stop here. Stop there. STOP",
]
BYTE_LEVEL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCEPIECE_SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def _byte_level_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=340, special_tokens=BYTE_LEVEL_SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return backend.to_str()


@cache
def _sentencepiece_json() -> str:
    """As SentencePiece's BPE with byte fallback arrives in tokenizer.json (Llama 2, Mistral)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS[:4], trainers.BpeTrainer(
        vocab_size=140, special_tokens=SENTENCEPIECE_SPECIAL, show_progress=False))
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    data = json.loads(backend.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    data["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return json.dumps(data)


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with ChatML's special tokens (Qwen 2)."""
    return tokenizers.Tokenizer.from_str(_byte_level_json())


def sentencepiece() -> tokenizers.Tokenizer:
    """BPE over "▁" with byte fallback, "<s>" in front."""
    return tokenizers.Tokenizer.from_str(_sentencepiece_json())


def metaspace() -> tokenizers.Tokenizer:
    """The same vocabulary with the Metaspace pre-tokenizer and decoder."""
    backend = sentencepiece()
    backend.normalizer = None  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return backend


def save(backend: tokenizers.Tokenizer, folder: Path, **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_chatml(folder: Path) -> None:
    """A complete ChatML tokenizer folder."""
    save(byte_level(), folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
         pad_token="<|endoftext|>", chat_template=CHATML)


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """A tokenizer.model, as Llama 2 has it but for `options` of the SentencePiece trainer."""
    file = io.BytesIO()
    settings = {
        "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "hard_vocab_limit": False, "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:5] * 4), model_writer=file, **settings | options)
    return file.getvalue()


@cache
def tiktoken_ranks() -> dict[bytes, int]:
    """Bytes of a token -> rank: single bytes, then the pairs that merge, as BPE training does."""
    words = [word.encode() for text in TEXTS for word in text.split(" ")]
    parts = [[bytes([byte]) for byte in word] for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 330:
        pairs = [pair for word in parts for pair in zip(word, word[1:], strict=False)]
        best = max(pairs, key=lambda pair: (pairs.count(pair), pair))
        ranks[b"".join(best)] = len(ranks)
        for word in parts:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == best:
                    word[at:at + 2] = [b"".join(best)]
                at += 1
    return ranks


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """A qwen.tiktoken: a line a token, base64 and rank."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in ranks.items())
