"""Settings of all tests."""

from hypothesis import settings

# the same examples in every run, so that a failure is of the change at hand; others are looked for
# with pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
