"""Train the example: a small residual CNN on scikit-learn's digits, exported by PyTorch.

    python tools/train_example.py [FOLDER]      (default: tests/models; needs torch, onnxscript and scikit-learn)

Writes digits.onnx, digits_calibration.npz (256 training images) and digits_test.npz (images and labels that the
training never saw), together under 1 MB. Seeded: the same versions on the same machine write the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

EPOCHS = 30
BATCH = 64
CALIBRATION = 256
TEST = 360


class Block(nn.Module):
    """A basic residual block, with a 1x1 Conv on the skip where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = channels == out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests" / "models")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, digits.target, test_size=TEST, random_state=0)
    model = _trained(network(), torch.from_numpy(x), torch.from_numpy(y))
    with torch.no_grad():
        accuracy = float((model(torch.from_numpy(test_x)).argmax(1).numpy() == test_y).mean())
    folder.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        (torch.from_numpy(x[:2]),),
        input_names=["image"],
        output_names=["scores"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
    )
    onnx.save(_without_traces(program.model_proto), folder / "digits.onnx")
    np.savez_compressed(folder / "digits_calibration.npz", image=x[:CALIBRATION])
    np.savez_compressed(folder / "digits_test.npz", image=test_x, label=test_y)
    print(f"top-1 on {TEST} test images: {accuracy:.3f}; written to {folder}")


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """PyTorch records stack traces with the paths of this machine; they do not belong into the example."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.ClearField("doc_string")
    return model


def _trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    main()
