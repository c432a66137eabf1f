"""Temporary changes for the length of a block: environment variables and log filters."""

import contextlib
import logging
import os
from collections.abc import Iterator

__all__ = ["environment", "without_messages"]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables, for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def without_messages(logger_name: str, *texts: str) -> Iterator[None]:
    """Suppress messages of a logger that contain any of these texts."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    logger = logging.getLogger(logger_name)
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
