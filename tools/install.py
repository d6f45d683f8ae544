"""Install what Athanor needs into the Python that runs this file; quick when nothing has changed.

    python tools/install.py [--dev] [--optimizers] [--networks] [--trackers] [--xformers]

The one thing pip cannot choose by itself is the build of torch: on Linux the package index hands out the CUDA
build (about 2.6 GB with its libraries) to every machine, on Windows the CPU build. So torch comes first, in the
build that fits this machine; everything after is installed with that torch held fast. Standard library only.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(sys.prefix) / "athanor-installed.json"
EXTRAS = ("dev", "optimizers", "networks", "trackers", "xformers")
PYTORCH_INDEX = "https://download.pytorch.org/whl/"
# Builds of torch for a GPU, best first, and the CUDA major version its driver must offer.
CUDA_BUILDS = {"cu130": 13, "cu128": 12, "cu126": 12, "cu118": 11}
# A closed network must cost seconds, not pip's five retries.
FAIL_FAST = ["--timeout", "15", "--retries", "0"]
MIRROR_HINT = (
    "Installing stopped; the lines above say why. If the package index is slow or out of reach, name a nearer mirror "
    "and run this again, for example in China:\n"
    "    pip config set global.index-url https://pypi.tuna.tsinghua.edu.cn/simple\n"
    "or set PIP_INDEX_URL. PIP_FIND_LINKS may name a folder or page of torch wheels, and is looked at first."
)


def main(argv: list[str] | None = None) -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Athanor needs Python 3.10 to 3.13; {sys.executable} is {sys.version.split()[0]}.")
    names = requirement_files(parse_extras(argv))
    wanted = dict.fromkeys(names, requirements_hash())
    installed = read_stamp()
    missing = [name for name in names if installed.get(name) != wanted[name]]
    if not missing:
        return
    try:
        ensure_pip()
        install_torch()
        for name in missing:
            install_requirements(name)
    except subprocess.CalledProcessError:
        sys.exit(MIRROR_HINT)
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(installed | wanted, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(STAMP)
    say("Installed.")


def parse_extras(argv: list[str] | None) -> list[str]:
    """The groups of optional packages asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for extra in EXTRAS:
        parser.add_argument(f"--{extra}", action="store_true", help=f"also what requirements-{extra}.txt lists")
    chosen = vars(parser.parse_args(argv))
    return [extra for extra in EXTRAS if chosen[extra]]


def requirement_files(extras: list[str]) -> list[str]:
    """The files to install, the base first."""
    if "xformers" in extras and driver_cuda_major() is None:
        say("xformers is left out: its kernels need an NVIDIA GPU, and nvidia-smi finds none.")
        extras = [extra for extra in extras if extra != "xformers"]
    return ["requirements.txt", *(f"requirements-{extra}.txt" for extra in extras)]


def requirements_hash() -> str:
    """One hash of all requirements files, since they may include one another."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(ROOT.glob("requirements*.txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """Requirements file -> the hash it was installed at; empty in a new environment."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def ensure_pip() -> None:
    """Environments made by uv, or by a venv that was interrupted, have no pip."""
    if importlib.util.find_spec("pip") is None:
        say("Adding pip to the environment.")
        subprocess.run([sys.executable, "-m", "ensurepip", "--upgrade"], check=True)
        importlib.invalidate_caches()


def install_torch() -> None:
    """Install the build of torch that fits this machine, unless some torch is there already."""
    if version := torch_version():
        say(f"Keeping torch {version}, which is installed already.")
        return
    arguments, remark = choose_torch()
    say(f"Installing torch: {remark}.")
    # Only here does pip show its progress: the download can be gigabytes.
    pip_install(*arguments, quiet=not sys.stdout.isatty())


def torch_version() -> str | None:
    """The version of the installed torch; its metadata is read because importing it takes seconds."""
    importlib.invalidate_caches()
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def choose_torch() -> tuple[list[str], str]:
    """What to ask pip for, and a remark saying which build that is."""
    cuda_major = driver_cuda_major()
    linux = sys.platform == "linux"
    if cuda_major is None and not linux:
        return ["torch"], "the package index's build for this system"
    if cuda_major is not None and cuda_major >= 13 and linux:
        return ["torch"], "the CUDA build, about 2.6 GB with its libraries"
    labels = ["cpu"]
    if cuda_major is not None:
        labels = [label for label, needed in CUDA_BUILDS.items() if needed <= cuda_major]
    for label in labels:
        # A wheel that the user's own pip settings offer is nearer than PyTorch's index, which may be blocked.
        for index in ([], ["--extra-index-url", PYTORCH_INDEX + label, *FAIL_FAST]):
            if version := newest_build(label, index):
                return [f"torch=={version}", *index[:2]], f"{version}, the build for {describe(label)}"
    if cuda_major is None:
        return ["torch"], (
            "no CPU build can be had (PyTorch's own index is out of reach), so the package index's default comes, "
            "which may be the CUDA build of about 2.6 GB; it runs on the CPU as well"
        )
    return ["torch"], f"PyTorch's index is out of reach, so the package index's default for {sys.platform} comes"


def describe(label: str) -> str:
    """What a build label such as cpu or cu128 stands for."""
    return "machines without an NVIDIA GPU" if label == "cpu" else f"CUDA {label[2:-1]}.{label[-1]}"


def driver_cuda_major() -> int | None:
    """The CUDA major version that the NVIDIA driver offers; None without an NVIDIA GPU."""
    try:
        devices = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        if not devices.startswith("GPU "):
            return None
        table = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Newer drivers write "CUDA UMD Version"; one that writes neither is taken for the newest.
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)", table)
    return int(found[1]) if found else max(CUDA_BUILDS.values())


def newest_build(label: str, index: list[str]) -> str | None:
    """The newest torch whose version ends in this label ("2.13.0+cpu"); only such wheels are sure to be that build."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *index]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    except subprocess.TimeoutExpired:
        return None
    return next((version for version in re.findall(r"[\w.+]+", listing) if version.endswith(f"+{label}")), None)


def install_requirements(name: str) -> None:
    """Install one requirements file without moving torch."""
    say(f"Installing {name}" + (" (about 500 MB, a few minutes)." if name == "requirements.txt" else "."))
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={torch_version()}\n", encoding="utf-8")
        pip_install("-r", str(ROOT / name), "-c", str(constraints))


def pip_install(*arguments: str, quiet: bool = True) -> None:
    """Run pip in a process of its own, as pip asks to be used."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    # Twice quiet: errors only. pip warns about every oddity of the user's own settings, once a package.
    subprocess.run([*command, "-qq"] if quiet else command, check=True)


def say(line: str) -> None:
    """Print at once, so that the line comes before pip's own."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
