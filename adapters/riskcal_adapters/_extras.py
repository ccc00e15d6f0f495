"""What is said where the packages of an extra are not installed."""

import importlib.util


def missing(error: ModuleNotFoundError, what: str, extra: str) -> ModuleNotFoundError:
    """The error with what mends it; a module of riskcal's own that is not found is another matter, and left as it is."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "riskcal", "riskcal_adapters"):
        return error
    return ModuleNotFoundError(_said(what, package, extra), name=error.name)


def need(package: str, what: str, extra: str) -> None:
    """Ask for a package that another library imports late, and asks for in its own words.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed, naming the extra that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(_said(what, package, extra), name=package)


def _said(what: str, package: str, extra: str) -> str:
    return f"{what} needs {package}: pip install 'riskcal-ltt[{extra}]'"
