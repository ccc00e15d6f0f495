"""`EventWatch`: the losses of shadowed requests in an event log, monitored; it goes on exactly where its state stands."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.monitor import RiskMonitor
from riskcal.serving.drift import Drift, features
from riskcal.serving.estimates import Interval, mean_interval
from riskcal.serving.events import NAMES
from riskcal.serving.place import files_of, known_by
from riskcal.serving.reader import Events, events_in, parsed, request_id
from riskcal.serving.strata import Strata, Stratum, add, is_number, mapping
from riskcal.serving.watch_state import refuse_others


class EventWatch:
    """Feed the shadows' losses of an event log to a monitor.

    Of event ``riskcal.shadow.evaluated`` it reads the attributes ``riskcal.loss``, ``riskcal.task`` and
    ``gen_ai.response.id``, and ``riskcal.token.disagreement`` beside them; of ``riskcal.request.served``
    ``riskcal.exit.layers``, tokens by the layer they left at.

    A loss that is missing, no number or out of bounds counts as the worst, ``monitor.upper``: what failed must not hide. A
    request id that was seen before is not fed again, which the monitor's claim allows, since the id is known before its loss.
    Numbers that an engine gave to requests without ids are those of its ``riskcal.session`` alone.

    An event that says why its request was served at full depth (``riskcal.full_depth``: the kill switch, a task without a
    policy, a policy of another model) feeds nothing: its loss is 0 whatever the policy is worth, and would silence the monitor.

    A shadow's request that ended without an output (``riskcal.shadow.missing``: a time-out, a cancelled request) has a loss that
    nobody knows. It feeds nothing, is counted, and the verdict says so: what is estimated is about requests that have outputs.

    Parameters
    ----------
    monitor : RiskMonitor
        With the delta and the bounds of the certificate.
    drift : Drift, optional
        Is fed the features of every request that the log tells of, once each as far as they have ids.

    Attributes
    ----------
    counts : Counter
        ``damaged``, ``backwards``, ``repeated``, ``unknown`` and ``failed`` so far; ``full_depth``, requests that were served so;
        ``lost``, events that could not be written.
    losses : dict of str to (n, sum)
        By task; a missing task is ``""``.
    disagreements : dict of str to (n, sum)
        The same of the share of tokens that were not the full model's: a statistic, not what was certified.
    events : Counter
        Events by name, repeated ones too.
    layers : dict of str to Counter
        Tokens by exit layer, by task.
    strata : Strata
        What there is below a task: difficulties, classes of tokens, what verification rejected.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> log.write_all(
    ...     ("riskcal.shadow.evaluated", {"gen_ai.response.id": f"r{i}", "riskcal.loss": 0.5}) for i in range(40)
    ... )
    >>> watch = riskcal.serving.EventWatch(riskcal.RiskMonitor(delta=0.1)).read("events.jsonl")
    >>> watch.monitor.alarm
    True
    >>> watch.save("watch.json")  # EventWatch.load goes on from there
    """

    def __init__(self, monitor: RiskMonitor, *, drift: Drift | None = None) -> None:
        if monitor.proxy is not None:
            raise RiskcalError("monitor: an event log holds no proxies; give one without proxy=.")
        self.monitor, self.drift = monitor, drift
        self.counts: Counter[str] = Counter()
        self.losses: dict[str, tuple[int, float]] = {}
        self.disagreements: dict[str, tuple[int, float]] = {}
        self.events: Counter[str] = Counter()
        self.layers: dict[str, Counter[str]] = {}
        self.strata = Strata()
        self._features: dict[str, list[float]] = {}  # not yet fed
        self._served: dict[str, None] = {}
        self._seen: dict[str, None] = {}
        self._absent: dict[str, str] = {}  # tasks, by request
        self._place: tuple[int, int] | None = None  # inode and byte
        self._known_by = ""
        self._clock = -1

    def read(self, path: str | os.PathLike[str]) -> Self:
        """Take what a log holds beyond the last call, rotated files first.

        Raises
        ------
        RiskcalError
            If the file where the last call ended is no longer among them, or another stands there: its rest would be lost.
        """
        files = files_of(path)
        start = 0
        if self._place is not None:
            inodes = [inode for _, inode in files]
            if self._place[0] not in inodes:
                raise RiskcalError(
                    f"{path}: the file that was read last is gone; put it back beside the log, or begin a new state."
                )
            start = inodes.index(self._place[0])
        for file, inode in files[start:]:
            new = self._new(file, inode, renamed=file != files[-1][0])
            if new is None:  # rotated meanwhile: the next call finds it under its new name
                break
            found, end, known = new
            for event in found.events:
                self._take(event)
            self.counts["damaged"] += len(found.damaged) + (end > found.offset)
            self.counts["unknown"] += found.unknown.total()
            self._place, self._known_by = (inode, end), known
        return self._fed()

    def _new(self, path: Path, inode: int, *, renamed: bool) -> tuple[Events, int, str] | None:
        """What a file holds beyond the place, where that ends, and what it is known by; None where another has its name now."""
        at = self._place[1] if self._place is not None and self._place[0] == inode else 0
        try:
            with path.open("rb") as file:
                there = os.fstat(file.fileno())
                if there.st_ino != inode:
                    return None
                # states from before digests were kept know a file by its size alone
                if at > there.st_size or (at and self._known_by not in ("", known_by(file, at))):
                    raise RiskcalError(
                        f"{path}: is not the file that was read last, which was emptied or deleted, and another begun in its "
                        "place; put it back beside the log, or begin a new state."
                    )
                file.seek(at)
                found = events_in(file.read(), at)
                # a torn last line is read again, unless it is of a renamed file, where nobody ends it
                end = found.offset + (found.torn_bytes if renamed else 0)
                return found, end, known_by(file, end)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not renamed:
                return None  # it was renamed, and the next one is not there yet
            raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None

    def follow(self, lines: Iterable[str | bytes]) -> Self:
        """Take the lines of a stream as they come, and return with its end or with the line at which losses raise the alarm.

        What drifted is known when it returns: of a stream without an end give a few lines at a time. It has no place to go on
        from: of one that begins again, requests that were seen before are not fed again, as far as they have ids.
        """
        for line in lines if not self.monitor.alarm else ():
            self._take_line(line)
            if self.monitor.alarm:
                break
        return self._fed()

    def _take_line(self, line: str | bytes) -> None:
        if not line.strip():
            return
        event = parsed(line)
        if event is None:
            self.counts["damaged"] += 1
            return
        self.counts["unknown"] += event["name"] not in NAMES
        self._take(event)

    def _fed(self) -> Self:
        """What drifts is told of many requests at once, which is quicker and the same."""
        # first: what interrupts it must not feed them again
        features, self._features = self._features, {}
        if self.drift is not None and features:
            self.drift.update(features)
        return self

    def estimates(self) -> list[Stratum]:
        """Every stratum with its mean and interval: tasks, below each its difficulties and its classes of tokens."""
        return list(self.strata.estimates(self.losses, self.monitor.lower, self.monitor.upper))

    def interval(self, task: str, epsilon: float = 0.05) -> Interval:
        """Where the mean loss of a task is, however often one looks (`mean_interval`), if it stays the same."""
        n, total = self.losses.get(task, (0, 0.0))
        lower, upper = self.monitor.lower, self.monitor.upper
        return mean_interval(n, total, epsilon=epsilon, lower=lower, upper=upper)

    def _take(self, event: dict[str, Any]) -> None:
        self.events[event["name"]] += 1
        now: Any = event.get("time_unix_nano")
        if _validate.is_whole(now):
            self.counts["backwards"] += now < self._clock
            self._clock = now
        told = mapping(event, "attributes")
        lost: Any = told.get("riskcal.events.lost")
        if _validate.is_whole(lost) and lost > 0:
            self.counts["lost"] += lost
        takes = {
            "riskcal.request.served": self._take_served,
            "riskcal.shadow.missing": self._take_missing,
            "riskcal.shadow.evaluated": self._take_evaluated,
        }
        if event["name"] in takes:
            takes[event["name"]](event, str(told.get("riskcal.task") or ""), told)

    def _take_served(self, event: dict[str, Any], task: str, told: dict[str, Any]) -> None:
        self.counts["full_depth"] += bool(told.get("riskcal.full_depth"))
        if isinstance(layers := told.get("riskcal.exit.layers"), dict):
            tokens = {str(k): n for k, n in layers.items() if _validate.is_whole(n)}
            self.layers.setdefault(task, Counter()).update(tokens)
        self.strata.served(task, told)
        identity = request_id(event)
        if identity is None or identity not in self._served:
            self._note(event)
            if identity is not None and self.drift is not None:
                self._served[identity] = None

    def _take_missing(self, event: dict[str, Any], task: str, told: dict[str, Any]) -> None:
        identity = request_id(event)
        if identity is None:
            identity = f"\0{self.events[event['name']]}"
        if not told.get("riskcal.full_depth") and identity not in self._seen:
            self._absent.setdefault(identity, task)

    def _take_evaluated(self, event: dict[str, Any], task: str, told: dict[str, Any]) -> None:
        if told.get("riskcal.full_depth"):
            return
        identity = request_id(event)
        if identity is not None and identity in self._seen:
            self.counts["repeated"] += 1
            return
        if identity is not None:
            self._seen[identity] = None
            self._absent.pop(identity, None)
        try:
            loss = _number(told.get("riskcal.loss"))
            self.monitor.update(loss)
        except RiskcalError:
            self.counts["failed"] += 1
            loss = self.monitor.upper
            self.monitor.update(loss)
        add(self.losses, task, loss)
        self.strata.evaluated(task, told, loss)
        self._note(event)
        apart: Any = told.get("riskcal.token.disagreement")
        if is_number(apart) and 0 <= apart <= 1:
            add(self.disagreements, task, apart)

    def _note(self, event: dict[str, Any]) -> None:
        if self.drift is not None:
            for feature, value in features(event).items():
                self._features.setdefault(feature, []).append(value)

    @property
    def alarm(self) -> bool:
        """Whether losses exceed what was certified, or what is watched for drift has drifted."""
        return self.monitor.alarm or (self.drift is not None and bool(self.drift.drifted))

    @property
    def missing(self) -> dict[str, int]:
        """Requests whose loss nobody knows, by task; one of the same id that was evaluated since is none."""
        return dict(Counter(self._absent.values()))

    @property
    def verdict(self) -> str:
        """What can be said of losses: nothing over none, and never that there is no alarm then."""
        if self.monitor.alarm:
            return f"alarm at loss {self.monitor.alarm_at}"
        n, missing = self.monitor.n, len(self._absent)
        unknown = f", and {missing} that nobody knows" if missing else ""
        if not n:
            return f"no losses{unknown}, so that nothing can be said"
        return f"no alarm over {n} losses{unknown}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state; a file that stands there is replaced whole or not at all."""
        self._fed()
        state = {
            "kind": "riskcal.EventWatch",
            "schema_version": 1,
            "monitor": self.monitor.to_json(),
            "counts": self.counts,
            "losses": self.losses,
            "disagreements": self.disagreements,
            "events": self.events,
            "layers": self.layers,
            "strata": self.strata.to_json(),
            "drift": None if self.drift is None else self.drift.to_json(),
            "served": list(self._served),
            "seen": list(self._seen),
            "absent": self._absent,
            "place": self._place,
            "known_by": self._known_by,
            "clock": self._clock,
        }
        with _replacing.replacing(path) as partial:
            partial.write_text(json.dumps(state) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Go on, bit for bit, where `save` was called.

        Raises
        ------
        RiskcalError
            For a file that cannot be read, and for anything but a state: other fields, values of another kind, other versions.
        """
        file = _replacing.a_path(path)
        try:
            state = _validate.from_json(file.read_bytes())
            refuse_others(state)
            drift = state.get("drift")
            watch = cls(
                RiskMonitor.from_json(state["monitor"]),
                drift=None if drift is None else Drift.from_json(drift),
            )
            watch.strata = Strata.from_json(state.get("strata", {}))
            watch._served = dict.fromkeys(state.get("served", ()))
            watch.counts = Counter(state["counts"])
            watch.losses = {task: (n, total) for task, (n, total) in state["losses"].items()}
            # what states from before it was counted do not say
            watch.disagreements = {
                task: (n, total) for task, (n, total) in state.get("disagreements", {}).items()
            }
            watch.events = Counter(state.get("events", {}))
            watch.layers = {task: Counter(layers) for task, layers in state["layers"].items()}
            watch._seen = dict.fromkeys(state["seen"])
            watch._absent = dict(state.get("absent", {}))
            watch._place = None if state["place"] is None else tuple(state["place"])
            watch._known_by = state.get("known_by", "")
            watch._clock = state["clock"]
        except OSError as error:
            raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError) as error:
            raise RiskcalError(f"{path}: is no state of an EventWatch ({error}).") from None
        return watch


def _number(value: Any) -> float:
    if not is_number(value):
        raise RiskcalError("riskcal.loss: is no finite number.")
    return float(value)
