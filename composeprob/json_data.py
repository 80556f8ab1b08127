"""What JSON files hold, as the type checker sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JSON = bool | int | float | str | Sequence[Any] | Mapping[str, Any] | None
"""A value that is read from a file, or can be written to one."""
JSONObject = dict[str, Any]
"""What most files hold: values by their names. Who reads one knows of each name what its value is."""
