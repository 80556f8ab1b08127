"""Text for terminals that lack some characters: π is spelled pi where standard output takes no other than ASCII."""

from __future__ import annotations

import codecs
import sys
import unicodedata

SPELLED = "composeprob.spelled"
"""The name of the handler of encoding errors, as of `str.encode`, that spells characters out."""
_ASCII = {
    **dict.fromkeys("−–—‐─━", "-"),
    **dict.fromkeys("│┃", "|"),
    "±": "+-",
    "×": "x",
    "·": "*",
    "√": "sqrt",
    "∇": "grad ",
    "∂": "d",
    "∝": "~",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "‖": "||",
    "λ": "lambda",
    "⟨": "<",
    "⟩": ">",
    "⁄": "/",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "∞": "inf",
    "∫": "int ",
    "∈": "in",
}


def printable(text: str) -> str:
    """The text as standard output can show it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, SPELLED).decode(encoding)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(character: str) -> str:
    """One character in ASCII: by the table, without accents, or a Greek letter by its name."""
    plain = "".join(_ASCII.get(c, c) for c in unicodedata.normalize("NFKD", _ASCII.get(character, character)))
    if (shown := plain.encode("ascii", "ignore").decode()) or unicodedata.combining(character):
        return shown
    name = unicodedata.name(character, "").split()
    return name[-1].lower() if name[:1] == ["GREEK"] else "?"


codecs.register_error(SPELLED, _spell)
