"""Placement files (TOML) -> rules.

A file is a list of `[[rule]]` tables; an entry with `include` alone places another file's rules there. The first
rule that speaks of an edge decides it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..errors import PlacementError, nearest
from . import patterns
from .predicates import LATE, PAIR_PREDICATES, PREDICATES, PairPredicate, Predicate

DEFAULT = "tensorrt"

RULE_KEYS = frozenset(
    {"name", "match", "any_order", "where", "quantize", "keep_float", "share", "axis", "range", "because"}
)
VERBS = ("quantize", "keep_float", "share")
MAX_DEPTH = 16
"""How deep tables and arrays may nest; no rule needs more than four."""
_OUT = re.compile(r"out\((\w+)\)")


@dataclass(frozen=True, slots=True)
class Selector:
    """The edges a verb speaks of: those by which the pattern reads `name`, or all that read its node's output."""

    name: str
    outputs: bool = False


@dataclass(frozen=True, slots=True)
class Condition:
    """A predicate on one captured name, or on two under `pair`."""

    predicate: str
    names: tuple[str, ...]
    negated: bool
    holds: Callable[..., bool] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """One shape, its conditions, what it does, and because of what."""

    name: str
    pattern: patterns.TensorPattern
    because: str
    any_order: bool = False
    where: tuple[Condition, ...] = ()
    quantize: tuple[Selector, ...] = ()
    keep_float: tuple[Selector, ...] = ()
    share: tuple[Selector, ...] = ()
    share_within: float | None = None
    axis: Mapping[str, int] = field(default_factory=dict, hash=False)
    range: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    @property
    def late(self) -> bool:
        """True where a condition reads the decisions of other readers, so that the rule must wait for them."""
        return any(condition.predicate in LATE for condition in self.where)


@dataclass(frozen=True)
class Placement:
    """The rules in force, in order. `digest` is a SHA-256 over the text of all files."""

    name: str
    rules: tuple[Rule, ...]
    digest: str


def presets() -> tuple[str, ...]:
    """The names of the shipped placement files, cases last."""
    root = _shipped()
    cases = [f"cases/{entry.name}" for entry in (root / "cases").iterdir()]
    names = [entry.name for entry in root.iterdir()] + cases
    found = [name.removesuffix(".toml") for name in names if name.endswith(".toml")]
    return tuple(sorted(found, key=lambda name: ("/" in name, name)))


def load_placement(
    spec: str | Path = DEFAULT, predicates: Mapping[str, Predicate | PairPredicate] | None = None
) -> Placement:
    """Read placement rules: a preset's name, a file, or several of them in order, separated by commas.

    `predicates` adds the caller's own conditions by name. Raises PlacementError, which names file, rule and what
    to write instead.
    """
    names = [spec] if isinstance(spec, Path) else [part.strip() for part in str(spec).split(",")]
    reader = _Reader(predicates or {})
    rules = [rule for name in names for rule in reader.read(str(name), None)]
    if not rules:
        raise PlacementError(f"the placement {spec} has no rules")
    return Placement(str(spec), tuple(_unique(rules)), reader.digest.hexdigest())


