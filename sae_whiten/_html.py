"""HTML pages from Jinja2 templates, which escape all that comes from data."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["template_environment"]


def template_environment(package: str, **filters: Callable[..., Any]) -> Environment:
    """The templates of a package's folder `templates`.

    Args:
        package: Its full name.
        filters: By the names that they have in the templates.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment
