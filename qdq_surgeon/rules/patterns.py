"""The pattern language of placement files: text -> Pattern, and Pattern x node -> matches.

A pattern is legal Python expression syntax, read with `ast` and never evaluated::

    Op(a, b)            made by Op, with these inputs         name := Op(...)    capture the node's output
    (Op | Op)(a)        either op                             Op(..., axis=1)    an attribute's value
    name                capture any tensor                    name or None       an optional input
    *names              all (the other) inputs                ...                inputs not spoken of
    _                   any tensor; _(...) is any op          Input()            a graph input

The same name twice means the same tensor.
"""

from __future__ import annotations

import ast
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import onnx

from ..edges import Edge, count
from ..errors import PlacementError, nearest
from ..graph import Graph, Node

MAX_ORDERS = 256
"""How many orders of a commutative op's inputs are tried: a Sum of thousands is no residual."""
COMMUTATIVE = frozenset({"Add", "Mul", "Sum", "Max", "Min", "Mean", "And", "Or", "Xor", "Equal"})
MAX_DEPTH = 50
"""How deep a pattern may nest: matching takes a few Python frames for each level."""


@dataclass(frozen=True, slots=True)
class AnyTensor:
    """`_` or a lower-case name."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class Maybe:
    """`name or None`: an input that may be absent."""

    pattern: TensorPattern


@dataclass(frozen=True, slots=True)
class GraphInput:
    """`Input()`."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class OpPattern:
    """`Op(...)`. `ops` is None for any op; `rest` names the starred inputs, '' for inputs not spoken of."""

    ops: frozenset[str] | None
    inputs: tuple[TensorPattern, ...]
    rest: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Either:
    """`A(...) | B(...)`."""

    options: tuple[TensorPattern, ...]
    name: str | None = None


TensorPattern: TypeAlias = AnyTensor | Maybe | GraphInput | OpPattern | Either


@dataclass(frozen=True, slots=True)
class Bound:
    """What a captured name stands for: tensors, and the edges by which the pattern reads them."""

    tensors: tuple[str, ...]
    edges: tuple[Edge, ...] = ()


Match: TypeAlias = Mapping[str, Bound]

_TOO_LARGE = "the pattern is too large: it nests too deep or has too many alternatives; write several rules instead"


def parse(text: str) -> TensorPattern:
    """Read a pattern. Raises PlacementError, which says what to write instead."""
    try:
        pattern = _parse(ast.parse(f"({text})", mode="eval").body)
    except SyntaxError as error:
        raise PlacementError(f"the pattern {text!r} cannot be read: {error.msg}") from None
    except ValueError as error:
        raise PlacementError(f"the pattern {text!r} cannot be read: {error}") from None
    except (RecursionError, MemoryError):
        raise PlacementError(_TOO_LARGE) from None
    if _depth(pattern) > MAX_DEPTH:
        raise PlacementError(_TOO_LARGE)
    if isinstance(pattern, (AnyTensor, Maybe)):
        raise PlacementError(
            f"the pattern {text!r} names no op: write Op({text.strip()}), or Input() for a graph input"
        )
    return pattern


def captures(pattern: TensorPattern) -> set[str]:
    """The names that a pattern captures."""
    match pattern:
        case AnyTensor(name) | GraphInput(name):
            return {name} - {None} if name else set()
        case Maybe(inner):
            return captures(inner)
        case Either(options, name):
            return set().union(*map(captures, options)) | ({name} if name else set())
        case OpPattern(_, inputs, rest, _, name):
            return set().union(*map(captures, inputs)) | {n for n in (rest, name) if n}


def read_captures(pattern: TensorPattern) -> set[str]:
    """The captured names that a pattern reads by an edge: all but those that stand at its top alone."""
    match pattern:
        case Either(options):
            return set().union(*map(read_captures, options))
        case OpPattern():
            return captures(replace(pattern, name=None))
    return set()


def root_ops(pattern: TensorPattern) -> frozenset[str] | None:
    """The ops that can stand at a pattern's top; None for any. An empty set: only graph inputs."""
    if isinstance(pattern, OpPattern):
        return pattern.ops
    if isinstance(pattern, Either):
        options = [root_ops(option) for option in pattern.options]
        return None if None in options else frozenset().union(*(ops for ops in options if ops))
    return frozenset()


def match_node(pattern: TensorPattern, node: Node, graph: Graph, any_order: bool) -> Iterator[Match]:
    """All ways in which a pattern fits with `node` at its top, in the order of the inputs."""
    return _match_made(pattern, node.first_output, None, node, _Context(graph, any_order), {})


def match_input(pattern: TensorPattern, tensor: str, graph: Graph) -> Iterator[Match]:
    """All ways in which a pattern fits with the graph input `tensor` at its top."""
    return _match_made(pattern, tensor, None, None, _Context(graph, False), {})


@dataclass(frozen=True, slots=True)
class _Context:
    graph: Graph
    any_order: bool


