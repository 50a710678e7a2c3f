"""Write ResNet-50, MobileNetV2 and a 6-layer transformer encoder as ONNX, exported by PyTorch with random weights.

    python tools/make_networks.py FOLDER [--dynamic-batch]      (needs torch and onnxscript)

The architectures are those of He et al. 2015, Sandler et al. 2018 and Vaswani et al. 2017 (width 512, 8 heads,
pre-norm, 128 tokens of 512 numbers). Seeded. They serve to look at engines and at speed, not at accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * 4
        self.body = nn.Sequential(
            *conv(channels, width, 1), *conv(width, width, 3, stride), *conv(width, out, 1, act=None)
        )
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else nn.Sequential(*conv(channels, out, 1, stride, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        wide = [] if expand == 1 else conv(channels, hidden, 1, act=nn.ReLU6)
        depthwise = conv(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6)
        self.body = nn.Sequential(*wide, *depthwise, *conv(hidden, out, 1, act=None))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def conv(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> list[nn.Module]:
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(out), *([act()] if act else [])]


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = width * 4
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = conv(3, 32, 3, 2, act=nn.ReLU6)
    channels = 32
    for expand, out, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(depth):
            layers.append(InvertedResidual(channels, out, stride if index == 0 else 1, expand))
            channels = out
    head = conv(channels, 1280, 1, act=nn.ReLU6)
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the three models go")
    parser.add_argument("--dynamic-batch", action="store_true", help="take any number of samples, not one at a time")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    batch, dynamic = (2, ({0: torch.export.Dim("batch")},)) if options.dynamic_batch else (1, None)
    for name, build, shape in (
        ("resnet50", resnet50, (3, 224, 224)),
        ("mobilenet_v2", mobilenet_v2, (3, 224, 224)),
        ("encoder", encoder, (128, 512)),
    ):
        torch.manual_seed(0)
        model, sample = build().eval(), torch.randn((batch, *shape))
        program = torch.onnx.export(
            model, (sample,), input_names=["x"], output_names=["y"], dynamic_shapes=dynamic, dynamo=True
        )
        onnx.save(program.model_proto, options.folder / f"{name}.onnx")
        print(options.folder / f"{name}.onnx")


if __name__ == "__main__":
    main()
