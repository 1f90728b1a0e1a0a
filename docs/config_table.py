"""Prints the README's table of config keys from the schema: python docs/config_table.py."""

import json

from trajdist.config import fields


def table() -> str:
    """One row per key: name, default, what it is; a dot marks keys that may change when a run is resumed."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for key, default, description, may_change in fields():
        text = " ".join(description.split()).replace("|", "\\|")
        rows.append(f"| `{key}`{' ·' if may_change else ''} | `{json.dumps(default)}` | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
