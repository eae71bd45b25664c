"""Tests, a folder for each room of the package; what several of them share is in ``tests/helpers/``."""

import pytest

pytest.register_assert_rewrite("tests.helpers")  # so that an assertion in a helper shows its values as one in a test
