"""Published tokenizer files through the `tokenizers` library: tokenizer.json, vocab.txt, vocab and merges, SentencePiece."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mmx.errors import InputError
from mmx.zoo.sentencepiece import sentence_pieces
from mmx.zoo.texts import Texts, TextSteps

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
