"""`PolicyBook`: the policy of a request's task."""

from collections.abc import Mapping
from dataclasses import dataclass

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy


@dataclass(frozen=True)
class Route:
    """What was found for a task.

    Attributes
    ----------
    task : str or None
        As the request named it.
    policy : ExitPolicy
        The full model's where the task is not known.
    known : bool
        False is to be logged, as event ``riskcal.route.unknown``.

    Examples
    --------
    >>> book = riskcal.serving.PolicyBook({"news": riskcal.ExitPolicy(threshold=0.8)})
    >>> route = book.route("weather")
    >>> route.task, route.known, route.policy.is_full_model
    ('weather', False, True)
    """

    task: str | None
    policy: ExitPolicy
    known: bool


class PolicyBook:
    """Policies by task. A task that is unknown or missing gets the full model: nothing was certified for it.

    Parameters
    ----------
    policies : mapping of str to ExitPolicy
        Copied: later changes of the mapping do not reach requests that run.

    Raises
    ------
    RiskcalError
        For keys that are no text, or values that are no policies.

    Examples
    --------
    >>> book = riskcal.serving.PolicyBook({"news": riskcal.ExitPolicy(threshold=0.8)})
    >>> book.route("news").policy.threshold
    0.8
    >>> book.route("chat").policy.is_full_model, book.route("chat").known
    (True, False)
    """

    def __init__(self, policies: Mapping[str, ExitPolicy]) -> None:
        if not isinstance(policies, Mapping):
            raise RiskcalError(
                f"policies: {_validate.shown(policies)} is no dictionary; give {{'news': policy}}."
            )
        for index, (task, policy) in enumerate(policies.items()):
            if not isinstance(task, str) or not task:
                raise RiskcalError(
                    f"policies: the key {_validate.shown(task)} at index {index} names no task; give text."
                )
            if not isinstance(policy, ExitPolicy):
                raise RiskcalError(
                    f"policies: {_validate.shown(policy)} at index {index} (task {task!r}) is no ExitPolicy; "
                    "load it with riskcal.ExitPolicy.load."
                )
        self._policies = dict(policies)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have policies."""
        return tuple(self._policies)

    @property
    def policies(self) -> dict[str, ExitPolicy]:
        """By task."""
        return dict(self._policies)

    def route(self, task: str | None) -> Route:
        """Find a task's policy; never an exception, whatever a request holds."""
        policy = self._policies.get(task) if isinstance(task, str) else None
        if policy is None:
            return Route(task, ExitPolicy.full_model(), known=False)
        return Route(task, policy, known=True)
