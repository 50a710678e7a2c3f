from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper, version_converter

import qdq_surgeon
from qdq_surgeon.edges import GRAPH_OUTPUT, Edge
from qdq_surgeon.errors import ModelError
from qdq_surgeon.graph import Graph
from qdq_surgeon.model import Model, load, save
from tests.graphs import model, shuffled

CHAIN = """g (float[1,16,8,8] x) => (y, s) <float[16,16,3,3] w, float[16] b> {
  [first] c = Conv<pads=[1,1,1,1]>(x, w, b)
  a = Add(c, x)
  r = Relu(a)
  y = MaxPool<kernel_shape=[2,2]>(r)
  s = Sigmoid(r)
}"""


def graph_of(text: str, opset: int = 17) -> Graph:
    return load(model(text, opset)).graph


# ---- the view of a graph -----------------------------------------------------------------------------------------


def test_nodes_stand_producers_first_from_the_outputs_by_slot():
    assert [node.first_output for node in graph_of(CHAIN).nodes] == ["c", "a", "r", "y", "s"]
    nodes = "b = Neg(x) a = Abs(x) y = Add(a, b)"
    assert [node.first_output for node in graph_of(f"g (float[4] x) => (y) {{ {nodes} }}").nodes] == ["a", "b", "y"]


@pytest.mark.parametrize("seed", range(5))
def test_the_view_does_not_depend_on_the_stored_order(seed):
    graph, other = graph_of(CHAIN), load(shuffled(model(CHAIN), seed)).graph
    assert [node.first_output for node in other.nodes] == [node.first_output for node in graph.nodes]
    for tensor in ("x", "w", "b", "c", "a", "r", "y", "s"):
        assert other.readers(tensor) == graph.readers(tensor)
        assert other.position(tensor) == graph.position(tensor)
        assert other.element_type(tensor) == graph.element_type(tensor)
        assert other.shape(tensor) == graph.shape(tensor)


def test_nodes_that_lead_to_no_output_are_left_out():
    graph = graph_of("g (float[4] x) => (y) { a = Neg(x) dead = Abs(a) y = Relu(a) }")
    assert [node.first_output for node in graph.nodes] == ["a", "y"]
    assert [edge.reader for edge in graph.readers("a")] == ["y"]


def test_readers_come_in_the_order_of_nodes_with_the_graph_output_last():
    graph = graph_of("g (float[4] x) => (a, y) { a = Neg(x) b = Mul(a, a) y = Add(b, a) }")
    assert graph.readers("a") == (Edge((), "b", 0), Edge((), "b", 1), Edge((), "y", 1), Edge((), "a", GRAPH_OUTPUT))


def test_a_body_reads_what_it_captures_by_edges_of_its_own_scope():
    graph = graph_of(
        """g (bool flag, float[4] x) => (y) {
          a = Neg(x)
          y = If(flag) <
            then_branch = t () => (float[4] p) { i = Abs(a) p = Mul(i, a) },
            else_branch = e () => (float[4] a) { }>
        }"""
    )
    assert graph.readers("a") == (
        Edge(("y.then_branch",), "i", 0),
        Edge(("y.then_branch",), "p", 1),
        Edge(("y.else_branch",), "a", GRAPH_OUTPUT),
    )
    assert [node and node.op for node in map(graph.reading_node, graph.readers("a"))] == ["Abs", "Mul", None]
    assert [node.first_output for node in graph.nodes] == ["a", "y.then_branch/i", "y.then_branch/p", "y"]


def test_a_body_inside_a_body_captures_too():
    graph = graph_of(
        """g (bool flag, float[4] x) => (y) {
          a = Neg(x)
          y = If(flag) <
            then_branch = t () => (float[4] p) {
              p = If(flag) <
                then_branch = tt () => (float[4] q) { q = Abs(a) },
                else_branch = te () => (float[4] r) { r = Neg(x) }>
            },
            else_branch = e () => (float[4] z) { z = Neg(x) }>
        }"""
    )
    assert graph.readers("a") == (Edge(("y.then_branch", "p.then_branch"), "q", 0),)


