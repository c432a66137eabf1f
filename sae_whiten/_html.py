"""HTML pages from Jinja2 templates, with everything that comes from data escaped."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["template_environment"]


def template_environment(package: str, **filters: Callable[..., Any]) -> Environment:
    """The templates in the folder `templates` of a package.

    Args:
        package: Full name of the package.
        filters: Jinja2 filters, by their names in the templates.
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
