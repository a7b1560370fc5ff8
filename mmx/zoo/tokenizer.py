"""Published tokenizer files through the `tokenizers` library: tokenizer.json, vocab.txt, vocab and merges, SentencePiece."""

import dataclasses
import json
import string
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mmx.errors import InputError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "beit3.spm",
    "source.spm",
    "target.spm",
    "added_tokens.json",
)
PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "beit3.spm")
SPACE = "▁"  # how SentencePiece writes a space


@dataclasses.dataclass(frozen=True)
class Texts:
    """How a family reads texts, where its files do not tell.

    Args:
        begin: the token in front, or several with spaces between them; None: none.
        end: the token behind; None: none.
        pad: the token of what is not there; a number: its id, whatever the files say.
        unknown: the token of what is not in the vocabulary.
        lower: whether letters are made small.
        plain: whether signs of punctuation are left out (SigLIP).
        full: whether every text is padded to the longest that the model takes (CLIP, SigLIP), and not to the longest given.
        left: whether texts are padded on the left, so that what is written stands behind them.
        mask: whether there is a mask of what exists; SigLIP reads its padding.
        types: whether the two texts of a pair are told apart by `token_type_ids` (BERT).
        twice: whether the token behind stands twice between them (RoBERTa).
        word_end: what a byte-pair vocabulary marks the end of a word with (CLIP).
        space: whether a space is put in front of a byte-pair vocabulary's first word, as of the others (RoBERTa's words of
            pages).
        first: the first tokens, of an XLM-RoBERTa, in place of the first three of its SentencePiece file.
        more: how many `<extra_id_*>` stand behind the pieces (T5).
        bytes: the tokens in front of the 256 bytes, of a family that reads texts byte by byte and needs no files (Perceiver).
        page: for a family that reads words in boxes (LayoutLM), all four sides of the box of the token behind; that of the
            others is 0. None: the family reads no boxes.
    """

    begin: str | None = None
    end: str | None = None
    pad: str | int = "[PAD]"
    unknown: str = "[UNK]"
    lower: bool = False
    plain: bool = False
    full: bool = False
    left: bool = False
    mask: bool = True
    types: bool = False
    twice: bool = False
    word_end: str = ""
    space: bool = False
    first: tuple[str, ...] = ()
    more: int = 0
    bytes: tuple[str, ...] = ()
    page: int | None = None


@dataclasses.dataclass(frozen=True)
class TextSteps:
    """Texts to published inputs: padded ids, and their attention mask.

    Args:
        tokenizer: from texts to ids.
        pad: the id of what is not there.
        length: the longest text.
        full: whether all are padded to it.
        left: whether they are padded on the left.
        mask: whether the mask is returned.
        types: whether the types of the tokens of pairs are returned.
        vocab: the ids of its tokens, where they are not its own (Marian).
        unknown: the token of those that `vocab` does not have.
        boxes: of special tokens, for words in boxes: `{id: (left, top, right, bottom)}`; empty: it reads no boxes.
    """

    tokenizer: tokenizers.Tokenizer
    pad: int
    length: int
    full: bool
    left: bool = False
    mask: bool = True
    types: bool = False
    vocab: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown: str = ""
    boxes: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask (B, L)` of texts, or of pairs (BERT's with `token_type_ids`); cut at `length`."""
        if isinstance(texts, str) or not texts:
            raise InputError(f"texts={texts!r}; expected a list of texts, or of pairs of texts")
        arrays = self.padded(self.encode(texts))
        if isinstance(texts[0], str) or not self.types:
            del arrays["token_type_ids"]  # all zero, which is what their absence means
        if not self.mask:
            del arrays["attention_mask"]
        return arrays

    def encode(self, texts: Sequence[Any], words: bool = False) -> list[tokenizers.Encoding]:
        """What the tokenizer makes of texts, or of lists of words, cut at `length`."""
        self.tokenizer.enable_truncation(self.length)
        self.tokenizer.no_padding()
        return self.tokenizer.encode_batch(list(texts), is_pretokenized=words)

    def padded(self, encoded: Sequence[tokenizers.Encoding]) -> dict[str, np.ndarray]:
        """Ids, masks and types of several texts: `(B, L)` int32."""
        longest = self.length if self.full else max(len(e.ids) for e in encoded)
        rows: dict[str, Any] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
        for e in encoded:
            own = [self.vocab.get(token, self.vocab[self.unknown]) for token in e.tokens] if self.vocab else e.ids
            pairs = ((own, self.pad), ([1] * len(own), 0), (e.type_ids, 0))
            for row, (values, empty) in zip(rows.values(), pairs, strict=True):
                missing = [empty] * (longest - len(own))
                row.append(missing + values if self.left else values + missing)
        return {name: np.asarray(row, np.int32) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True)
class WordSteps:
    """The words of pages, and the boxes they stand in, to published inputs: every token has the box of its word."""

    texts: TextSteps

    def __call__(self, words: Sequence[Sequence[str]], boxes: Sequence[Any] | None = None) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` `(B, L)` and `bbox (B, L, 4)` of pages.

        Args:
            words: of each page.
            boxes: of each page's words: left, top, right, bottom in thousandths of the page.
        """
        boxes = [np.asarray(page) for page in (() if boxes is None else boxes)]
        if isinstance(words, str) or not words or [(len(page), 4) for page in words] != [box.shape for box in boxes]:
            raise InputError("words: expected words=[[...], ...] of pages and boxes=[[...], ...], one box of four a word")
        if any(box.min() < 0 or box.max() > 1000 for box in boxes):
            raise InputError("boxes: expected left, top, right, bottom in thousandths of the page, 0 to 1000: 1000 x / width")
        encoded = self.texts.encode(words, words=True)
        arrays = self.texts.padded(encoded)
        del arrays["token_type_ids"]
        special, longest = self.texts.boxes, arrays["input_ids"].shape[1]
        bbox = []
        for page, e in zip(boxes, encoded, strict=True):
            own = [special[i] if word is None else page[word] for i, word in zip(e.ids, e.word_ids, strict=True)]
            bbox.append(own + [special[self.texts.pad]] * (longest - len(own)))
        return {**arrays, "bbox": np.asarray(bbox, np.int32)}


def read_texts(folder: Path, length: int, rules: Texts) -> TextSteps | None:
    """The tokenizer of a published folder; None if it has none.

    Args:
        folder: where its files lie.
        length: the longest text the model takes.
        rules: what the files do not tell.
    """
    settings = _settings(folder)
    tokenizer = _read(folder, dataclasses.replace(rules, lower=settings.get("do_lower_case", rules.lower)))
    if tokenizer is None:
        return None
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8")) if _marian(folder) else {}
    names = [
        rules.pad if isinstance(rules.pad, int) else _content(settings.get("pad_token")),
        rules.pad,
        rules.end,
        rules.unknown,
    ]
    ids = (n if isinstance(n, int) else vocab.get(n, tokenizer.token_to_id(n)) for n in names if n is not None)
    pad = next((i for i in ids if i is not None), 0)
    length = min(length, int(min(settings.get("model_max_length") or length, 1e9)))
    boxes = {}
    if rules.page is not None:
        begin, end = (tokenizer.token_to_id(token or "") for token in (rules.begin, rules.end))
        sides = ((pad, "pad", 0), (begin, "cls", 0), (end, "sep", rules.page))
        boxes = {i: settings.get(f"{name}_token_box", (side,) * 4) for i, name, side in sides if i is not None}
    left = not boxes and settings.get("padding_side", "left" if rules.left else "right") == "left"
    return TextSteps(tokenizer, pad, length, rules.full, left, rules.mask, rules.types, vocab, rules.unknown, boxes)


def _settings(folder: Path) -> dict[str, Any]:
    files = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {name: value for file in files if file.exists() for name, value in json.loads(file.read_text()).items()}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _marian(folder: Path) -> bool:
    """Whether the pieces of a SentencePiece file get their ids from another one."""
    return (folder / "source.spm").exists() and (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists()


def _read(folder: Path, rules: Texts) -> tokenizers.Tokenizer | None:
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if rules.lower and rules.full:  # SigLIP 2 was trained with small letters, which its file does not tell
            own = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])  # type: ignore[assignment]
        return tokenizer
    pieces = next((folder / name for name in PIECES if (folder / name).exists()), None)
    if (folder / "vocab.txt").exists():
        tokenizer = _word_pieces(folder / "vocab.txt", rules)
    elif _marian(folder):
        tokenizer = sentence_pieces((folder / "source.spm").read_bytes())
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        tokenizer.add_special_tokens([token for token in vocab if token.startswith(">>") and token.endswith("<<")])
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = _byte_pairs(folder, rules)
    elif pieces is not None:
        tokenizer = sentence_pieces(pieces.read_bytes(), rules)
    elif rules.bytes:
        tokenizer = _bytes(rules.bytes)
    else:
        return None
    tokenizer.add_special_tokens(_added(folder))
    return _with_ends(tokenizer, rules)


def _added(folder: Path) -> list[str]:
    """The tokens behind a vocabulary, by their ids."""
    file = folder / "added_tokens.json"
    ids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    ids |= {str(_content(token)): int(i) for i, token in _settings(folder).get("added_tokens_decoder", {}).items()}
    return sorted(ids, key=ids.__getitem__)


def _bytes(special: Sequence[str]) -> tokenizers.Tokenizer:
    """Texts byte by byte, whose ids follow those of the special tokens."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that ByteLevel writes as they are
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {token: i for i, token in enumerate([*special, *(letters[byte] for byte in range(256))])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _word_pieces(file: Path, rules: Texts) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=rules.unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=rules.lower)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab])
    return tokenizer


def _byte_pairs(folder: Path, rules: Texts) -> tokenizers.Tokenizer:
    unknown = {"unk_token": rules.unknown} if rules.word_end else {}
    model = models.BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix=rules.word_end, **unknown
    )
    tokenizer = tokenizers.Tokenizer(model)
    if rules.word_end:  # CLIP: words, numbers and signs are told apart before their bytes are
        space = tokenizers.Regex(r"\s+")
        pattern = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
            [normalizers.NFC(), normalizers.Replace(space, " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Split(pattern, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=rules.space)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    vocab = tokenizer.get_vocab()
    special = dict.fromkeys((*(rules.begin or "").split(), rules.end, rules.pad, rules.unknown))
    tokenizer.add_special_tokens([t for t in special if isinstance(t, str) and t in vocab])
    if "<mask>" in vocab:
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


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


def _with_ends(tokenizer: tokenizers.Tokenizer, rules: Texts) -> tokenizers.Tokenizer:
    """Puts the family's tokens in front of and behind every text."""
    begin, end = (rules.begin or "").split(), rules.end
    ends = [(token, tokenizer.token_to_id(token)) for token in (*begin, end) if token]
    if missing := [token for token, i in ends if i is None]:
        raise InputError(f"the vocabulary has no {' and no '.join(missing)}, which stand around every text of this family")
    if ends:
        front, behind = "".join(f"{token} " for token in begin), f"{end} " if end else ""
        single = f"{front}$A {behind}".strip()
        between = behind * 2 if rules.twice else behind
        pair = f"{front}$A:0 {between}$B:1 {behind.strip() + ':1' if behind else ''}".strip()
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=single, pair=pair, special_tokens=list(dict.fromkeys(ends))
        )
    return tokenizer