def test_an_attribute_has_its_value_or_the_default_of_the_schema():
    node = graph_of("g (float[4,4] x) => (y) { y = Gemm<transB=1>(x, x) }").producer("y")
    assert node
    assert node.attribute("transB") == 1
    assert node.attribute("transA") == 0
    assert node.attribute("alpha") == 1.0
    assert node.attribute("nothing") is None


def test_a_node_goes_by_its_name_or_its_first_output():
    graph = graph_of(CHAIN)
    assert [node.label for node in graph.nodes[:2]] == ["Conv first", "Add a"]


# ---- constants ---------------------------------------------------------------------------------------------------

CONSTANTS = """g (float[2,3] x, int64[1] n) => (y, z, noise) <
  float[2,3] w, int64[2] shape = {3,2}, float16[2,3] half, int64[1] two = {2}
> {
  k = Constant<value = float[2,3] {1,2,3,4,5,6}>()
  i = Identity(w)
  f = Cast<to=1>(half)
  t = Transpose(k)
  r = Reshape(k, shape)
  filled = ConstantOfShape(shape)
  dynamic = Expand(k, n)
  p = Add(i, f)
  q = Add(t, r)
  u = Add(q, filled)
  m = MatMul(p, u)
  y = MatMul(m, x)
  z = Add(dynamic, x)
  noise = RandomNormal<shape=[2]>()
}"""


@pytest.mark.parametrize("tensor", ["w", "shape", "k", "i", "f", "t", "r", "filled", "p", "m"])
def test_what_follows_from_constants_alone_is_constant(tensor):
    assert graph_of(CONSTANTS, opset=19).is_constant(tensor)


@pytest.mark.parametrize("tensor", ["x", "n", "dynamic", "y", "z", "noise"])
def test_what_follows_from_inputs_or_chance_is_not_constant(tensor):
    assert not graph_of(CONSTANTS, opset=19).is_constant(tensor)


def test_the_value_of_a_constant_is_computed():
    proto = model(CONSTANTS, opset=19)
    graph = load(proto).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    k = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(graph.value("w"), values["w"])
    np.testing.assert_array_equal(graph.value("t"), k.T)
    np.testing.assert_array_equal(graph.value("f"), values["half"].astype(np.float32))
    np.testing.assert_allclose(graph.value("m"), (values["w"] + graph.value("f")) @ (k.T + k.reshape(3, 2)), rtol=1e-5)


def test_a_constant_that_cannot_be_computed_is_an_error():
    graph = graph_of("g (float[3] x) => (y) <float[2] v, float[3] w> { a = Add(v, w) y = Mul(a, x) }")
    with pytest.raises(ModelError, match="the constant 'a' cannot be computed"):
        graph.value("a")


# ---- types and shapes --------------------------------------------------------------------------------------------


def custom(text: str) -> ModelProto:
    return model(f'<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>\n{text}')


def test_types_and_shapes_are_inferred():
    graph = graph_of("g (float16[1,N,4] x, int64[2] i) => (y) { a = Transpose<perm=[0,2,1]>(x) y = Relu(a) }", opset=19)
    assert graph.element_type("a") == TensorProto.FLOAT16
    assert graph.shape("a") == (1, 4, None)
    assert graph.is_float("a")
    assert not graph.is_float("i")


def test_double_is_no_float_that_a_pair_can_read():
    assert not graph_of("g (double[4] x) => (y) { y = Relu(x) }").is_float("y")


def test_types_are_known_behind_a_custom_op():
    proto = custom(
        """g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> {
          m = com.example.Magic(x)
          c = Conv(m, w)
          y = Relu(c)
        }"""
    )
    graph = load(proto).graph
    assert graph.is_float("m")
    assert graph.is_float("c")
    assert graph.is_float("y")
    assert graph.shape("m") is None
    assert {site.tensor for site in qdq_surgeon.plan(proto).sites} == {"m", "w"}


def test_the_op_of_another_domain_carries_the_domain():
    graph = load(custom("g (float[4] x) => (y) { y = com.example.Magic(x) }")).graph
    assert graph.nodes[0].op == "com.example::Magic"


def test_a_custom_op_on_constants_is_not_constant():
    proto = custom("g (float[4] x) => (y) <float[4] w> { m = com.example.Magic(w) y = Add(m, x) }")
    assert not load(proto).graph.is_constant("m")


