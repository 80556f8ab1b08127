"""Where the chains of a run were on their way down the levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from composeprob.results.estimates import systematic


@dataclass(frozen=True)
class Descent:
    """The chains of a run with ``keep_path``, in F frames from the noisiest level to level 0.

    Args:
        levels: the level of each frame, (F,); the first one is where the chains start.
        log_snr: its log-SNR, (F,).
        log_weights: log-weights of the chains there, (F, N).
        samples: values of every site and deterministic as they were there, noise included, ``{name: (F, N, …)}``.
    """

    levels: np.ndarray
    log_snr: np.ndarray
    log_weights: np.ndarray
    samples: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.levels)

    def unweighted(self, name: str, frame: int) -> np.ndarray:
        """Returns the values of a site in one frame as samples of equal weight, (N, …)."""
        log_weights = self.log_weights[frame]
        weights = np.exp(log_weights - log_weights.max())
        values = self.samples[name][frame]
        return values[systematic(weights / weights.sum(), len(values))]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns everything by the name under which it is written to disk."""
        sites = {f"path/samples/{name}": values for name, values in self.samples.items()}
        return {"path/levels": self.levels, "path/log_snr": self.log_snr, "path/log_weights": self.log_weights, **sites}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Descent | None:
        """Reads what `arrays` returned out of all that a file holds; None where that has no path."""
        if "path/levels" not in arrays:
            return None
        prefix = "path/samples/"
        samples = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
        return cls(arrays["path/levels"], arrays["path/log_snr"], arrays["path/log_weights"], samples)
