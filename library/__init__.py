"""What the scripts share: options, datasets, model families, training."""

import importlib.util
import sys

_missing = [name for name in ("PIL", "toml", "tqdm") if importlib.util.find_spec(name) is None]
if _missing:  # said here, because every script imports this first, and Python's own answer would be a traceback
    print(
        f"error: {sys.executable} has no package {_missing[0]}; activate the environment first "
        "(source .venv/bin/activate, on Windows .venv\\Scripts\\activate), or make it with quickstart.sh",
        file=sys.stderr,
    )
    sys.exit(2)
