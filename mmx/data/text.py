"""Text to ids and back, through the `tokenizers` library."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmx.errors import InputError
from mmx.types import Masked

PAD, UNKNOWN, BEGIN, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]")


class Text(NamedTuple):
    """A text as a model reads it; every array is `(length,)`."""

    ids: np.ndarray
    """int32, [BOS] text [EOS] and padding."""
    mask: np.ndarray
    """Which of them are no padding."""
    group: np.ndarray
    """0 for the prompt of a text in several parts, -1 for all else: a group's tokens see each other both ways (`Embedder`)."""
    words: np.ndarray
    """The number of the word that a token belongs to, from 0; -1 for special tokens and padding."""


class Tokenizer:
    """A tokenizer with the special tokens [PAD] [UNK] [BOS] [EOS] [MASK], as one `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        missing = [name for name in SPECIAL if tokenizer.token_to_id(name) is None]
        if missing:
            raise InputError(f"tokenizer: it has no {', '.join(missing)}; add these tokens")
        self.pad, self.begin, self.end = (tokenizer.token_to_id(name) for name in (PAD, BEGIN, END))

    @property
    def vocab(self) -> int:
        """Number of ids, V."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """[BOS] text [EOS] as ids `(length,)` int32 and the mask of what is text `(length,)`; cut or padded to `length`.

        Raises:
            ValueError: the text is empty.
        """
        return self.read(text, length)[:2]

    def read(self, text: str | Sequence[str], length: int) -> Text:
        """A text, or the parts of one: the last is what is told, those before it are its prompt.

            [BOS] question answer [EOS]      the group is 0 up to the end of the question, as in a prefix language model
                                             (SimVLM, arXiv 2108.10904): it is read both ways, the answer forwards only

        A text in one piece is cut at its end; the prompt is cut at its front, and the last part is never cut.

        Raises:
            ValueError: the text, or its last part, is empty; or the last part does not fit.
        """
        parts = [text] if isinstance(text, str) else list(text)
        if not parts or not parts[-1].strip():
            raise InputError(f"the text is empty: {text!r}")
        ids: list[int] = []
        words: list[int] = []
        prompt, room, count = 0, length - 2, 0
        for part in parts:
            encoded, prompt = self._tokenizer.encode(part, add_special_tokens=False), len(ids)
            ids += encoded.ids
            words += [-1 if word is None else word + count for word in encoded.word_ids]
            count = max(words, default=-1) + 1
        if not isinstance(text, str) and len(ids) - prompt > room:
            raise InputError(f"the last part has {len(ids) - prompt} tokens, but there are places for {room}: {parts[-1]!r}")
        cut = 0 if isinstance(text, str) else max(len(ids) - room, 0)
        ids, words, prompt = ids[cut:][:room], words[cut:][:room], prompt - cut
        first = min((word for word in words if word >= 0), default=0)
        end, front = 1 + len(ids), 1 + prompt if prompt else 0
        told = Text(np.full(length, self.pad, np.int32), np.arange(length) <= end, *np.full((2, length), -1, np.int32))
        told.ids[: end + 1] = [self.begin, *ids, self.end]
        told.group[:front] = 0
        told.words[1:end] = words if first == 0 else [max(word - first, -1) for word in words]
        return told

    def __call__(self, texts: Sequence[str], length: int) -> Masked:
        """Several texts: ids and mask `(B, length)`."""
        ids, masks = zip(*(self.encode(text, length) for text in texts), strict=True)
        return Masked(np.stack(ids), np.stack(masks))

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to [EOS], without special tokens."""
        ids = [int(i) for i in ids]
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`, whole or not at all."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        self._tokenizer.save(os.fspath(temporary))
        temporary.replace(path)

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._tokenizer.to_str()

    def makes_ids_of(self, other: str | bytes) -> bool:
        """Whether another tokenizer.json makes the same ids of every text."""
        said = other.decode() if isinstance(other, bytes) else other
        rules = [json.loads(text) for text in (self.to_json(), tokenizers.Tokenizer.from_str(said).to_str())]
        return all(rules[0][name] == rules[1][name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens"))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a `tokenizer.json`."""
        try:
            return cls(tokenizers.Tokenizer.from_file(os.fspath(path)))
        except Exception as error:
            raise InputError(f"{path} is not a usable tokenizer.json: {error}") from error


def train_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab` ids from lower-cased texts. The same texts give the same tokenizer."""
    least = 256 + len(SPECIAL)
    if vocab < least:
        raise InputError(
            f"tokenizer: vocab={vocab}, but a byte-level BPE needs at least {least}: 256 bytes and the special tokens"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def cached_tokenizer(texts: Sequence[str], vocab: int, folder: Path) -> Tokenizer:
    """`train_tokenizer`, kept in `folder` under a name made of the texts and the size."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    path = folder / f"bpe-{vocab}-{digest}.json"
    if not path.exists():
        train_tokenizer(texts, vocab).save(path)
    return Tokenizer.load(path)
