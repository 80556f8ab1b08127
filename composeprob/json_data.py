"""Types of the values in JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JSON = bool | int | float | str | Sequence[Any] | Mapping[str, Any] | None
# Most files hold an object; its readers know the type of each name's value.
JSONObject = dict[str, Any]
