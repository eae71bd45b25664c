"""Write docs/config.md, the list of all config keys: ``python scripts/maintain/config_reference.py``."""

from __future__ import annotations

from pathlib import Path

from oodprompt.config.keys import declared_keys
from oodprompt.files import write_atomically
from oodprompt.reports.style import markdown_table

PATH = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def reference() -> str:
    """The content of docs/config.md: one table per section, from the declarations in the code."""
    parts = [
        "# Config keys\n",
        "Written by `python scripts/maintain/config_reference.py` from the declarations beside the code. Set a key in a yaml file or "
        "at the end of the command line: `python train.py ... OPTIM.LR 0.01`. Keys marked [open] are points that the "
        "method's sources leave open. Where no values are given, any value of the default's type is taken.\n",
        "## Which value counts\n",
        "A value counts over those before it in this list:\n",
        "1. the default in the tables below\n2. the file of the data set, `--dataset-config-file`\n"
        "3. the file of the method, `--config-file`\n4. flags, such as `--seed`\n5. `KEY VALUE` pairs at the end\n",
        "The section `DATASET` is an exception. If both files set `DATASET.NAME`, the file of the data set counts. Its "
        "`DATASET` keys win over those of the method's file. If the two names differ, the other `DATASET` keys of the "
        "method's file are not used either: they describe another data set. One line, which begins with `Note:`, names "
        "each key that one file overrides of the other, with both values.\n",
    ]
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, key in declared_keys().items():
        section = ".".join(name.split(".")[:-1]) or "Top level"
        sections.setdefault(section, []).append((f"`{name}`", f"`{key.default!r}`", key.values, key.doc))
    for section, rows in sorted(sections.items(), key=lambda item: (item[0] != "Top level", item[0])):
        parts += [f"## {section}\n", markdown_table(("key", "default", "values", "meaning"), rows), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    write_atomically(PATH, reference())
    print(f"Wrote {PATH}")
