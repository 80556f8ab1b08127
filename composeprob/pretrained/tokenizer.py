"""CLIP's tokenizer: a text to token ids, by the `tokenizers` package, from the files beside a text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composeprob.errors import LoadError
from composeprob.json_data import JSON, JSONObject
from composeprob.pretrained.config import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Tokenizers


class Tokenizer:
    """A `Tokenizer` makes token ids of a text: start, the text's own, end, and padding up to a fixed length.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt.
        length: how many ids there are.

    Raises:
        LoadError: no such files, or the `tokenizers` package is not installed.
    """

    def __init__(self, folder: Path, length: int):
        self.length = length
        notes: JSONObject = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                notes |= read_json(folder / name)
        start, end = _text(notes.get("bos_token"), "<|startoftext|>"), _text(notes.get("eos_token"), "<|endoftext|>")
        self._tokenizer = _read(folder, start, end)
        self.end = self._id(folder, end)
        self.padding = self._id(folder, _text(notes.get("pad_token"), "<|endoftext|>"))

    def __call__(self, text: str) -> np.ndarray:
        """Token ids, shape (length,); a text that is too long loses its end."""
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], self.end]
        return np.asarray(ids + [self.padding] * (self.length - len(ids)), np.int32)

    def _id(self, folder: Path, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise LoadError(
                f"The tokenizer in {folder} has no token {token!r}.", fix="fetch its files again from one source."
            )
        return int(found)


def _text(token: JSON, default: str) -> str:
    """A token in either way that files write it."""
    if isinstance(token, dict):
        return str(token.get("content", default))
    return default if token is None else str(token)


def _read(folder: Path, start: str, end: str) -> Tokenizers:
    try:
        import tokenizers
        from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise LoadError(
            "Texts are made into tokens by the package tokenizers, which is not installed.",
            fix="pip install 'composeprob[text]', or give token ids: model.given(prompt=token_ids).",
        ) from error
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.exists() and not (vocabulary.exists() and merges.exists()):
        raise LoadError(
            f"There is no tokenizer in {folder}: neither tokenizer.json nor vocab.json and merges.txt.",
            fix="fetch the whole folder, or give token ids: model.given(prompt=token_ids).",
        )
    try:
        if whole.exists():
            found = tokenizers.Tokenizer.from_file(str(whole))
            found.no_padding()
            found.no_truncation()
            return found
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = [line.split() for line in merges.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
        pairs = [(line[0], line[1]) for line in lines if len(line) == 2]
        bpe = models.BPE(vocab=ids, merges=pairs, end_of_word_suffix="</w>", unk_token=end)
        found = tokenizers.Tokenizer(bpe)
    except Exception as error:  # the package raises plain exceptions, and files may hold anything
        raise LoadError(
            f"The tokenizer in {folder} cannot be read: {error}", fix="fetch its files again: they are damaged."
        ) from error
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    found.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    # Cut, before bytes are paired, into endings, words, single digits and other signs.
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    pieces = pre_tokenizers.Split(pattern, "removed", invert=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if start in ids and end in ids:
        found.add_special_tokens([start, end])
        found.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]), False, False)
    return found
