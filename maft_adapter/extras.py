"""What to install where an optional library is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of optional libraries: without one of them, the error names the extra that brings it.

    Args:
        name: of the extra in setup.cfg.

    Raises:
        ModuleNotFoundError: a library is missing.

    Example:
        >>> with extra("demo"):
        ...     import no_such_library
        Traceback (most recent call last):
        ModuleNotFoundError: no_such_library is not installed; run: pip install "maft-adapter[demo]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error.name} is not installed; run: pip install "maft-adapter[{name}]"'
        raise ModuleNotFoundError(message, name=error.name) from error
