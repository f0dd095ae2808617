"""Read a config: a Python file of assignments, which is evaluated and not executed.

    _base_ = ["../base.py"]                      # start from these; dicts merge, dict(_delete_=True, ...) replaces
    image_size = (32, 32)
    model = dict(type="STDiT3-XL/2", depth=12)

What may stand in it is what configs need: literals, names, arithmetic, comparisons, comprehensions, f-strings; calls of
``dict``, ``list``, ``tuple``, ``range``, ``int``, ``float``, ``str``, ``len``, ``min``, ``max`` and ``round``. So a
config from a stranger can't run code, and one that computes without end is stopped.
"""

from __future__ import annotations

import ast
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from attrs import field, frozen

from opensora.core.config._expressions import Expressions, source_text
from opensora.core.config._limits import MAX_FILE_BYTES
from opensora.core.config._merge import merge, own_copy
from opensora.core.config._origins import KeyPath, shown_path, written_paths
from opensora.core.config.names import resolve
from opensora.core.errors import ConfigError

__all__ = ["Config", "evaluate", "evaluate_literal"]

_BASE = "_base_"


@frozen
class Config:
    """What a config file says, and where it says so."""

    values: dict[str, Any]
    """Key to value; dicts, lists and tuples belong to this config alone."""
    locations: dict[KeyPath, str] = field(factory=dict)
    """Key path, such as ``("model", "depth")``, to ``file:line`` or the flag that set it."""
    path: Path | None = None
    """The file, if there is one."""

    def part(self, values: dict[str, Any], locations: Mapping[KeyPath, str]) -> Config:
        """A config of its own, made of a piece of this one."""
        return Config(values, dict(locations), self.path)


def evaluate(path: Path | str, *, trust: bool = False) -> Config:
    """Read a config file.

    Args:
        trust: Execute it as Python instead, with all that Python can do.

    Raises:
        ConfigError: It can't be read, or holds what a config may not; with file and line.
    """
    return _evaluate(Path(path), trust=trust, inside=())


def evaluate_literal(text: str) -> Any:
    """What ``text`` writes down as a number, string, list, tuple, dict or ``dict(...)``; else ``text`` itself.

    For values on the command line, where ``240p``, ``16:9`` and ``3-4`` are meant as they stand.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Python has opinions on texts such as "1or 2"
            node = ast.parse(text.strip(), mode="eval").body
        if _is_literal(node):
            return own_copy(Expressions("", {}).value(node))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return text


def _is_literal(node: ast.expr) -> bool:
    match node:
        case ast.Constant() | ast.List() | ast.Tuple() | ast.Dict():
            return True
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant()):
            return True
        case ast.Call(func=ast.Name(id="dict" | "list" | "tuple")):
            return True
        case _:
            return False


def _evaluate(path: Path, *, trust: bool, inside: tuple[Path, ...]) -> Config:
    file = shown_path(path)
    tree = _parse(path, file)
    inside = (*inside, path.resolve())
    try:
        base = _evaluate_bases(tree, path, file, trust=trust, inside=inside)
        own = _execute(tree, path, file, base) if trust else _interpret(tree, file, base)
        locations: dict[KeyPath, str] = {}
        values = merge(base.values, own.values, (), base.locations, own.locations, locations)
    except RecursionError:
        raise ConfigError("the values are nested too deeply", location=file) from None
    return Config(values, {(): file, **locations}, path)


def _parse(path: Path, file: str) -> ast.Module:
    if path.is_dir():
        inner = path / "config.py"
        raise ConfigError(f"{file} is a folder.{f' Did you mean {shown_path(inner)}?' if inner.is_file() else ''}")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} has more than {MAX_FILE_BYTES:,} bytes. Is it a config?")
        return ast.parse(path.read_bytes(), filename=file)
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {file}.") from None
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}.") from error
    except SyntaxError as error:
        raise ConfigError(f"not valid Python: {error.msg}", location=f"{file}:{error.lineno or 1}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or nested beyond what the parser takes
        raise ConfigError(f"not valid Python: {error}", location=file) from error


def _evaluate_bases(tree: ast.Module, path: Path, file: str, *, trust: bool, inside: tuple[Path, ...]) -> Config:
    """All files of ``_base_`` as one config."""
    values: dict[str, Any] = {}
    locations: dict[KeyPath, str] = {}
    for statement in tree.body:
        if not (isinstance(statement, ast.Assign) and any(_is_base(target) for target in statement.targets)):
            continue
        where = f"{file}:{statement.lineno}"
        for base_path in _base_paths(Expressions(file, {}).value(statement.value), path, where):
            if base_path.resolve() in inside:
                raise ConfigError(f"_base_ leads back to {shown_path(base_path)}", location=where)
            base = _evaluate(base_path, trust=trust, inside=inside)
            for key, value in base.values.items():
                if key in values and values[key] != value:
                    here, there = locations[(key,)], base.locations[(key,)]
                    raise ConfigError(f'two files of _base_ set "{key}": {here} and {there}', location=where)
            values |= base.values
            locations |= base.locations
    return Config(values, locations)


def _is_base(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == _BASE


def _base_paths(bases: object, path: Path, where: str) -> Iterator[Path]:
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"_base_ must be a list of config files, not {bases!r:.80}", location=where)
    for name in names:
        beside = path.parent / name
        if not beside.is_file():
            try:
                beside = resolve(name)
            except ConfigError as error:
                raise ConfigError(f"_base_: there is no file {shown_path(beside)}. {error}", location=where) from None
        yield beside


def _interpret(tree: ast.Module, file: str, base: Config) -> Config:
    """The assignments of a file, evaluated one after the other."""
    names: dict[str, Any] = dict(base.values)
    lines: dict[str, str] = {}
    expressions = Expressions(file, names)
    for statement in tree.body:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                continue
            case ast.Assign(targets=targets, value=value_node):
                value = expressions.value(value_node)
            case ast.AnnAssign(target=annotated, value=ast.expr() as value_node):
                targets, value = [annotated], expressions.value(value_node)
            case _:
                expressions.refuse(statement, source_text(statement))
        for target in targets:
            expressions.bind(target, value, names)
            lines |= dict.fromkeys(_bound_names(target), f"{file}:{statement.lineno}")
    keys = [name for name in lines if not name.startswith("_")]
    locations = dict(pair for key in keys for pair in expressions.origins.paths(names[key], (key,), lines[key]))
    return Config({key: own_copy(names[key]) for key in keys}, locations)


def _execute(tree: ast.Module, path: Path, file: str, base: Config) -> Config:
    """What a trusted file leaves in its namespace when Python runs it."""
    before = {key: own_copy(value) for key, value in base.values.items()}
    namespace: dict[str, Any] = {"__name__": "__config__", "__file__": str(path), **before}
    try:
        exec(compile(tree, str(path), "exec"), namespace)  # the user asked for it, by --trust-config
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{file}:{lines[-1]}" if lines else file
        raise ConfigError(f"raised {type(error).__name__}: {error}", location=where) from error
    values = {
        key: own_copy(value)
        for key, value in namespace.items()
        if not (key.startswith("_") or isinstance(value, ModuleType) or callable(value))
        and not (key in before and value is before[key])
    }
    written = dict(
        pair
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in values
        for pair in written_paths(statement.value, (target.id,), file)
    )
    return Config(values, {**{(key,): file for key in values}, **written})


def _bound_names(target: ast.expr) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
