"""Texts to published inputs: how a family reads them, and the steps from texts, or from the words of pages, to ids and masks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from mmx.errors import InputError

IMAGE = "<image>"  # where an image stands in a text


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

    def encode(self, texts: Sequence[Any], words: bool = False, ends: bool = True) -> list[tokenizers.Encoding]:
        """What the tokenizer makes of texts, or of lists of words, with the tokens of both `ends`; cut at `length`."""
        self.tokenizer.enable_truncation(self.length)
        self.tokenizer.no_padding()
        return self.tokenizer.encode_batch(list(texts), is_pretokenized=words, add_special_tokens=ends)

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
class ImagePlaces:
    """How texts keep places for images (LLaVA, PaliGemma): the id of `<image>`, once for each token of an image.

    Args:
        token: that id.
        patch: edge of a patch; an image has a token for each.
        special: tokens that an image has in front of them.
        begin: of a family whose texts are `images begin text newline`, with nothing else at either end (PaliGemma), the token
            between images and text; None: images stand anywhere, and the ends are those of any text.
    """

    token: int
    patch: int
    special: int = 0
    begin: str | None = None

    def size(self, pixels: Any) -> int:
        """How many tokens each image of `pixel_values (B, C, H, W)` has."""
        return self.special + (pixels.shape[-2] // self.patch) * (pixels.shape[-1] // self.patch)

    def __call__(self, steps: TextSteps, texts: Sequence[str], pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Published inputs of texts with an image at each `<image>`, text after text.

        Where no text has one, and there is an image for each, PaliGemma's images stand in front.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts={texts!r}; expected a list of texts")
        if (own := steps.tokenizer.token_to_id(IMAGE)) != self.token:
            raise InputError(f"the tokenizer has {IMAGE} as {own}, its configuration as {self.token}; they are of two models")
        if self.begin is not None:
            bare = len(texts) == len(pixels) and not any(IMAGE in text for text in texts)
            parts = [(IMAGE * bare + text).rpartition(IMAGE) for text in texts]
            texts = [f"{front}{image}{self.begin}{text}\n" for front, image, text in parts]
        if (kept := sum(text.count(IMAGE) for text in texts)) != len(pixels):
            raise InputError(f"texts: {kept} times {IMAGE} in all, but {len(pixels)} images; write it once where each stands")
        texts = [text.replace(IMAGE, IMAGE * self.size(pixels)) for text in texts]
        arrays = steps.padded(steps.encode(texts, ends=self.begin is None))
        if self.begin is None:
            del arrays["token_type_ids"]  # a prompt's are all zero, which PaliGemma wants to be told
        return arrays


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
