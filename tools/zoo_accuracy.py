"""FP32 and INT8 side by side on the labelled models of the zoo: python tools/zoo_accuracy.py [--method mse] [NAME ...]

Calibration and measuring samples are disjoint unless --all is given. Agreement is the share of samples on which INT8
and FP32 choose the same class; its standard error is printed, because on 500 samples a point is noise. SQNR is that
of the class scores.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zoo import Labelled, labelled

import qdq_surgeon
from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.calibration.taps import Session
from qdq_surgeon.report.tables import table

HEADS = ("model", "samples", "FP32 top-1", "INT8 top-1", "agreement", "+-", "SQNR dB", "INT8 ops")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument("--method", default="mse")
    parser.add_argument("--placement", default="tensorrt")
    parser.add_argument("--all", action="store_true", help="measure on the calibration samples too, as peers report")
    options = parser.parse_args()
    pairs = (pair for pair in labelled(options.all) if not options.names or pair.name in options.names)
    rows = [_row(pair, options) for pair in pairs]
    mean = sum(float(row[4]) for row in rows) / len(rows)
    print(f"method {options.method}, placement {options.placement}")
    print(table(HEADS, rows))
    print(f"mean agreement {mean:.4f}")


def _row(pair: Labelled, options: argparse.Namespace) -> tuple[str, ...]:
    model = qdq_surgeon.load(pair.model)
    result = qdq_surgeon.quantize(
        model, pair.calibration, method=options.method, placement=options.placement, samples=len(pair.calibration)
    )
    reference = _scores(Session(model.original), pair, model)
    quantized = _scores(Session(result.model, simulate=True), pair, model)
    truth = pair.labels + pair.offset
    agreement = float(np.mean(reference.argmax(1) == quantized.argmax(1)))
    error = math.sqrt(agreement * (1 - agreement) / len(truth))
    noise = float(np.sum((reference - quantized) ** 2))
    return (
        pair.name,
        str(len(truth)),
        f"{np.mean(reference.argmax(1) == truth):.3f}",
        f"{np.mean(quantized.argmax(1) == truth):.3f}",
        f"{agreement:.3f}",
        f"{error:.3f}",
        f"{10 * math.log10(float(np.sum(reference**2)) / noise) if noise else math.inf:.1f}",
        _coverage(result.plan, model),
    )


def _scores(session: Session, pair: Labelled, model: Any) -> NDArray[np.float64]:
    feeds = read_data(pair.samples, model)
    outputs = [run[0] for batch in feeds.batches for run in session.run(batch, session.outputs[:1])]
    return np.concatenate([output.reshape(len(output), -1) for output in outputs]).astype(np.float64)


def _coverage(plan: qdq_surgeon.Plan, model: Any) -> str:
    """How many weighted nodes read both inputs through a pair."""
    edges = {(edge.reader, edge.slot) for site in plan.sites for edge in site.edges}
    nodes = [node for node in model.graph.nodes if node.op in WEIGHTED]
    full = sum((node.first_output, 0) in edges and (node.first_output, 1) in edges for node in nodes)
    return f"{full}/{len(nodes)}"


if __name__ == "__main__":
    main()
