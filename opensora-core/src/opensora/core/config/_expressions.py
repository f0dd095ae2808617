"""Computes the value of an expression from its syntax tree: literals, names, arithmetic, comprehensions, a few calls.

Safe by construction: what isn't listed here does not exist, so there is no attribute, module, file or method to reach.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NoReturn

from opensora.core.config._limits import Budget, TooMuchError, check_int_power, check_int_product, check_int_shift
from opensora.core.config._origins import Origins
from opensora.core.errors import ConfigError, did_you_mean

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (dict, list, tuple, range, int, float, str, len, min, max, round)
}
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_PLAIN = (int, float, str, list, tuple, dict, range, type(None))
_HUGE_WIDTH = re.compile(r"\d{4,}")


class Expressions:
    """Evaluates the expressions of one file."""

    def __init__(self, file: str, names: MutableMapping[str, Any]) -> None:
        self.origins = Origins()
        self._file = file
        self._names = names
        self._budget = Budget()

    def value(self, node: ast.expr) -> Any:
        """The expression's value.

        Raises:
            ConfigError: It does what a config may not, or fails.
        """
        try:
            self._budget.spend(1)
            result = self._compute(node)
            if not isinstance(result, _PLAIN):
                self.refuse(node, f"a value of type {type(result).__name__}")
            return result
        except ConfigError:
            raise
        except TooMuchError as error:
            raise self.error(node, f"{source_text(node)} {error}. Write it out, or add --trust-config.") from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self.error(node, f"{source_text(node)} fails: {type(error).__name__}: {error}") from error

    def bind(self, target: ast.expr, value: Any, names: MutableMapping[str, Any]) -> None:
        """Assign ``value`` to a name, or to several as in ``height, width = 256, 256``."""
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                if not isinstance(value, list | tuple | str | range) or len(value) != len(targets):
                    raise self.error(target, f"can't take {source_text(target)} from {value!r:.80}")
                for part, item in zip(targets, value, strict=True):
                    self.bind(part, item, names)
            case _:
                self.refuse(target, f"assigning to {source_text(target)}")

    def error(self, node: ast.AST, message: str) -> ConfigError:
        """An error at the node's line."""
        return ConfigError(message, location=self._location(node))

    def refuse(self, node: ast.AST, what: str, hint: str = "") -> NoReturn:
        """Raise the error that says what a config may not do, and how to do it anyway."""
        raise self.error(
            node,
            f"{what} is not allowed in a config, which is read and not run.{hint} If you trust the file, "
            "--trust-config executes it as Python.",
        )

    def _location(self, node: ast.AST) -> str:
        return f"{self._file}:{getattr(node, 'lineno', 1)}"

    def _compute(self, node: ast.expr) -> Any:  # noqa: C901, PLR0912  # one case for each kind of expression
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.List() | ast.Tuple():
                return self._sequence(node)
            case ast.Dict():
                return self._dict(node)
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
                return self._call(node, name)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, type(op), self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self.value(operand))
            case ast.BoolOp(op=op, values=values):
                return self._boolean(isinstance(op, ast.And), values)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.Subscript(value=container, slice=index):
                return self._subscript(self.value(container), index)
            case ast.JoinedStr(values=parts):
                return self._made("".join(self._format(part) for part in parts))
            case ast.ListComp(elt=element, generators=generators):
                return self._made([self.value(element) for _ in self._loop(generators)])
            case ast.DictComp(key=key, value=value, generators=generators):
                return self._made({self.value(key): self.value(value) for _ in self._loop(generators)})
            case _:
                return self._refuse_expression(node)

    def _refuse_expression(self, node: ast.expr) -> NoReturn:
        match node:
            case ast.Call(func=function):
                hint = did_you_mean(function.id, FUNCTIONS) if isinstance(function, ast.Name) else ""
                self.refuse(node, f"calling {source_text(function)}()", hint)
            case ast.Attribute(attr=name):
                self.refuse(node, f"the attribute .{name}")
            case ast.Set() | ast.SetComp():
                raise self.error(node, f"{source_text(node)} is a set. Write a list, [...], or a tuple, (...).")
            case _:
                self.refuse(node, f"{source_text(node)}")

    def _name(self, node: ast.expr, name: str) -> Any:
        try:
            return self._names[name]
        except KeyError:
            pass
        if name in FUNCTIONS:
            self.refuse(node, f"the function {name} as a value")
        raise self.error(node, f"the name {name} is not defined.{did_you_mean(name, self._names)}")

    def _made(self, value: Any) -> Any:
        self._budget.spend(self._budget.weigh(value))
        return value

    def _sequence(self, node: ast.List | ast.Tuple) -> Any:
        items: list[Any] = []
        lines: dict[object, str] = {}
        for element in node.elts:
            if isinstance(element, ast.Starred):
                spread = self._iterable(element.value)
                known = self.origins.of(spread)
                lines |= {len(items) + index: known.get(index, self._location(element)) for index in range(len(spread))}
                items += spread
            else:
                lines[len(items)] = self._location(element)
                items.append(self.value(element))
        result = self._made(items if isinstance(node, ast.List) else tuple(items))
        self.origins.record(result, lines)
        return result

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        lines: dict[object, str] = {}
        written: set[object] = set()
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            if key_node is None:  # {**other}
                self._spread(value_node, items, lines)
                continue
            key = self.value(key_node)
            self._budget.spend(self._budget.weigh(key))
            if key in written:
                raise self.error(key_node, f"the key {key!r} is given twice")
            written.add(key)
            items[key], lines[key] = self.value(value_node), self._location(key_node)
        self.origins.record(items, lines)
        return self._made(items)  # type: ignore[no-any-return]

    def _spread(self, node: ast.expr, items: dict[Any, Any], lines: dict[object, str]) -> None:
        spread = self.value(node)
        if not isinstance(spread, dict):
            raise self.error(node, f"** needs a dict; {source_text(node)} is {spread!r:.80}")
        known = self.origins.of(spread)
        items.update(spread)
        lines |= {key: known.get(key, self._location(node)) for key in spread}

    def _call(self, node: ast.Call, name: str) -> Any:
        positional: list[Any] = []
        for argument in node.args:
            match argument:
                case ast.Starred(value=spread):
                    positional += self._iterable(spread)
                case ast.GeneratorExp(elt=element, generators=generators):
                    positional.append(self._made([self.value(element) for _ in self._loop(generators)]))
                case _:
                    positional.append(self.value(argument))
        keywords, lines = self._keywords(node)
        self._budget.spend(sum(map(self._budget.weigh, (*positional, *keywords.values()))))
        if name == "round" and len(positional) > 1 and isinstance(positional[1], int) and abs(positional[1]) > 300:
            raise TooMuchError("rounds to more digits than a config may")
        result = self._made(FUNCTIONS[name](*positional, **keywords))
        if name == "dict":
            start = self.origins.of(positional[0]) if positional and isinstance(positional[0], dict) else {}
            self.origins.record(result, {**start, **lines})
        elif name in ("list", "tuple") and positional and isinstance(positional[0], list | tuple):
            self.origins.record(result, self.origins.of(positional[0]))
        return result

    def _keywords(self, node: ast.Call) -> tuple[dict[str, Any], dict[object, str]]:
        items: dict[str, Any] = {}
        lines: dict[object, str] = {}
        for keyword in node.keywords:
            name = keyword.arg
            if name is None:
                spread: dict[Any, Any] = {}
                spread_lines: dict[object, str] = {}
                self._spread(keyword.value, spread, spread_lines)
            else:
                spread = {name: self.value(keyword.value)}
                spread_lines = {name: self._location(keyword)}
            for key in spread:
                if not isinstance(key, str):
                    raise self.error(keyword, f"** needs names as keys, not {key!r}")
                if key in items:
                    raise self.error(keyword, f"the key {key!r} is given twice")
            items |= spread
            lines |= spread_lines
        return items, lines

    def _binary(self, node: ast.expr, op: type[ast.operator], left: Any, right: Any) -> Any:
        if op not in _BINARY or (op is ast.Mod and isinstance(left, str)):
            self.refuse(node, source_text(node))
        if op is ast.Pow:
            check_int_power(left, right)
        elif op is ast.LShift:
            check_int_shift(left, right)
        elif op is ast.Mult:
            check_int_product(left, right)
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    self._budget.spend(self._budget.weigh(sequence) * max(times, 0))
        self._budget.spend(self._budget.weigh(left) + self._budget.weigh(right))
        return self._made(_BINARY[op](left, right))

    def _boolean(self, all_of: bool, nodes: list[ast.expr]) -> Any:
        result: Any = None
        for node in nodes:
            result = self.value(node)
            if bool(result) is not all_of:
                break
        return result

    def _compare(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node)
            self._budget.spend(self._budget.weigh(left) + self._budget.weigh(right))
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def _subscript(self, container: Any, index: ast.expr) -> Any:
        if isinstance(index, ast.Slice):
            ends = [None if end is None else self.value(end) for end in (index.lower, index.upper, index.step)]
            return self._made(container[slice(*ends)])
        key = self.value(index)
        self._budget.spend(self._budget.weigh(key))
        if isinstance(container, dict) and key not in container:
            raise LookupError(f"no such key.{did_you_mean(str(key), map(str, container))}")
        return container[key]

    def _format(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return str(self.value(node))
        value = self.value(node.value)
        spec = str(self.value(node.format_spec)) if node.format_spec else ""
        self._budget.spend(self._budget.weigh(value))
        if _HUGE_WIDTH.search(spec):
            raise TooMuchError("makes a wider text than a config may")
        match chr(max(node.conversion, 0)):  # {value!r}
            case "r":
                value = repr(value)
            case "s":
                value = str(value)
            case "a":
                value = ascii(value)
        return format(value, spec)

    def _iterable(self, node: ast.expr) -> list[Any] | tuple[Any, ...] | dict[Any, Any] | range | str:
        value = self.value(node)
        if not isinstance(value, list | tuple | dict | range | str):
            raise self.error(node, f"{source_text(node)} is {value!r:.80}, which holds no items")
        self._budget.spend(self._budget.weigh(value))
        return value

    def _loop(self, generators: list[ast.comprehension]) -> Iterator[None]:
        """Run through the loops of a comprehension, whose names end with it."""
        outer = self._names
        self._names = ChainMap({}, outer)
        try:
            yield from self._nested(generators)
        finally:
            self._names = outer

    def _nested(self, generators: list[ast.comprehension]) -> Iterator[None]:
        if not generators:
            yield
            return
        first, *others = generators
        if first.is_async:
            self.refuse(first.target, "async")
        for item in self._iterable(first.iter):
            self._budget.spend(1)
            self.bind(first.target, item, self._names)
            if all(self.value(test) for test in first.ifs):
                yield from self._nested(others)


def source_text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