def _match_tensor(pattern: TensorPattern, tensor: str, edge: Edge, context: _Context, match: Match) -> Iterator[Match]:
    if isinstance(pattern, Maybe):
        yield from _match_tensor(pattern.pattern, tensor, edge, context, match)
    else:
        yield from _match_made(pattern, tensor, edge, context.graph.producer(tensor), context, match)


def _match_made(
    pattern: TensorPattern, tensor: str, edge: Edge | None, node: Node | None, context: _Context, match: Match
) -> Iterator[Match]:
    if isinstance(pattern, AnyTensor):
        yield from _bind(match, pattern.name, tensor, edge)
    elif isinstance(pattern, Either):
        for option in pattern.options:
            for found in _match_made(option, tensor, edge, node, context, match):
                yield from _bind(found, pattern.name, tensor, edge)
    elif isinstance(pattern, GraphInput):
        if tensor in context.graph.inputs:
            yield from _bind(match, pattern.name, tensor, edge)
    elif isinstance(pattern, OpPattern) and node is not None and _fits(pattern, node):
        for found in _match_inputs(pattern, node, context, match):
            yield from _bind(found, pattern.name, tensor, edge)


def _fits(pattern: OpPattern, node: Node) -> bool:
    if pattern.ops is not None and node.op not in pattern.ops:
        return False
    return all(_equal(node.attribute(name), value) for name, value in pattern.attributes.items())


def _equal(stored: Any, wanted: Any) -> bool:
    """Equality of attributes; ONNX stores floats as float32."""
    if isinstance(stored, list) and isinstance(wanted, list):
        return len(stored) == len(wanted) and all(map(_equal, stored, wanted))
    if isinstance(stored, float) and isinstance(wanted, (int, float)):
        return bool(np.float32(stored) == np.float32(wanted))
    return bool(stored == wanted)


def _match_inputs(pattern: OpPattern, node: Node, context: _Context, match: Match) -> Iterator[Match]:
    slots = range(len(node.inputs))
    wanted = len(pattern.inputs)
    if pattern.rest is None and any(node.inputs[wanted:]):
        return
    orders: Iterator[tuple[int, ...]] = iter([tuple(range(wanted))])
    if context.any_order and node.op in COMMUTATIVE:
        orders = itertools.islice(itertools.permutations(slots, wanted), MAX_ORDERS)
    for order in orders:
        rest = tuple(slot for slot in slots if slot not in order and node.inputs[slot])
        yield from _match_slots(pattern, node, order, rest, context, match)


def _match_slots(
    pattern: OpPattern, node: Node, order: tuple[int, ...], rest: tuple[int, ...], context: _Context, match: Match
) -> Iterator[Match]:
    matches = iter([match])
    for inner, slot in zip(pattern.inputs, order, strict=True):
        matches = _each(matches, inner, node, slot, context)
    for found in matches:
        if not pattern.rest:
            yield found
        elif pattern.rest not in found:
            edges = tuple(node.edges[slot] for slot in rest)
            yield {**found, pattern.rest: Bound(tuple(node.inputs[slot] for slot in rest), edges)}


def _each(
    matches: Iterator[Match], pattern: TensorPattern, node: Node, slot: int, context: _Context
) -> Iterator[Match]:
    absent = slot >= len(node.inputs) or not node.inputs[slot]
    for match in matches:
        if not absent:
            yield from _match_tensor(pattern, node.inputs[slot], node.edges[slot], context, match)
        elif isinstance(pattern, Maybe):
            yield match


def _bind(match: Match, name: str | None, tensor: str, edge: Edge | None) -> Iterator[Match]:
    edges = (edge,) if edge else ()
    known = match.get(name) if name else None
    if not name:
        yield match
    elif known is None:
        yield {**match, name: Bound((tensor,), edges)}
    elif known.tensors == (tensor,):
        yield {**match, name: Bound((tensor,), (*known.edges, *edges))}


def _parse(tree: ast.expr) -> TensorPattern:
    match tree:
        case ast.NamedExpr(ast.Name(name), value):
            return _named(_capture_name(name), _parse(value))
        case ast.Call():
            return _parse_call(tree)
        case ast.Name("_"):
            return AnyTensor()
        case ast.Name(name) if name[0].islower():
            return AnyTensor(_capture_name(name))
        case ast.Name(name):
            raise PlacementError(
                f"{name} stands without brackets: write {name}(...) for a tensor made by {name}, "
                "or a lower-case name for any tensor"
            )
        case ast.BoolOp(ast.Or(), [inner, ast.Constant(None)]):
            return Maybe(_parse(inner))
        case ast.BinOp(_, ast.BitOr(), _):
            return Either(tuple(_parse(option) for option in _alternatives(tree)))
    raise PlacementError(
        f"{ast.unparse(tree)!r} has no meaning in a pattern: write Op(...), a name, `name or None` or _"
    )


