"""Text for terminals that lack some characters: π is spelled pi where standard output
is ASCII only."""

from __future__ import annotations

import codecs
import io
import math
import sys
import unicodedata
from collections.abc import Sequence

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
    """Return the text with characters that standard output lacks spelled out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return spelled(text, encoding)


def spelled(text: str, encoding: str) -> str:
    """Return the text with characters that an encoding lacks spelled out."""
    # The error handler that this module registers has the module's name.
    return text.encode(encoding, __name__).decode(encoding)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the first column to the left, others to the
    right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def spoken_shape(event: tuple[int, ...] | None) -> str:
    """Format an event's shape as one speaks of it: ``28×28``."""
    if event is None:
        return "events of any shape"
    return "×".join(map(str, event)) or "a number"


def clipped(text: str, longest: int = 160) -> str:
    """Return the text, or its beginning where it is too long."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def cell(value: float) -> str:
    """Format a number of the table; one that is withheld is a dash."""
    return "–" if math.isnan(value) else f"{value:.4g}"


def spell_out(*streams: object) -> None:
    """Make text streams spell out characters that their encodings lack."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=__name__)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error: return the replacement, and the position from which to
    go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(map(_spelled, missing)), error.end


def _spelled(character: str) -> str:
    """One character in ASCII: by the table, without accents, or a Greek letter by its
    name."""
    decomposed = unicodedata.normalize("NFKD", _ASCII.get(character, character))
    # Characters of a decomposition may be in the table too, as the slash of ½.
    in_table = "".join(_ASCII.get(c, c) for c in decomposed)
    ascii_only = in_table.encode("ascii", "ignore").decode()
    if ascii_only or unicodedata.combining(character):
        return ascii_only
    name = unicodedata.name(character, "").split()
    if name[:1] == ["GREEK"]:
        return name[-1].lower()
    return "?"


codecs.register_error(__name__, _spell)
