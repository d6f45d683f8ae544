"""What a function or class of an installed package takes, read from its source: nothing of it is imported."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

Module = tuple[str, ...]  # the parts of its dotted name


def parameters_of(path: str) -> dict[str, bool] | None:
    """What a function, or the making of a class, takes, without `self`: name -> whether it has to be given.

    None where the source cannot tell.
    """
    *module, name = path.split(".")
    found = _definition(tuple(module), name)
    if found and isinstance(found[1], ast.ClassDef):
        found = _maker(*found)
    if not found or found[1].args.kwarg or any(not _is_override(node) for node in found[1].decorator_list):
        return None
    arguments = found[1].args
    first_default = len(arguments.args) - len(arguments.defaults)
    needed = {argument.arg: place < first_default for place, argument in enumerate(arguments.args)}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        needed[argument.arg] = default is None
    if found[1].name == "__init__":
        del needed[arguments.args[0].arg]
    return needed


def classes_of(module: str) -> list[str]:
    """Names of the classes that a module defines or imports by name, by their capital letters."""
    body = _source(tuple(module.split("."))).body
    names = [node.name for node in body if isinstance(node, ast.ClassDef)]
    names += [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [name for name in names if name[:1].isupper()]


def _definition(module: Module, name: str) -> tuple[Module, ast.ClassDef | ast.FunctionDef] | None:
    """A class or function and the module it stands in, wherever the given module has it from."""
    for node in _source(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (origin := _imported_from(module, node)) != module:
                    return _definition(origin, alias.name)
    return None


def _maker(module: Module, node: ast.ClassDef) -> tuple[Module, ast.FunctionDef] | None:
    """The `__init__` of a class, its own or that of its first base."""
    if node.decorator_list or node.keywords:
        return None
    own = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if own:
        return module, own[-1]
    base = node.bases[0] if node.bases else None
    found = _definition(module, base.id) if isinstance(base, ast.Name) else None
    return _maker(*found) if found and isinstance(found[1], ast.ClassDef) else None


def _is_override(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == "override"


def _imported_from(module: Module, node: ast.ImportFrom) -> Module:
    named = tuple(node.module.split(".")) if node.module else ()
    if not node.level:
        return named
    up = node.level - (_file_of(module).name == "__init__.py")
    return module[: len(module) - up] + named


@cache
def _source(module: Module) -> ast.Module:
    """The syntax of a module, empty where there is no source of it."""
    try:
        return ast.parse(_file_of(module).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ast.Module([], [])


@cache
def _file_of(module: Module) -> Path:
    """Where the source of a module is; the packages it is in are not imported, as `find_spec` would for inner ones."""
    spec = importlib.util.find_spec(module[0]) if module else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        return Path(spec.origin or "") if spec and len(module) == 1 else Path()
    inside = Path(folders[0]).joinpath(*module[1:])
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")
