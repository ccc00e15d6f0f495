"""The work of a depth-wise engine, from the exits of its requests: which layer calls serve how many rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.efficiency.layers import Integers, exit_array

#: Newcomers are read together once one slot in so many is free: one call serves them all.
ADMITTED_AT = 8
#: Rows that must wait for a deep layer, or it is passed over in most turns.
LEAST = 4


@dataclass(frozen=True, eq=False)
class EngineWork:
    """What an engine did for requests that waited at its door, in their order.

    Attributes
    ----------
    rows : (calls,) int
        Rows of each call of a layer.
    admitted : (calls,) int
        Requests that were read just before each call.
    begun, ended : (B,) int
        The first call that a request was there for, and the call after which it was answered; calls are counted from 0.

    Examples
    --------
    >>> work = riskcal.efficiency.engine_work([[1, 1], [1, 3], [2, 1]], slots=2)
    >>> (work.ended >= work.begun).all().item(), len(work.rows) == len(work.admitted)
    (True, True)
    """

    rows: Integers
    admitted: Integers
    begun: Integers
    ended: Integers

    @property
    def calls(self) -> int:
        """Layers called."""
        return len(self.rows)

    @property
    def rows_per_call(self) -> float:
        """Rows that a call serves on average."""
        return float(self.rows.mean())

    def seconds(self, call: tuple[float, float], request: float = 0.0) -> tuple[float, Floats]:
        """Time for all requests, and of each (B,) from when it was read until it was answered.

        Parameters
        ----------
        call : (float, float)
            Seconds of calling a layer, and for each of its rows.
        request : float
            Seconds of reading a request.
        """
        took = call[0] + call[1] * self.rows + request * self.admitted
        end = np.cumsum(took)
        start = end - took
        return float(end[-1]), end[self.ended] - start[self.begun]


def engine_work(exit_layers: ArrayLike, slots: int, *, least: int = LEAST) -> EngineWork:
    """The calls that an engine makes for requests that are all there from the start, without running a model.

    Parameters
    ----------
    exit_layers : (B, T) int
        Of each request, in the order in which they are read.
    slots : int
        Requests in flight at most.
    least : int
        When deep layers have their turn, one that fewer rows wait for is passed over, but in every 64 calls once none is.

    Returns
    -------
    EngineWork

    Notes
    -----
    It follows the rules of `riskcal_adapters.torch.Engine` for one policy: newcomers are read once an eighth of the slots
    is free; the first layer runs until 7 of 10 rows wait for deeper ones, at most 24 times in a row, and then these run in
    turn, from the lowest up; a row that leaves waits for the first layer again. That no row waits longer than ``max_wait``
    seconds is left out, as there is no clock.

    Examples
    --------
    >>> work = riskcal.efficiency.engine_work([[1, 1, 1], [1, 4, 0], [2, 1, 1]], slots=2)
    >>> work.rows.sum().item(), work.rows.max().item()  # in calls of at most two rows
    (12, 2)
    """
    from riskcal.efficiency import kernels

    exits = exit_array(exit_layers)
    slots = _validate.count(slots, "slots", least=1)
    least = _validate.count(least, "least", least=1)
    count, most = len(exits), int(exits.sum())  # a call for each row and layer, at most
    rows, admitted = np.zeros(most, dtype=np.int64), np.zeros(most, dtype=np.int64)
    begun, ended = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    tokens = np.count_nonzero(exits, axis=1)
    calls = kernels.engine_calls(
        exits, tokens, slots, least, ADMITTED_AT, rows, admitted, begun, ended
    )
    return EngineWork(rows[:calls].copy(), admitted[:calls].copy(), begun, ended)
