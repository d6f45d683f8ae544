"""Write docs/options.md, every flag of train_network.py, from the declarations of the options.

python tools/write_options_doc.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from library.files import write_text_whole
from library.options.fields import Flag, flags_of
from library.options.groups import TrainNetworkOptions
from library.options.honoured import NOT_HONOURED, REFUSED

PATH = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """# Options of train_network.py

Written from the declarations in `library/options/groups.py` by `tools/write_options_doc.py`; change it there. Every
flag is also a key of `--config_file`, without the dashes. What is said in *italics* is not acted on.
"""


def options_document() -> str:
    """The whole page."""
    parts, group = [HEAD], None
    for flag in flags_of(TrainNetworkOptions).values():
        if flag.group is not group:
            group = flag.group
            parts.append(f"\n## {group.__doc__}\n\n| flag | takes | default | what it does |\n|---|---|---|---|\n")
        parts.append(row(flag))
    return "".join(parts)


def row(flag: Flag) -> str:
    default = "" if flag.default in (None, False, "") else f"`{flag.default}`"
    return f"| `--{flag.name}` | {kind(flag)} | {default} | {meaning(flag)} |\n"


def kind(flag: Flag) -> str:
    """What stands behind the flag; nothing for a switch."""
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    names = {"bool": "", "int": "number", "float": "number", "int_or_float": "steps or share", "str": "text"}
    names["prompts"] = "path or text"
    return names.get(flag.kind, "path") + (" ..." if flag.is_list else "")


def meaning(flag: Flag) -> str:
    text = flag.help.replace("|", "\\|")
    if flag.name in NOT_HONOURED:
        answer = "refused" if flag.name in REFUSED else "no effect"
        return f"*{text}: {answer}, {NOT_HONOURED[flag.name]}*"
    return text


if __name__ == "__main__":
    write_text_whole(PATH, options_document())
    print(PATH)
