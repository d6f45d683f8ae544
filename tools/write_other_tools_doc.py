"""Write docs/other_tools.md, what the keys of lora-scripts and kohya_ss become, from the tables that translate them.

python tools/write_other_tools_doc.py
"""

import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from library.files import write_text_whole
from library.options.imports import kohya_ss, lora_scripts
from library.options.imports.translation import Answer, Argument, LeftOut, Renamed, Special

PATH = Path(__file__).resolve().parents[1] / "docs" / "other_tools.md"
HEAD = """# Configurations of other tools

`--config_file` takes the files of lora-scripts and kohya_ss as they are, and says what became of their keys. Keys that
are flags of `train_network.py` keep their meaning; this page lists the others. It is written from the tables in
`library/options/imports/` by `tools/write_other_tools_doc.py`; change it there.
"""
LORA_SCRIPTS = """
## lora-scripts

TOML: `config/default.toml`, `config/lora.toml`, what its pages save, and presets with `[metadata]` and `[data]`. A key
is left out where its page leaves it out, because the switch in the third column is set to something else. What the
page adds for an optimizer is added:

- Prodigy with `prodigy_d0` or `prodigy_d_coef`: {prodigy}, and with `lr_warmup_steps` also `safeguard_warmup=True`
- DAdaptation and DAdaptAdam: {dadapt}
- all DAdapt optimizers: learning rates of 1

| key | becomes | only with |
|---|---|---|
"""
KOHYA_SS = """
## kohya_ss

JSON as the GUI saves it, and the TOML that it makes of it. As in the GUI, a value of 0, `false` or an empty text is
not given: the default counts, which a line says where it is something else. A learning rate of 0 for one of U-Net and
text encoder leaves this part out; 0 for both makes `learning_rate` that of both. Lists such as `optimizer_args` are
split at spaces. `xformers` may be `xformers`, `sdpa` or `none`.

| key | becomes |
|---|---|
"""
NETWORK_TYPES = """
Which of them reach the network depends on `LoRA_type`:

| LoRA_type | network_module | algo | keys |
|---|---|---|---|
"""


def other_tools_document() -> str:
    """The whole page."""
    return "".join(
        [
            HEAD,
            LORA_SCRIPTS.format(
                prodigy=quoted(lora_scripts.PRODIGY_ARGUMENTS), dadapt=quoted(lora_scripts.DADAPT_ARGUMENTS)
            ),
            *(f"| `{key}` | {becomes(lora_scripts, key)} | {switch(key)} |\n" for key in lora_scripts_keys()),
            KOHYA_SS,
            *(f"| `{key}` | {becomes(kohya_ss, key)} |\n" for key in kohya_ss.KEYS),
            NETWORK_TYPES,
            *(
                f"| {name} | `{kind.module}` | {kind.algo or ''} | {quoted(kind.keys)} |\n"
                for name, kind in kohya_ss.NETWORK_TYPES.items()
            ),
        ]
    )


def lora_scripts_keys() -> list[str]:
    """The keys of its own, and the flags that a switch of it can turn off."""
    return [*lora_scripts.KEYS, *(key for key in lora_scripts.ONLY_WITH if key not in lora_scripts.KEYS)]


def becomes(tool: ModuleType, key: str) -> str:
    """An answer in words."""
    answer: Answer | None = tool.KEYS.get(key)
    match answer:
        case Renamed(name):
            return f"`{name}`"
        case Argument(flag, name):
            return f"`{flag}`: `{name}=`"
        case Special(words):
            return words
        case LeftOut(reason):
            return f"left out: {reason}"
    return f"`{key}`"


def switch(key: str) -> str:
    """The key and value without which lora-scripts leaves a key out."""
    if key not in lora_scripts.ONLY_WITH:
        return ""
    name, wanted = lora_scripts.ONLY_WITH[key]
    return f"`{name} = {str(wanted).lower() if wanted is True else wanted}`"


def quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    write_text_whole(PATH, other_tools_document())
    print(PATH)
