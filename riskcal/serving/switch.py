"""`KillSwitch`: full depth from the next token on, from any thread, a signal handler or a file."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from riskcal import _replacing
from riskcal._validate import RiskcalError

#: How often an empty file is looked at for a reason, and the seconds between two looks.
LOOKS, PAUSE = 10, 0.005


@dataclass(frozen=True)
class Pull:
    """Why and when early exit was switched off.

    Attributes
    ----------
    why : str
        In one line.
    time_unix_nano : int
        Of the wall clock, in nanoseconds.
    source : {"call", "file"}
        What pulled it.
    """

    why: str
    time_unix_nano: int
    source: Literal["call", "file"]


class KillSwitch:
    """Switch early exit off while requests run. Once pulled it stays so; the way back is a new switch.

    Parameters
    ----------
    path : path, optional
        A file whose mere existence pulls the switch; its first line is the reason, for which an empty file is given a
        twentieth of a second. Removing the file afterwards changes nothing. A path that cannot be looked at pulls the
        switch as well: nobody could stop the service by it.

    Examples
    --------
    >>> switch = riskcal.serving.KillSwitch()
    >>> switch.pulled
    False
    >>> switch.pull("schema failures")
    >>> switch.pulled, switch.state.why
    (True, 'schema failures')
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else _replacing.a_path(path)
        # as text: it is looked at all the time
        self._name = "" if self.path is None else os.fspath(self.path)
        # A dict's setdefault is one step for other threads, and takes no lock that a signal handler could find taken.
        self._first: dict[str, Pull] = {}

    def __getstate__(self) -> dict[str, Any]:
        # another process may stand in another folder
        path = None if self.path is None else self.path.absolute()
        return self.__dict__ | {"path": path, "_name": "" if path is None else os.fspath(path)}

    def pull(self, why: str) -> None:
        """Pull the switch. The first reason is the one that is kept.

        Raises
        ------
        RiskcalError
            For an empty reason: the log would not say why quality or cost changed.
        """
        if not isinstance(why, str) or not why.strip():
            raise RiskcalError("why: is empty; say in a few words what was seen.")
        self._keep(why, "call")

    @property
    def pulled(self) -> bool:
        """Whether it has been pulled: ask before every token. One look at the file system, and none once it is.

        The look that finds the file reads the reason in it, for which an empty one is waited for.
        """
        if self._first:
            return True
        if self.path is None:
            return False
        try:
            os.stat(self._name)  # noqa: PTH116  (a path would be slower, and this is asked before every token)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._keep(f"{self.path}: cannot be looked at ({error.strerror})", "file")
            return True
        self._keep(self._reason(self.path), "file")
        return True

    @property
    def state(self) -> Pull | None:
        """The first pull; None before it."""
        return self._first.get("pull")

    def _keep(self, why: str, source: Literal["call", "file"]) -> None:
        self._first.setdefault("pull", Pull(" ".join(why.split()), time.time_ns(), source))

    @staticmethod
    def _reason(path: Path) -> str:
        # a shell makes the file before it writes into it, and the first token that sees it may come in between
        for _ in range(LOOKS):
            try:
                with path.open(encoding="utf-8", errors="replace") as file:
                    text = file.readline(1000).strip()
            except OSError:  # a folder, say: its existence is enough
                break
            if text:
                return text
            time.sleep(PAUSE)
        return f"{path} appeared"