def _parse_call(call: ast.Call) -> TensorPattern:
    if isinstance(call.func, ast.Name) and call.func.id == "Input":
        if call.args or call.keywords:
            raise PlacementError("Input() takes nothing in its brackets: write name := Input() to capture it")
        return GraphInput()
    inputs: list[TensorPattern] = []
    rest: str | None = None
    for index, argument in enumerate(call.args):
        last = index == len(call.args) - 1
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
            rest = "" if argument.value.id == "_" else _capture_name(argument.value.id)
        elif isinstance(argument, ast.Constant) and argument.value is Ellipsis:
            rest = ""
        else:
            inputs.append(_parse(argument))
        if rest is not None and not last:
            raise PlacementError(f"in {ast.unparse(call)!r}, {ast.unparse(argument)} must be the last input")
    pattern = OpPattern(_ops(call.func), tuple(inputs), rest, _attributes(call))
    _check_inputs(pattern, call)
    _check_attributes(pattern, call)
    return pattern


def _attributes(call: ast.Call) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            value = None
        if keyword.arg is None or not _is_plain(value):
            raise PlacementError(f"in {ast.unparse(call)!r}, an attribute is written name=value, with a plain value")
        attributes[keyword.arg] = list(value) if isinstance(value, tuple) else value
    return attributes


def _is_plain(value: Any) -> bool:
    """True for what an ONNX attribute can hold and a pattern can say: a number, a string, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, (float, str))


def _check_inputs(pattern: OpPattern, call: ast.Call) -> None:
    """Refuse inputs that an op can never have. In a group, an optional one need only exist in one of the ops."""
    limits = {op: _max_inputs(op) for op in pattern.ops or ()}
    needed = max((n for n, inner in enumerate(pattern.inputs, 1) if not isinstance(inner, Maybe)), default=0)
    for op, limit in sorted(limits.items()):
        if needed > limit or len(pattern.inputs) > max(limits.values()):
            raise PlacementError(
                f"in {ast.unparse(call)!r}, {op} takes {count(limit, 'input')} at most: "
                f"take out {len(pattern.inputs) - limit}{_or_apart(pattern)}"
            )


def _check_attributes(pattern: OpPattern, call: ast.Call) -> None:
    for op in sorted((pattern.ops or frozenset()) & _onnx_ops().keys()):
        for name in sorted(pattern.attributes.keys() - _onnx_ops()[op]):
            raise PlacementError(
                f"in {ast.unparse(call)!r}, {op} has no attribute {name!r}.{nearest(name, _onnx_ops()[op])} "
                f"It has {', '.join(sorted(onnx.defs.get_schema(op).attributes)) or 'none'}: "
                f"take {name} out{_or_apart(pattern)}"
            )


def _or_apart(pattern: OpPattern) -> str:
    ops = sorted(op.replace("::", ".") for op in pattern.ops or ())
    return f", or write the ops apart: {' | '.join(f'{op}(...)' for op in ops)}" if len(ops) > 1 else ""


def _max_inputs(op: str) -> int:
    return int(onnx.defs.get_schema(op).max_input) if op in _onnx_ops() else sys.maxsize


def _ops(function: ast.expr) -> frozenset[str] | None:
    names = [_op(option) for option in _alternatives(function)]
    return None if None in names else frozenset(name for name in names if name)


def _op(function: ast.expr) -> str | None:
    match function:
        case ast.Name("_"):
            return None
        case ast.Name(name):
            return _known_op(name)
        case ast.Attribute(ast.Attribute(ast.Name("ai"), "onnx"), name):
            return _known_op(name)
        case ast.Attribute(domain, name) if _is_dotted_name(domain):
            return f"{ast.unparse(domain)}::{name}"
    raise PlacementError(f"{ast.unparse(function)!r} is no op: write Op(...) or (Op | Op)(...)")


def _is_dotted_name(tree: ast.expr) -> bool:
    while isinstance(tree, ast.Attribute):
        tree = tree.value
    return isinstance(tree, ast.Name)


def _known_op(name: str) -> str:
    if name not in _onnx_ops():
        raise PlacementError(
            f"ONNX has no op {name!r}.{nearest(name, _onnx_ops())} An op of another domain is domain.{name}(...)"
        )
    return name


@functools.cache
def _onnx_ops() -> dict[str, frozenset[str]]:
    """ONNX's own ops, each with the attributes that it has or had in any opset."""
    ops: dict[str, frozenset[str]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            ops[schema.name] = ops.get(schema.name, frozenset()).union(schema.attributes)
    return ops


def _alternatives(tree: ast.expr) -> Iterator[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        yield from _alternatives(tree.left)
        yield from _alternatives(tree.right)
    else:
        yield tree


def _depth(pattern: TensorPattern) -> int:
    match pattern:
        case Maybe(inner):
            return 1 + _depth(inner)
        case Either(options) | OpPattern(_, options):
            return 1 + max(map(_depth, options), default=0)
    return 0


def _named(name: str, pattern: TensorPattern) -> TensorPattern:
    if isinstance(pattern, Maybe):
        raise PlacementError(f"write ({name} or None), not {name} := (... or None)")
    if pattern.name:
        raise PlacementError(f"{name} and {pattern.name} name the same tensor: keep one of them")
    return replace(pattern, name=name)


def _capture_name(name: str) -> str:
    if not name[0].islower() or name == "out":
        raise PlacementError(f"{name!r} cannot name a capture: use a lower-case name other than 'out'")
    return name