# ---- what is no valid graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("a = Add(x, b) b = Relu(a) y = Neg(b)", "the graph has a cycle through"),
        ("y = Add(x, y)", "the graph has a cycle through Add y"),
        ("y = Add(x, ghost)", "the tensor 'ghost' is read, but no node, input or initializer gives it"),
        ("a = Neg(x) a = Abs(x) y = Relu(a)", "two nodes make the tensor 'a'"),
        ("a = Neg(x)", "the tensor 'y' is read, but no node, input or initializer gives it"),
    ],
)
def test_a_broken_graph_is_refused(nodes, message):
    with pytest.raises(ModelError) as error:
        _ = graph_of(f"g (float[4] x) => (float[4] y) {{ {nodes} }}").nodes
    assert str(error.value).startswith(message)


# ---- load --------------------------------------------------------------------------------------------------------


def test_a_model_is_a_path_a_proto_or_has_one(tmp_path):
    proto = model(CHAIN)
    path = tmp_path / "chain.onnx"
    onnx.save(proto, path)
    digests = {load(source).digest for source in (proto, path, str(path), SimpleNamespace(model_proto=proto))}
    assert digests == {load(proto).digest}
    assert load(path).path == path
    assert load(proto).path is None


def test_a_loaded_model_is_loaded():
    loaded = load(model(CHAIN))
    assert load(loaded) is loaded


def test_another_object_is_no_model():
    with pytest.raises(ModelError, match=r"a model is a path, a ModelProto or has .model_proto; this is a int"):
        load(3)  # type: ignore


def test_load_and_plan_leave_the_source_as_it_was():
    proto = model("g (float[1,4] x) => (y) { s = Squeeze<axes=[0]>(x) y = Relu(s) }", opset=11)
    before = proto.SerializeToString(deterministic=True)
    qdq_surgeon.plan(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere.onnx: no such file"):
        load(tmp_path / "nowhere.onnx")


def test_a_folder(tmp_path):
    with pytest.raises(ModelError, match=r"is a folder: give the .onnx file in it"):
        load(tmp_path)


def test_a_truncated_file(tmp_path):
    data = model(CHAIN).SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"cut.onnx is not a whole ONNX file .*: export or download it again"):
        load(path)


@pytest.mark.parametrize("data", [b"hello, I am no model", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs", bytes(64)])
def test_a_file_that_is_not_onnx(tmp_path, data):
    path = tmp_path / "other.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"other.onnx (is not a whole ONNX file|holds no ONNX graph)"):
        load(path)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"empty.onnx holds no ONNX graph: is this an ONNX file?"):
        load(tmp_path / "empty.onnx")


def test_an_empty_proto():
    with pytest.raises(ModelError, match="the model holds no ONNX graph"):
        load(ModelProto())


def saved_apart(folder: Path) -> Path:
    path = folder / "apart.onnx"
    onnx.save_model(model(CHAIN), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_in_a_file_of_their_own_are_read(tmp_path):
    loaded = load(saved_apart(tmp_path))
    assert (tmp_path / "weights.bin").stat().st_size > 0
    np.testing.assert_array_equal(loaded.graph.value("w"), load(model(CHAIN)).graph.value("w"))
    assert loaded.digest == load(model(CHAIN)).digest


def test_a_missing_file_of_weights(tmp_path):
    path = saved_apart(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"apart.onnx: its external data is missing: .*weights.bin"):
        load(path)


# ---- initializers that are listed as inputs ----------------------------------------------------------------------


def listed(ir_version: int = 8, opset: int = 17) -> ModelProto:
    proto = model("g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }", opset)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 16, 1, 1]))
    proto.ir_version = ir_version
    return proto


def test_an_initializer_that_is_listed_as_an_input_need_not_be_fed():
    loaded = load(listed())
    assert [value.name for value in loaded.inputs] == ["x"]
    assert loaded.graph.inputs == ("x",)
    assert loaded.graph.is_constant("w")
    assert {site.tensor: site.axis for site in qdq_surgeon.plan(loaded).sites} == {"x": None, "w": 0}


# ---- opset and IR version ----------------------------------------------------------------------------------------


