"""Every test leaves the catalogues and the user's cache as they were."""

import pytest
from catalogues import no_trace  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def _no_trace(no_trace):  # noqa: F811
    """For every test here."""
