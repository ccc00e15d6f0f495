"""`ClassCalibration`: what was tested of several classes together, and each class's policy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from riskcal import _showing
from riskcal.policy import Asked, Certificate, ExitPolicy, OfClass, ids_digest, versions
from riskcal.policy.sentences import as_text, at_least, meaning

#: What certificates call it: a Pareto front of books, tested in a fixed sequence.
PROCEDURE = "pareto_by_class"


@dataclass(frozen=True, eq=False, repr=False)
class ClassCalibration:
    """What `calibrate_classes` tested, and what to deploy.

    Attributes
    ----------
    table : DataFrame
        One row per book and class, in tested order: ``class``, ``step``, what the class's candidate is told apart by
        (``threshold``; ``inf``, or ``"full"``, is the full model), ``n``, its mean ``loss`` and cost on the class's prompts that
        were tested, and the book's ``pvalue`` and whether it is ``certified``. Without a joint budget a book is of one class.
    candidates : DataFrame, k rows
        Of the runs.
    chosen : dict of class to int
        Row of ``candidates``; k, which is none, for the full model.
    budgets : dict of class to float
    joint : float or None
    epsilon : float
    objective, cost, test : str
    costs : (float, float)
        Mean cost of what was chosen, and of the full model, over the prompts that were tested.
    lower, upper : float
        Bounds of the losses.
    n : dict of class to int
        Prompts that were tested.
    pilot : tuple
        Ids of the prompts that chose the books and were not tested.
    records_digest : str
    asked : Asked
        What else was asked for: with the fields above all that `riskcal.verify` needs to do it again.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> from dataclasses import replace
    >>> length = np.where(runs.full["tokens"] > 7, "long", "short")  # a class that is known before decoding would do
    >>> classes = replace(runs, labels={"group": length})
    >>> calibration = riskcal.calibrate_classes(classes, budgets=0.1, cost="layers")
    >>> book = riskcal.serving.PolicyBook(calibration.policies())
    >>> book.tasks, calibration.costs[0] < calibration.costs[1]
    (('long', 'short'), True)
    """

    table: pd.DataFrame
    candidates: pd.DataFrame
    chosen: Mapping[str, int]
    budgets: Mapping[str, float]
    joint: float | None
    epsilon: float
    objective: str
    cost: str
    costs: tuple[float, float]
    lower: float
    upper: float
    test: str
    n: Mapping[str, int]
    pilot: tuple[Any, ...]
    records_digest: str
    asked: Asked
    _beside: Mapping[str, Any]  # what the records say of policies beside the candidates

    @property
    def certified(self) -> bool:
        """Whether any class may leave early."""
        return any(j < len(self.candidates) for j in self.chosen.values())

    @property
    def thresholds(self) -> dict[str, float]:
        """By class; ``inf`` where it is left with the full model."""
        return {
            name: math.inf if row is None else float(row["threshold"])
            for name, row in self._rows().items()
        }

    def policies(self, **fields: Any) -> dict[str, ExitPolicy]:
        """The policy of each class, with its certificate, for a `riskcal.serving.PolicyBook`.

        Parameters
        ----------
        **fields
            As in `Calibration.policy`.
        """
        found = {}
        for name, row in self._rows().items():
            policy = ExitPolicy.from_columns(self.candidates, row, self._beside, **fields)
            found[name] = policy.certified(self._certificate(name, tested=row is not None))
        return found

    @property
    def message(self) -> str:
        """The outcome in plain words."""
        total = "" if self.joint is None else f", and {as_text(self.joint)} over all requests"
        wanted = (
            ", ".join(f"{name} {as_text(delta)}" for name, delta in self.budgets.items()) + total
        )
        if not self.certified:
            return (
                f"Nothing was certified for the budgets {wanted}: run the full model. Record more prompts of each class, or "
                "allow more."
            )
        where = ", ".join(
            f"{name} at {'the full model' if row is None else as_text(row['threshold'])}"
            for name, row in self._rows().items()
        )
        n = sum(self.n.values())
        return (
            f"Certified: with probability at least {at_least(self.epsilon)} over the draw of the {n} calibration prompts, the "
            f"expected {meaning(self.objective)} is within all budgets at once ({wanted}), thresholds: {where}. Mean {self.cost} "
            f"{self.costs[0]:.4g}, where the full model takes {self.costs[1]:.4g}."
        )

    def _rows(self) -> dict[str, pd.Series | None]:
        full = len(self.candidates)
        return {
            name: None if j == full else self.candidates.iloc[j] for name, j in self.chosen.items()
        }

    def _certificate(self, name: str, *, tested: bool) -> Certificate:
        own = self.table[self.table["class"] == name]
        certified = own["pvalue"][own["certified"]]
        of_all = {"budgets": dict(self.budgets), "joint": self.joint}
        return Certificate(
            delta=self.budgets[name],
            epsilon=self.epsilon,
            epsilon_spent=self.epsilon / (1 if self.joint is not None else len(self.budgets)),
            attempt=None,
            objective=self.objective,
            lower=self.lower,
            upper=self.upper,
            test=self.test,
            procedure=PROCEDURE,
            starts=1,
            n=self.n[name],
            k=len(own),
            pvalue=float(certified.iloc[-1]) if tested else None,
            records_digest=self.records_digest,
            pilot_n=len(self.pilot),
            pilot_digest=ids_digest(self.pilot),
            weighting="prompts",
            asked=self.asked.model_copy(update={"of_class": OfClass(name=name, **of_all)}),
            versions=versions(),
        )

    def __repr__(self) -> str:
        head = f"ClassCalibration: {self.objective}, epsilon {self.epsilon:g}, {self.cost}"
        return f"{head}\n{self.message}\n\n{_showing.text(self.table)}"

    def _repr_html_(self) -> str:
        return _showing.paragraph(self.message) + _showing.html(self.table)