def old_model() -> ModelProto:
    """Opset 11: the axes of Squeeze and Unsqueeze are still attributes."""
    proto = model(
        """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
        g (float[1,2] x) => (float[2] y, float[1,2] z) <float[2,2] w> {
          [first] q = Squeeze<axes=[0]>(x)
          [second] f = local.F(q)
          [third] y = MatMul(f, w)
          z = Unsqueeze<axes=[0]>(y)
        }
        <domain: "local", opset_import: ["" : 11]>
        F (a) => (b) { b = Softplus(a) }"""
    )
    proto.doc_string, proto.producer_name, proto.domain, proto.model_version = "model", "maker", "domain", 7
    proto.graph.doc_string, proto.graph.input[0].doc_string = "graph", "input"
    proto.metadata_props.add(key="model", value="kept")
    proto.graph.metadata_props.add(key="graph", value="kept")
    proto.functions[0].metadata_props.add(key="function", value="kept")
    for node in proto.graph.node:
        node.doc_string = f"doc of {node.output[0]}"
        node.metadata_props.add(key="node", value=node.output[0])
    return proto


def test_a_low_opset_is_raised_to_13():
    loaded = load(old_model())
    assert loaded.opset == 13
    assert loaded.notes == ("opset raised from 11 to 13",)
    assert loaded.original.opset_import[0].version == 11


def test_raising_the_opset_keeps_names_doc_strings_metadata_and_functions():
    original, raised = old_model(), load(old_model()).proto
    made = {node.output[0]: node for node in raised.graph.node}
    for node in original.graph.node:
        kept = made[node.output[0]]
        assert kept.op_type == node.op_type
        assert kept.name == node.name
        assert kept.doc_string == node.doc_string
        assert kept.metadata_props == node.metadata_props
        assert kept.input[0] == node.input[0]
    for field in ("doc_string", "producer_name", "domain", "model_version", "metadata_props", "functions"):
        assert getattr(raised, field) == getattr(original, field), field
    for field in ("name", "doc_string", "metadata_props", "input", "output", "initializer"):
        assert getattr(raised.graph, field) == getattr(original.graph, field), field


def test_raising_the_opset_gives_a_valid_model():
    onnx.checker.check_model(load(old_model()).proto, full_check=True)


def test_a_function_of_a_low_opset_does_not_make_the_model_invalid():
    proto = model(
        """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
        g (float[1,2] x) => (float[2] y) { s = local.F(x) y = Relu(s) }
        <domain: "local", opset_import: ["" : 11]>
        F (a) => (b) { b = Squeeze<axes=[0]>(a) }"""
    )
    onnx.checker.check_model(proto)
    onnx.checker.check_model(load(proto).proto)


def test_opset_13_and_above_stays():
    assert load(model(CHAIN, opset=13)).opset == 13
    assert load(model(CHAIN, opset=17)).opset == 17
    assert load(model(CHAIN, opset=17)).notes == ()


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_half_precision_needs_opset_19(element):
    loaded = load(model(f"g ({element}[4,4] x) => ({element}[4,4] y) <{element}[4,4] w> {{ y = MatMul(x, w) }}"))
    assert loaded.opset == 19
    assert loaded.notes == ("opset raised from 17 to 19",)


def test_half_precision_inside_the_graph_needs_opset_19_too():
    text = "g (float[4,4] x) => (y) <float[4,4] w> { h = Cast<to=10>(x) v = Cast<to=10>(w) y = MatMul(h, v) }"
    assert load(model(text)).opset == 19


def refuse(*_):
    raise RuntimeError("no adapter for Magic")


def test_where_the_opset_cannot_be_raised_weights_get_one_scale_per_tensor(monkeypatch):
    monkeypatch.setattr(version_converter, "convert_version", refuse)
    loaded = load(model("g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }", opset=11))
    assert loaded.opset == 11
    (note,) = loaded.notes
    assert "one scale per tensor" in note
    assert "no adapter for Magic" in note
    assert {site.tensor: site.axis for site in qdq_surgeon.plan(loaded).sites} == {"x": None, "w": None}


def test_where_the_opset_must_be_raised_and_cannot_the_model_is_refused(monkeypatch):
    monkeypatch.setattr(version_converter, "convert_version", refuse)
    proto = model("g (float[4,4] x) => (y) <float[4,4] w> { y = MatMul(x, w) }", 9)
    with pytest.raises(ModelError, match=r"opset 9, .*no adapter for Magic.*: export it with opset 13"):
        load(proto)


