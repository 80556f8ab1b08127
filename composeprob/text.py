"""Text for terminals that lack some characters: π is spelled pi where standard output
takes no other than ASCII."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

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
    return spelled(text, getattr(sys.stdout, "encoding", None) or "utf-8")


def spelled(text: str, encoding: str) -> str:
    """The text with the characters that an encoding lacks spelled out."""
    return text.encode(encoding, __name__).decode(encoding)


def spell_out(*streams: object) -> None:
    """Lets text streams spell out what their encodings lack."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=__name__)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(character: str) -> str:
    """One character in ASCII: by the table, without accents, or a Greek letter by its
    name."""
    plain = "".join(
        _ASCII.get(c, c)
        for c in unicodedata.normalize("NFKD", _ASCII.get(character, character))
    )
    if (shown := plain.encode("ascii", "ignore").decode()) or unicodedata.combining(
        character
    ):
        return shown
    name = unicodedata.name(character, "").split()
    return name[-1].lower() if name[:1] == ["GREEK"] else "?"


codecs.register_error(__name__, _spell)
