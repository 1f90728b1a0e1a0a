"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re

from jobs import REPOSITORY


def test_every_named_test_exists():
    table = (REPOSITORY / "docs" / "reliability.md").read_text()
    named, file = [], ""
    for path, test in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", table):
        file = path or file
        if file.endswith(".py") and (path or test):
            named.append((file, test))
    assert len(named) > 30
    for file, test in named:
        found = (REPOSITORY / "tests" / file).read_text()
        assert not test or f"def {test}(" in found
