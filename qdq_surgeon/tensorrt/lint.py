"""Lint: what TensorRT refuses, or silently runs in float, in a Q/DQ model of any producer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..edges import count
from ..errors import QdqError, nearest
from ..model import Source, load
from .lint_rules import ERROR, RULES, WARNING, LintRule
from .view import View

TARGETS = ("trt10", "trt11", "rtx")
"""TensorRT 10 and 11, and TensorRT for RTX."""
DEFAULT_TARGET = "trt11"


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that TensorRT will refuse or slow down: `what` it will do there, and how to `mend` it."""

    code: str
    severity: str
    node: str
    tensor: str
    detail: str
    what: str
    mend: str

    def __str__(self) -> str:
        place = f"{self.node} ({self.tensor})" if self.node and self.tensor else self.node or self.tensor
        return ": ".join(part for part in (place, self.detail) if part)


@dataclass(frozen=True, slots=True)
class Report:
    """What `lint` found for one target, errors first, in the order of `RULES`."""

    findings: tuple[Finding, ...]
    target: str

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == WARNING)

    def __str__(self) -> str:
        head = f"{count(len(self.errors), ERROR)}, {count(len(self.warnings), WARNING)} for {self.target}"
        return "\n".join([head, *_grouped(self.findings)])


def _grouped(findings: Iterable[Finding]) -> Iterator[str]:
    by_code: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_code[finding.code].append(finding)
    for code, found in by_code.items():
        first = found[0]
        yield from ("", f"{first.severity} {code} ({len(found)}): {first.what}", f"  mend: {first.mend}")
        yield from (f"    {finding}" for finding in found)


def lint(model: Source, target: str = DEFAULT_TARGET) -> Report:
    """Check a Q/DQ model, as it was given, against what `target` (one of TARGETS) accepts and runs in INT8.

    Raises ModelError for what is no readable ONNX model, QdqError for an unknown target.
    """
    if target not in TARGETS:
        raise QdqError(f"unknown target '{target}'.{nearest(target, TARGETS)} Targets: {', '.join(TARGETS)}")
    view = View(load(model).original)
    rules = [rule for rule in RULES if not rule.targets or target in rule.targets]
    return Report(tuple(finding for rule in rules for finding in _findings(rule, view)), target)


def _findings(rule: LintRule, view: View) -> Iterator[Finding]:
    for spot in rule.find(view):
        yield Finding(rule.code, rule.severity, spot.node, spot.tensor, spot.detail, rule.what, rule.mend)
