"""What JSON files hold, as the type checker sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JSON = bool | int | float | str | Sequence[Any] | Mapping[str, Any] | None
JSONObject = dict[
    str, Any
]  # what most files hold; who reads one knows of each name what its value is
