"""Pages for people: one self-contained HTML file, no scripts, no outside resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .chart import WEIGHT_BAR, Bar, bar_chart, escaped
from .tables import decibels

if TYPE_CHECKING:
    from ..refinement.sensitivity import Sensitivity
    from ..tensorrt.audit import Audit

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1d2433; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; }
tr { border-bottom: 1px solid #d9dee8; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.int8 { color: #14683a; } .float { color: #a3260c; } .left { color: #5b6477; } code { font-size: .9em; }
"""


def audit_page(model: str, audit: Audit) -> str:
    """An audit as a page: the verdict, the engines side by side, and one row for each weighted op."""
    from ..tensorrt.audit import share_of_macs

    done = sum(op.int8 for op in audit.planned)
    figures = [("INT8", audit.figures)] + ([("float", audit.float_figures)] if audit.float_figures else [])
    engines = [
        (name, f"{f.kernels}", f"{f.int8_ops}", share_of_macs(f), f"{f.bytes_moved:,}", f"{f.conversions}")
        for name, f in figures
    ]
    heads = ("engine", "kernels", "weighted ops in INT8", "MACs in INT8", "activation bytes moved", "only convert")
    rows = []
    for op in audit.ops:
        state = "int8" if op.int8 else "float" if op.planned else "left"
        word = {"int8": "INT8", "float": "float", "left": "float, as planned"}[state]
        rows.append(
            f'<tr><td><code>{escaped(op.node)}</code></td><td class="{state}">{word}</td>'
            f'<td class="number">{op.macs:,}</td><td>{escaped(op.reason)}</td></tr>'
        )
    conversions = "".join(f"<li>{escaped(text)}</li>" for text in audit.conversions) or "<li>none</li>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Audit of {escaped(model)}</title><style>{STYLE}</style></head><body>
<h1>Audit of {escaped(model)}</h1>
<p><strong>{done} of {len(audit.planned)}</strong> planned ops run in INT8 (INT8 data and INT8 weights).<br>
Engine: {escaped(str(audit.backend))}.</p>
<h2>Engines</h2>
{_table(heads, engines)}
<h2>Weighted ops</h2>
<table><tr><th>op</th><th>runs in</th><th>multiply-accumulates</th><th>why not INT8</th></tr>
{"".join(rows)}
</table>
<h2>Kernels that only convert</h2>
<ul>{conversions}</ul>
</body></html>
"""


CHARTED = 30
"""How many bars a chart shows."""


def sensitivity_chart(model: str, found: Sensitivity) -> str:
    """The ops that add most to the error, as SVG."""
    bars = [Bar(op.op, op.share, f"{op.share:.1%}, {op.macs:,} MACs") for op in found.ops[:CHARTED]]
    return bar_chart(f"{model}: what each op adds to the error", bars)


def sensitivity_page(model: str, found: Sensitivity) -> str:
    """Charts of ops, pairs and the error along the graph, and what they were measured on."""
    pairs = [
        Bar(site.tensor, site.share, f"{site.share:.1%}, {decibels(site.sqnr)} alone", WEIGHT_BAR)
        if site.weight
        else Bar(site.tensor, site.share, f"{site.share:.1%}, {decibels(site.sqnr)} alone")
        for site in found.sites[:CHARTED]
    ]
    along = [(error.op, decibels(error.before), decibels(error.sqnr), f"{error.added:.2%}") for error in found.tensors]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sensitivity of {escaped(model)}</title>
<style>{STYLE}</style></head><body>
<h1>Sensitivity of {escaped(model)}</h1>
<p>SQNR with all {len(found.sites)} pairs: <strong>{decibels(found.sqnr)}</strong>.
{found.passes} forward passes of {found.samples} samples.</p>
<h2>Ops</h2>
{sensitivity_chart(model, found)}
<h2>Pairs (weights in another colour)</h2>
{bar_chart(f"{model}: what each pair alone adds to the error", pairs)}
<h2>Along the graph, with all pairs at work</h2>
{_table(("op", "SQNR of what it reads", "SQNR of what it makes", "noise added, of the signal"), along)}
</body></html>
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escaped(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><td>{escaped(row[0])}</td>{''.join(f'<td class=number>{escaped(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"
