"""Prints the README's table of config keys from the schema: python docs/config_table.py.

With --page it writes docs/configuration.md instead.
"""

import json
import sys
from pathlib import Path

from trajdist.config_schema import fields

PREFACE = """\
# Configuration

Generated from the schema by `python docs/config_table.py --page`. A config is YAML with any of these keys. Command-line
arguments of the form `key=value` override it, and keys that are set nowhere have their defaults. A dot marks the keys
that may change when a run is resumed; changing any other would change the result and is refused. `trajdist config
CONFIG` prints all values as resolved, `trajdist config --schema` prints JSON Schema for editors.
"""


def table() -> str:
    """One row per key: name, default, what it is; a dot marks keys that may change when a run is resumed."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for key, default, description, may_change in fields():
        text = " ".join(description.split()).replace("|", "\\|")
        rows.append(f"| `{key}`{' ·' if may_change else ''} | `{json.dumps(default)}` | {text} |")
    return "\n".join(rows)


def page() -> str:
    """The configuration reference: a section for each group of keys."""
    rows, groups = table().splitlines(), {}
    for row in rows[2:]:
        key = row.split("`")[1]
        groups.setdefault(key.rpartition(".")[0] or "the run", []).append(row)
    parts = [PREFACE]
    parts += ["\n".join([f"## {name}\n", *rows[:2], *lines, ""]) for name, lines in groups.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    if "--page" in sys.argv:
        Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
    else:
        print(table())
