"""Layer lists as the builder of TensorRT-RTX 1.7 printed them, shortened, and as the inspector's JSON has them."""

import json

from qdq_surgeon.tensorrt.layers import Layer, LayerTensor, from_inspector, from_log

CONV = (
    "Name: c_myl0_1, LayerType: correlation, Inputs: [ { Name: q, Dimensions: [1,16,8,8], Strides: [1024,1,128,16], "
    "StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: w, "
    "Dimensions: [32,16,3,3], Strides: [144,1,48,16], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) }, "
    "{ Name: s, Dimensions: [1,32,1,1], Strides: [32,1,32,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: "
    "(NHWC) }], Outputs: [ { Name: y, Dimensions: [1,32,8,8], Strides: [2048,1,256,32], StrideOrder: [3,0,2,1], "
    "Datatype: Float, Format: (NHWC) }], TacticName: __myelin, StreamId: 0, "
    "Metadata: [ONNX Layer: conv1][ONNX Layer: x_DequantizeLinear]"
)
SIGNAL = "Name: sig, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "


def layer(kind="gemm", inputs=(), constants=(), outputs=("float",)):
    tensors = [tuple(LayerTensor("t", kind, (64, 64)) for kind in kinds) for kinds in (inputs, constants, outputs)]
    return Layer("layer", kind, *tensors, frozenset())


def test_a_printed_layer_is_read_whole():
    conv, signal = from_log(["something else", f"Layers:\n{CONV}\n{SIGNAL}\n"])
    assert (conv.name, conv.kind) == ("c_myl0_1", "correlation")
    assert conv.inputs == (LayerTensor("q", "int8", (1, 16, 8, 8)),)
    assert [(t.name, t.type, t.dimensions) for t in conv.constants] == [
        ("w", "int8", (32, 16, 3, 3)),
        ("s", "float", (1, 32, 1, 1)),
    ]
    assert conv.outputs == (LayerTensor("y", "float", (1, 32, 8, 8)),)
    assert conv.nodes == {"conv1", "x_DequantizeLinear"}
    assert (conv.is_kernel, signal.is_kernel) == (True, False)


def test_without_a_layer_list_there_are_no_layers():
    assert from_log(["Registering tensor: y"]) == ()


def test_bytes_follow_from_type_and_dimensions():
    assert LayerTensor("t", "int8", (2, 3, 4)).nbytes == 24
    assert LayerTensor("t", "half", (2, 3, 4)).nbytes == 48
    assert LayerTensor("t", "float", (2, 3, 4)).nbytes == 96


def test_int8_is_int8_data_and_an_int8_weight():
    assert layer(inputs=["int8"], constants=["int8", "float"]).computes_int8(64 * 64)
    assert layer(inputs=["int8", "int8"]).computes_int8(1)


def test_an_int8_input_beside_a_float_weight_is_a_float_computation():
    assert not layer(inputs=["int8"], constants=["float"]).computes_int8(64 * 64)
    assert not layer(inputs=["int8", "int8"], constants=["float"]).computes_int8(64 * 64)


def test_an_int8_weight_beside_float_data_is_a_float_computation():
    assert not layer(inputs=["float"], constants=["int8"]).computes_int8(64 * 64)


def test_a_layer_that_dequantizes_first_is_a_float_computation():
    assert not layer("runtime_fusion", inputs=["int8"], constants=["int8"]).computes_int8(64 * 64)


def test_a_small_int8_constant_is_no_weight():
    assert not layer(inputs=["int8"], constants=["int8"]).computes_int8(64 * 64 + 1)


def test_the_inspectors_json_gives_the_same_type():
    """TensorRT 10 joins format and type, TensorRT 11 splits them (NVIDIA's migration guide)."""
    old = {"Name": "x", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Int8 NC/32HW32"}
    new = {"Name": "y", "Dimensions": [1, 32, 8, 8], "Format": "Row major", "Datatype": "FP16"}
    layers = {
        "Layers": [
            {
                "Name": "conv1",
                "LayerType": "CaskConvolution",
                "Inputs": [old],
                "Outputs": [new],
                "Weights": {"Type": "Int8", "Count": 4608},
                "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
            }
        ]
    }
    (conv,) = from_inspector(json.dumps(layers))
    assert conv.inputs == (LayerTensor("x", "int8", (1, 16, 8, 8)),)
    assert conv.outputs == (LayerTensor("y", "half", (1, 32, 8, 8)),)
    assert conv.nodes == {"conv1", "relu1"}
    assert conv.computes_int8(4608)


def test_a_product_of_two_activations_is_int8_where_both_inputs_are():
    assert layer(inputs=["int8", "int8"], constants=["float"]).computes_int8(None)
    assert not layer(inputs=["int8", "float"], constants=["int8"]).computes_int8(None)
