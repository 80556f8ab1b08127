"""Numbers that a run keeps of each of its levels: a row for each, which says once what
it is called, its axes, and where it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Quantity:
    """A quantity that a run keeps of each level.

    Attributes:
        long_name: its name in words, a panel's title.
        units: of its numbers, the label of a panel's axis.
        dims: names of its axes; a kernel that moves all sites together has no
            ``block``.
        counts: True of a number of events, 0 where there are none; all else is NaN at
            levels that have no such number.
        most: the most that it can be, 1 of a share, or ``"chains"``, as many as there
            are; None without a bound.
        reported: True if a result has it.
        drawn: True if it has a panel.
        old_files_lack: True if it is kept since later than `saving.FORMAT`: a file
            without it is read, and has NaN.
    """

    long_name: str
    units: str = ""
    dims: tuple[str, ...] = ("level",)
    counts: bool = False
    most: float | str | None = None
    reported: bool = True
    drawn: bool = True
    old_files_lack: bool = False

    def empty(self, num_levels: int, num_blocks: int) -> np.ndarray:
        """Return its array before anything was recorded."""
        sizes = {"level": num_levels, "block": num_blocks}
        shape = [sizes[dim] for dim in self.dims]
        if self.counts:
            return np.zeros(shape, np.int32)
        # Strongly typed, as arrays of a checkpoint are: with weak types the loop would
        # be compiled again for a run that resumes.
        return np.full(shape, np.nan, jnp.result_type(float))


BY_BLOCK = ("level", "block")


def kept(long_name: str, units: str = "", **options: Any) -> Any:
    """Return the field of a `Quantity`."""
    quantity = Quantity(long_name, units, **options)
    return dataclasses.field(metadata={"quantity": quantity})


class Records(eqx.Module):
    """Records of every level, for the B blocks of a kernel.

    A new quantity is one field here, and the call of `at` that measures it.
    """

    # A checkpoint names its arrays after these fields.

    acceptance: Float[Array, "levels blocks"] = kept(
        "acceptance", "share of moves", dims=BY_BLOCK, most=1.0
    )
    step_size: Float[Array, "levels blocks"] = kept("step size", dims=BY_BLOCK)
    # Before resampling
    ess: Float[Array, " levels"] = kept(
        "effective sample size", "share of chains", most=1.0
    )
    # Number of initial chains that have descendants, after resampling
    ancestors: Float[Array, " levels"] = kept(
        "distinct ancestors", "chains", most="chains"
    )
    non_finite: Int[Array, " levels"] = kept(
        "proposals that were not finite", "number", counts=True
    )
    # Mean over accepted moves
    quadrature_error: Float[Array, "levels blocks"] = kept(
        "error of log-ratios", "nats", dims=BY_BLOCK, drawn=False
    )
    # Relative variance of the incremental weights of the step to this level
    weight_variance: Float[Array, " levels"] = kept(
        "variance of incremental weights", reported=False
    )
    # How far its correction moved chains, in units of the noise
    step_error: Float[Array, " levels"] = kept("error of the step", reported=False)
    # Mean probability of swaps with the next noisier rung
    swaps: Float[Array, " levels"] = kept(
        "swaps with the next level", "share accepted", most=1.0
    )

    @classmethod
    def empty(cls, num_levels: int, num_blocks: int = 1) -> Self:
        """Return records without a number yet, made on the host."""
        arrays: dict[str, Any] = {}
        for name, quantity in QUANTITIES.items():
            arrays[name] = quantity.empty(num_levels, num_blocks)
        return cls(**arrays)

    def at(self, level: Int[Array, " ..."], **values: Array) -> Self:
        """Return the records with other values at a level."""
        new = {}
        for name, value in values.items():
            new[name] = getattr(self, name).at[level].set(value)
        return dataclasses.replace(self, **new)

    def counting(self, level: Int[Array, ""], number: Int[Array, ""]) -> Self:
        """Return the records with this ``number`` of non-finite moves, over all chains,
        added at a level."""
        return self.at(level, non_finite=self.non_finite[level] + number)

    @property
    def weighted(self) -> bool:
        """True if chains had importance weights at some level."""
        return bool(np.isfinite(np.asarray(self.ess)).any())

    def of_levels(self, levels: Iterable[int], blocks: bool) -> Self:
        """Return the records of some levels as NumPy's arrays, without an axis of
        ``blocks`` under a kernel that moves all sites together."""
        index = np.asarray(levels)
        arrays = {}
        for name in QUANTITIES:
            values = np.asarray(getattr(self, name))[index]
            arrays[name] = values if blocks else values.reshape(len(index))
        return dataclasses.replace(self, **arrays)


class NoRecords(Records):
    """Records that stay empty, for runs that are compiled and not made: these then need
    no means over all devices' chains."""

    def at(self, level: Array, **values: Array) -> Self:
        return self


QUANTITIES: dict[str, Quantity] = {
    field.name: field.metadata["quantity"] for field in dataclasses.fields(Records)
}
REPORTED = {name: row for name, row in QUANTITIES.items() if row.reported}
"""The quantities that results have, by their names in `Result.levels`."""


def by_block(
    levels: xarray.Dataset, name: str, title: str = ""
) -> dict[str, np.ndarray]:
    """Values of one diagnostic by level, (K,), under its title, or under one for each
    block; without those that are all NaN. The title is its name in words, or another
    one that is given."""
    values = levels[name]
    title = title or REPORTED[name].long_name
    columns = {title: values.to_numpy()}
    if "block" in values.dims:
        columns = {
            f"{title} of {block}": values.sel(block=block).to_numpy()
            for block in levels["block"].to_numpy()
        }
    return {
        label: column for label, column in columns.items() if np.isfinite(column).any()
    }
