"""SentencePiece model files as tokenizers of the `tokenizers` library."""

import string
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mmx.zoo.texts import Texts

SPACE = "▁"  # how SentencePiece writes a space


def sentence_pieces(model: bytes, texts: Texts = Texts()) -> tokenizers.Tokenizer:
    """A SentencePiece model file (a protocol buffer), unigram or byte-pair, as a tokenizer without tokens in front or behind."""
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    unigram, charsmap, prefix, squeeze = True, b"", True, True
    for field, value in _messages(model):
        if field == 1:
            piece = dict(_messages(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            kinds.append(piece.get(3, 1))
        elif field == 2:
            unigram = dict(_messages(value)).get(3, 1) == 1
        elif field == 3:
            rules = dict(_messages(value))
            charsmap, prefix, squeeze = rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1))
    if texts.first:  # fairseq's order
        pieces = [*((token, 0.0) for token in texts.first), *pieces[3:], ("<mask>", 0.0)]
        kinds = [2 if token == texts.unknown else 3 for token in texts.first] + kinds[3:] + [3]
    unknown = kinds.index(2) if 2 in kinds else 0
    by_bytes = 6 in kinds
    if unigram:
        tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unknown, by_bytes))
    else:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = _merges(pieces, vocab)
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=by_bytes)
        )
    steps: list[Any] = [normalizers.Lowercase()] if texts.lower else []
    if texts.plain:
        signs = "".join("\\" + sign for sign in string.punctuation)
        steps += [normalizers.Replace(tokenizers.Regex(f"[{signs}]"), ""), normalizers.Replace(tokenizers.Regex(r"\s+"), " ")]
    steps += [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    scheme = "always" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=unigram)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.ByteFallback(), decoders.Metaspace(SPACE, prepend_scheme=scheme)]
    )
    named = [(piece, kind) for (piece, _), kind in zip(pieces, kinds, strict=True)]
    tokenizer.add_special_tokens([piece for piece, kind in named if kind in (2, 3)])
    tokenizer.add_tokens(
        [tokenizers.AddedToken(piece, normalized=False) for piece, kind in named if kind == 4 and SPACE not in piece]
    )
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(texts.more))])
    return tokenizer


def _merges(pieces: Sequence[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs a byte-pair model joins, in the order of what they make: SentencePiece stores only the results."""
    found = [
        (-score, vocab[piece[:i]], vocab[piece[i:]], piece[:i], piece[i:])
        for piece, score in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers as int, what has a length as bytes, floats as their four bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        yield key >> 3, data[at : at + size]
        at += size
