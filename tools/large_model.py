"""Quantizes a model that is larger than one ONNX file can be, and prints how much memory that took.

    python tools/large_model.py [FOLDER] [--gigabytes 3] [--width 8192]

Writes a chain of MatMuls with its weights in a file beside it, runs `qdq-insert` on a few samples in a process of its
own, checks what came out, and cleans up. FOLDER (default: the system's temporary folder) needs twice the size. Peak
memory counts the pages of mapped weights too, which the system can take back at any time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

GIGA = 1 << 30
QDQ = {"QuantizeLinear", "DequantizeLinear"}


def main() -> None:
    """Make, quantize, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--width", type=int, default=8192, help="each weight is WIDTH x WIDTH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="large_model.") as name:
        folder = Path(name)
        layers = max(1, round(options.gigabytes * GIGA / (4 * options.width**2)))
        weight_bytes = write_model(folder, layers, options.width)
        np.savez(folder / "data.npz", x0=np.random.default_rng(1).standard_normal((4, options.width), np.float32))
        print(f"{layers} MatMuls, {weight_bytes / GIGA:.2f} GB of weights")
        quantize(folder, weight_bytes)
        check(folder, options.width)


def write_model(folder: Path, layers: int, width: int) -> int:
    """A chain of MatMuls; its weights are written one by one."""
    random = np.random.default_rng(0)
    initializers = []
    with (folder / "model.onnx.data").open("wb") as file:
        for index in range(layers):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": "model.onnx.data", "offset": file.tell(), "length": 4 * width**2}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            for _ in range(0, width, 256):
                rows = random.standard_normal((min(256, width), width), np.float32) / np.float32(width**0.5)
                file.write(rows.tobytes())
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"matmul_{i}") for i in range(layers)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return layers * 4 * width**2


def quantize(folder: Path, weight_bytes: int) -> None:
    """Run `qdq-insert` in a process of its own and print its peak memory."""
    code = "import sys; from qdq_surgeon.cli import insert_main; sys.exit(insert_main())"
    start = time.perf_counter()
    external = [] if weight_bytes > 2 * GIGA else ["--external-data"]
    arguments = [str(folder / "model.onnx"), "--data", str(folder / "data.npz"), *external]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"peak memory {peak / GIGA:.2f} GB, {peak / weight_bytes:.2f} times the weights; {seconds:.0f} s")


def check(folder: Path, width: int) -> None:
    """Only pairs were added, the weights are the same bytes, and the result runs."""
    before, after = (onnx.load(folder / name, load_external_data=False) for name in ("model.onnx", "model.qdq.onnx"))
    kept = [node for node in after.graph.node if node.op_type not in QDQ]
    assert [(n.op_type, n.name, n.output) for n in kept] == [(n.op_type, n.name, n.output) for n in before.graph.node]
    assert len(after.graph.node) > len(before.graph.node)
    for tensor in before.graph.initializer:
        assert same_bytes(folder, before, after, tensor.name), tensor.name
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(folder / "model.qdq.onnx", options, ["CPUExecutionProvider"])
    (result,) = session.run(None, {"x0": np.ones((1, width), np.float32)})
    assert np.isfinite(result).all()
    pairs = sum(node.op_type == "QuantizeLinear" for node in after.graph.node)
    print(f"the result loads and runs; {pairs} pairs are all that was added")


def same_bytes(folder: Path, before: ModelProto, after: ModelProto, name: str) -> bool:
    """True where both models hold the same data of a weight."""
    left, right = (mapped(folder, model, name) for model in (before, after))
    return all(np.array_equal(left[i : i + (1 << 24)], right[i : i + (1 << 24)]) for i in range(0, len(left), 1 << 24))


def mapped(folder: Path, model: ModelProto, name: str) -> np.ndarray:
    """The bytes of a weight, where they lie."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries["length"])
    return np.memmap(folder / entries["location"], np.uint8, "r", int(entries["offset"]), (length,))


if __name__ == "__main__":
    main()