class _Reader:
    def __init__(self, extra: Mapping[str, Predicate | PairPredicate]) -> None:
        pairs = {name for name, function in extra.items() if _takes_pair(name, function)}
        self.single = {**PREDICATES, **{name: f for name, f in extra.items() if name not in pairs}}
        self.pair = {**PAIR_PREDICATES, **{name: extra[name] for name in pairs}}
        self.digest = hashlib.sha256()
        self._open: list[str] = []

    def read(self, name: str, beside: Path | None) -> Iterator[Rule]:
        try:
            label, text, folder = _find(name, beside)
        except PlacementError as error:
            raise PlacementError(f"{self._open[-1]}: {error}" if self._open else str(error)) from None
        if label in self._open:
            raise PlacementError(f"{label} includes itself ({' -> '.join([*self._open, label])})")
        content = _toml(text, label)
        self.digest.update(text.encode())
        self._open.append(label)
        yield from self._rules(content, label, folder)
        self._open.pop()

    def _rules(self, content: dict[str, Any], label: str, folder: Path | None) -> Iterator[Rule]:
        unknown = set(content) - {"rule", "include"}
        if unknown:
            key = sorted(unknown)[0]
            raise PlacementError(f"{label}: unknown key {key!r}; a placement file holds [[rule]] tables")
        entries = content.get("rule", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise PlacementError(f"{label}: rules are written as [[rule]] tables")
        for entry in [{"include": name} for name in _strings(content.get("include", []), label)] + entries:
            if set(entry) == {"include"}:
                for name in _strings(entry["include"], label):
                    yield from self.read(name, folder)
            else:
                yield self._rule(entry, label)

    def _rule(self, entry: dict[str, Any], label: str) -> Rule:
        where = f"{label}, rule {entry.get('name', '(without a name)')!r}"
        if "include" in entry:
            raise PlacementError(f"{where}: include stands alone in its [[rule]] entry: move the other keys to another")
        for key in entry:
            if key not in RULE_KEYS:
                raise PlacementError(f"{where}: unknown key {key!r}.{nearest(key, RULE_KEYS)}")
        for key in ("name", "match", "because"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise PlacementError(f'{where}: {key} is missing: write {key} = "..."')
        if not any(verb in entry for verb in VERBS):
            raise PlacementError(f"{where}: it does nothing: give it quantize, keep_float or share")
        if not isinstance(entry.get("any_order", False), bool):
            raise PlacementError(f"{where}: any_order is true or false")
        try:
            pattern = patterns.parse(entry["match"])
        except PlacementError as error:
            raise PlacementError(f"{where}: {error}") from None
        names, read = patterns.captures(pattern), patterns.read_captures(pattern)
        share, within = _share(entry.get("share"), where)
        return Rule(
            name=entry["name"],
            pattern=pattern,
            because=" ".join(entry["because"].split()),
            any_order=entry.get("any_order", False),
            where=tuple(self._conditions(entry.get("where", {}), names, where)),
            quantize=_readings(entry.get("quantize"), names, read, f"{where}: quantize"),
            keep_float=_readings(entry.get("keep_float"), names, read, f"{where}: keep_float"),
            share=_selectors(share, names, f"{where}: share"),
            share_within=within,
            axis=_axes(entry.get("axis", {}), names, where),
            range=_ranges(entry.get("range", {}), names, where),
        )

    def _conditions(self, table: Any, names: set[str], where: str) -> Iterator[Condition]:
        if not isinstance(table, dict):
            raise PlacementError(f'{where}: where is a table: where = {{ name = "predicate" }}')
        for capture, wanted in table.items():
            for text in _strings(wanted, f"{where}: where"):
                if capture == "pair":
                    yield self._pair(text, names, where)
                    continue
                _known(capture, names, f"{where}: where")
                negated, name = _negation(text)
                if name not in self.single and name in self.pair:
                    raise PlacementError(f'{where}: {name} compares two names: write pair = "{capture} {name} other"')
                if name not in self.single:
                    raise PlacementError(f"{where}: unknown predicate {name!r}.{nearest(name, self.single)}")
                yield Condition(name, (capture,), negated, self.single[name])

    def _pair(self, text: str, names: set[str], where: str) -> Condition:
        negated, rest = _negation(text)
        words = rest.split()
        if len(words) != 3:
            raise PlacementError(f"{where}: a pair condition reads 'a predicate b', not {text!r}")
        left, name, right = words
        if name not in self.pair and name in self.single:
            raise PlacementError(f'{where}: {name} is about one name: write {left} = "{name}" outside pair')
        if name not in self.pair:
            raise PlacementError(f"{where}: unknown pair predicate {name!r}.{nearest(name, self.pair)}")
        for capture in (left, right):
            _known(capture, names, f"{where}: pair")
        return Condition(name, (left, right), negated, self.pair[name])


def _shipped() -> Traversable:
    return importlib.resources.files("qdq_surgeon.patterns")


def _find(name: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """A placement file's label, text and folder: a path (relative to the including file first), or a preset."""
    looks_like_file = name.endswith(".toml")
    for path in ([beside / name] if beside else []) + [Path(name)]:
        if looks_like_file and path.is_file():
            try:
                return os.path.normpath(path), path.read_text(encoding="utf-8"), path.parent
            except (OSError, UnicodeDecodeError) as error:
                raise PlacementError(f"{path} cannot be read: {error}") from None
    if looks_like_file:
        raise PlacementError(f"{name}: no such placement file")
    if name not in presets():
        raise PlacementError(
            f"unknown placement {name!r}.{nearest(name, presets())} Presets: {', '.join(presets())}; "
            "a file of your own ends in .toml"
        )
    return name, (_shipped() / f"{name}.toml").read_text(encoding="utf-8"), None


def _toml(text: str, label: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(text)
    except ValueError as error:
        raise PlacementError(f"{label} is not valid TOML: {error}") from None
    except RecursionError:
        raise PlacementError(f"{label} nests too deep: write rules as [[rule]] tables") from None
    if _too_large(content, 0):
        raise PlacementError(f"{label} nests more than {MAX_DEPTH} deep, or holds an integer of more than 64 bits")
    return content


def _too_large(value: Any, depth: int) -> bool:
    """True for nesting that no rule needs, and for integers that TOML does not have: messages cannot quote either."""
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return depth == MAX_DEPTH or any(_too_large(item, depth + 1) for item in items)
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _takes_pair(name: str, function: Callable[..., bool]) -> bool:
    try:
        return len(inspect.signature(function).parameters) == 3
    except (TypeError, ValueError):
        raise PlacementError(
            f"the predicate {name!r} is no function that can be used: write one of (view, it) or (view, it, other)"
        ) from None


def _unique(rules: list[Rule]) -> Iterator[Rule]:
    """Rules reached twice through includes count once, where they first stand; equal names get a number."""
    seen: dict[str, list[Rule]] = {}
    for rule in rules:
        twins = seen.setdefault(rule.name, [])
        if rule in twins:
            continue
        twins.append(rule)
        yield rule if len(twins) == 1 else replace(rule, name=f"{rule.name}#{len(twins)}")


def _strings(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise PlacementError(f"{where}: expected a string or a list of strings, not {value!r}")
    return values


def _share(value: Any, where: str) -> tuple[Any, float | None]:
    if not isinstance(value, dict):
        return value, None
    within = value.get("within")
    if set(value) != {"of", "within"} or not isinstance(within, (int, float)) or not 1 <= within < math.inf:
        raise PlacementError(f"{where}: share is a list of names, or {{ of = [...], within = 4 }} with a factor >= 1")
    return value["of"], float(within)


def _selectors(value: Any, names: set[str], where: str) -> tuple[Selector, ...]:
    if value is None:
        return ()
    if value == []:
        raise PlacementError(f"{where} is empty: name what it speaks of, or leave it out")
    selectors = []
    for text in _strings(value, where):
        output = _OUT.fullmatch(text.strip())
        selector = Selector(output[1], outputs=True) if output else Selector(text.strip())
        _known(selector.name, names, where)
        selectors.append(selector)
    return tuple(selectors)


def _readings(value: Any, names: set[str], read: set[str], where: str) -> tuple[Selector, ...]:
    """Selectors of edges: a name at the pattern's top has none of its own, only those that read its output."""
    selectors = _selectors(value, names, where)
    for selector in selectors:
        if not selector.outputs and selector.name not in read:
            raise PlacementError(
                f"{where}: {selector.name} is the top of the pattern, which does not read it: "
                f"write out({selector.name}) for the edges that do"
            )
    return selectors


def _axes(value: Any, names: set[str], where: str) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(axis) is int for axis in value.values()):
        raise PlacementError(f"{where}: axis is a table of whole numbers: axis = {{ w = 0 }}")
    for name in value:
        _known(name, names, f"{where}: axis")
    return dict(value)


def _ranges(value: Any, names: set[str], where: str) -> dict[str, tuple[float, float]]:
    if not isinstance(value, dict):
        raise PlacementError(f"{where}: range is a table: range = {{ y = [0, 1] }}")
    ranges = {}
    for name, bounds in value.items():
        _known(name, names, f"{where}: range")
        numbers = isinstance(bounds, list) and all(isinstance(b, (int, float)) and math.isfinite(b) for b in bounds)
        if not numbers or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise PlacementError(f"{where}: the range of {name} is written [low, high], not {bounds!r}")
        ranges[name] = (float(bounds[0]), float(bounds[1]))
    return ranges


def _known(name: str, names: set[str], where: str) -> None:
    if name not in names:
        captured = ", ".join(sorted(names)) or "nothing"
        raise PlacementError(
            f"{where}: the pattern captures no {name!r} (it captures {captured}).{nearest(name, names)}"
        )


def _negation(text: str) -> tuple[bool, str]:
    stripped = text.strip()
    return (True, stripped[4:].strip()) if stripped.startswith("not ") else (False, stripped)