def test_half_precision_that_cannot_be_raised_to_opset_19_stays_float(monkeypatch):
    monkeypatch.setattr(version_converter, "convert_version", refuse)
    text = """g (float[1,16,8,8] x, float16[1,16,8,8] h) => (y, z) <float[16,16,1,1] w, float16[16,16,1,1] v> {
      y = Conv(x, w)
      z = Conv(h, v)
    }"""
    loaded = load(model(text))
    (note,) = loaded.notes
    assert "FP16 and BF16 tensors stay float" in note
    assert {site.tensor for site in qdq_surgeon.plan(loaded).sites} == {"x", "w"}


def test_a_low_ir_version_is_raised_to_4():
    loaded = load(listed(ir_version=3))
    assert loaded.proto.ir_version == 4
    assert loaded.original.ir_version == 3
    assert load(listed(ir_version=8)).proto.ir_version == 8


def test_a_low_ir_version_and_a_low_opset_are_raised_together():
    loaded = load(listed(ir_version=3, opset=9))
    assert (loaded.proto.ir_version, loaded.opset) == (4, 13)


# ---- save --------------------------------------------------------------------------------------------------------


def test_a_saved_model_reads_back(tmp_path):
    proto = model(CHAIN)
    save(proto, tmp_path / "chain.onnx")
    assert load(tmp_path / "chain.onnx").proto == proto
    assert [path.name for path in tmp_path.iterdir()] == ["chain.onnx"]


def test_save_replaces_an_older_file(tmp_path):
    path = tmp_path / "chain.onnx"
    path.write_bytes(b"old")
    save(model(CHAIN), str(path))
    assert load(path).proto == model(CHAIN)


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"chain.onnx cannot be written: No such file or directory"):
        save(model(CHAIN), tmp_path / "nowhere" / "chain.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    (tmp_path / "chain.onnx").mkdir()
    with pytest.raises(ModelError, match=r"chain.onnx cannot be written: Is a directory"):
        save(model(CHAIN), tmp_path / "chain.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["chain.onnx"]
    assert list((tmp_path / "chain.onnx").iterdir()) == []


def test_a_failed_save_leaves_the_older_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "chain.onnx"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ModelError, match=r"chain.onnx cannot be written: No space left on device"):
        save(model(CHAIN), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["chain.onnx"]


# ---- digest ------------------------------------------------------------------------------------------------------


def digest(proto: ModelProto) -> str:
    return load(proto).digest


@pytest.mark.parametrize("seed", range(5))
def test_the_digest_does_not_depend_on_the_stored_order(seed):
    assert digest(shuffled(model(CHAIN), seed)) == digest(model(CHAIN))


def test_the_digest_follows_every_weight():
    proto = model(CHAIN)
    value = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    value.flat[0] += 1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, proto.graph.initializer[0].name))
    assert digest(proto) != digest(model(CHAIN))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"'),
        ("Add(c, x)", "Add(x, c)"),
        ("Add(c, x)", "Mul(c, x)"),
        ("(y, s)", "(s, y)"),
        ("[1,16,8,8] x", "[N,16,8,8] x"),
    ],
)
def test_the_digest_follows_nodes_inputs_and_outputs(old, new):
    assert digest(model(CHAIN.replace(old, new))) != digest(model(CHAIN))


def test_the_digest_follows_the_opset():
    assert digest(model(CHAIN, opset=18)) != digest(model(CHAIN, opset=17))


def test_the_digest_leaves_out_metadata():
    proto = model(CHAIN)
    proto.doc_string, proto.producer_name = "text", "maker"
    proto.metadata_props.add(key="note", value="text")
    proto.graph.metadata_props.add(key="note", value="text")
    assert digest(proto) == digest(model(CHAIN))


def test_the_digest_leaves_out_the_metadata_of_nodes():
    proto = model(CHAIN)
    proto.graph.node[0].metadata_props.add(key="note", value="text")
    assert digest(proto) == digest(model(CHAIN))


def test_a_model_is_frozen():
    loaded = load(model(CHAIN))
    assert isinstance(loaded, Model)
    with pytest.raises(AttributeError):
        loaded.path = Path("elsewhere")  # type: ignore
