import numpy as np
import pytest

import qdq_surgeon
from qdq_surgeon.errors import PlacementError
from qdq_surgeon.rules.placement import Selector, load_placement, presets
from tests.graphs import model


def rule(**changed: str | None) -> str:
    """A rule as TOML; a value of None leaves the key out."""
    entry: dict[str, str | None] = {
        "name": '"mine"',
        "match": '"Add(a, b)"',
        "quantize": '["a"]',
        "because": '"It is so."',
    }
    return "[[rule]]\n" + "".join(f"{key} = {value}\n" for key, value in (entry | changed).items() if value)


def include(name: str) -> str:
    return f"[[rule]]\ninclude = {name}\n"


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def names(placement: str) -> list[str]:
    return [rule.name for rule in load_placement(placement).rules]


def complaint(placement: str) -> str:
    with pytest.raises(PlacementError) as error:
        load_placement(placement)
    return str(error.value)


# ---- what a rule says --------------------------------------------------------------------------------------------


def test_a_rule_has_a_pattern_conditions_verbs_and_a_reason(write):
    (read,) = load_placement(
        write(
            rule(
                match='"y := Concat(a, *others)"',
                any_order="true",
                where='{ a = ["activation", "not single_use"], pair = ["a deeper_than others"] }',
                quantize='["a", "out(y)"]',
                keep_float='["others"]',
                share='{ of = ["a", "y"], within = 4 }',
                axis="{ a = -1 }",
                range="{ y = [0, 1] }",
                because='"""Because of\n  this."""',
            )
        )
    ).rules
    assert read.name == "mine"
    assert read.any_order
    assert [(c.predicate, c.names, c.negated) for c in read.where] == [
        ("activation", ("a",), False),
        ("single_use", ("a",), True),
        ("deeper_than", ("a", "others"), False),
    ]
    assert read.quantize == (Selector("a"), Selector("y", outputs=True))
    assert read.keep_float == (Selector("others"),)
    assert read.share == (Selector("a"), Selector("y"))
    assert read.share_within == 4
    assert read.axis == {"a": -1}
    assert read.range == {"y": (0.0, 1.0)}
    assert read.because == "Because of this."


def test_one_name_may_stand_without_a_list(write):
    (read,) = load_placement(write(rule(quantize='"a"', where='{ a = "activation" }'))).rules
    assert read.quantize == (Selector("a"),)


def test_share_without_a_limit(write):
    (read,) = load_placement(write(rule(share='["a", "b"]'))).rules
    assert read.share == (Selector("a"), Selector("b"))
    assert read.share_within is None


# ---- includes, and the order of rules ----------------------------------------------------------------------------


def test_an_include_places_another_file_there(write):
    write(rule(name='"inner"'), "inner.toml")
    text = rule(name='"before"') + include('"inner.toml"') + rule(name='"after"')
    assert names(write(text)) == ["before", "inner", "after"]


def test_an_include_at_the_top_of_the_file_comes_first(write):
    write(rule(name='"inner"'), "inner.toml")
    assert names(write('include = "inner.toml"\n' + rule())) == ["inner", "mine"]


def test_an_include_may_list_several_files(write):
    write(rule(name='"one"'), "one.toml")
    write(rule(name='"two"', match='"Sub(a, b)"'), "two.toml")
    assert names(write(include('["two.toml", "one.toml"]'))) == ["two", "one"]
    assert names(write('include = ["one.toml", "two.toml"]\n')) == ["one", "two"]


def test_an_include_is_looked_for_beside_the_file_that_names_it(write):
    write(rule(name='"beside"'), "deep/inner.toml")
    write(include('"inner.toml"'), "deep/outer.toml")
    assert names(write(include('"deep/outer.toml"'))) == ["beside"]


def test_an_include_may_name_a_preset(write):
    assert names(write(include('"weights-only"') + rule())) == [*names("weights-only"), "mine"]


def test_a_file_that_includes_itself_is_refused(write):
    path = write(include('"mine.toml"'))
    assert f"{path} includes itself" in complaint(path)


def test_files_that_include_each_other_are_refused(write):
    write(include('"b.toml"'), "a.toml")
    path = write(include('"a.toml"'), "b.toml")
    message = complaint(path)
    assert "b.toml includes itself" in message
    assert "a.toml -> " in message


def test_a_file_that_includes_itself_by_another_path_is_refused(write):
    path = write(include('"../deep/a.toml"'), "deep/a.toml")
    assert "includes itself" in complaint(path)


def test_several_placements_stand_in_the_order_given(write):
    path = write(rule())
    assert names(f"{path},weights-only") == ["mine", *names("weights-only")]
    assert names(f"weights-only, {path}") == [*names("weights-only"), "mine"]


def test_a_path_object_is_one_file_even_with_a_comma_in_it(write, tmp_path):
    write(rule(), "a,b.toml")
    assert [rule.name for rule in load_placement(tmp_path / "a,b.toml").rules] == ["mine"]


def test_a_rule_reached_twice_counts_once_where_it_first_stands():
    both = names("cases/efficientnet,cases/mobilenet")
    assert both == ["residual-add", "squeeze-and-excite"]
    assert names("tensorrt,tensorrt") == names("tensorrt")
    assert names("cases/resnet-v1,tensorrt").count("residual-add") == 1
    assert names("cases/resnet-v1,tensorrt")[0] == "residual-add"


def test_different_rules_with_one_name_get_a_number(write):
    assert names(write(rule() + rule(match='"Sub(a, b)"') + rule(match='"Mul(a, b)"'))) == ["mine", "mine#2", "mine#3"]


def test_the_digest_follows_the_text_of_all_files(write):
    inner = write(rule(), "inner.toml")
    outer = write(include('"inner.toml"'), "outer.toml")
    first = load_placement(outer).digest
    assert load_placement(outer).digest == first
    write(rule(because='"Another reason."'), "inner.toml")
    assert load_placement(outer).digest != first
    assert load_placement(inner).digest != load_placement(outer).digest


CONV = "g (float[1,16,8,8] x) => (y) <float[16,16,1,1] w> { y = Conv(x, w) }"


def rules_of_conv(placement: str, **options) -> list[str]:
    plan = qdq_surgeon.plan(model(CONV), placement=placement, **options)
    return [read.rule for site in plan.sites for read in site.reads]


def test_the_first_rule_that_speaks_of_an_edge_wins(write):
    override = rule(match='"Conv(x, w)"', quantize=None, keep_float='["x", "w"]')
    assert rules_of_conv("tensorrt") == ["conv", "conv"]
    assert rules_of_conv(write(override + include('"tensorrt"'))) == []
    assert rules_of_conv(f"{write(override)},tensorrt") == []
    assert rules_of_conv(write(include('"tensorrt"') + override)) == ["conv", "conv"]


# ---- a caller's own predicates -----------------------------------------------------------------------------------


def called_w(view, it):
    """The tensor is called w."""
    return it.tensor == "w"


def name_before(view, it, other):
    """The first name comes earlier in the alphabet."""
    return it.tensor < other.tensor


def test_a_callers_predicate(write):
    path = write(rule(match='"Conv(a, b)"', where='{ b = "called_w" }'))
    assert rules_of_conv(path, predicates={"called_w": called_w}) == ["mine"]
    path = write(rule(match='"Conv(a, b)"', where='{ a = "called_w" }'))
    assert rules_of_conv(path, predicates={"called_w": called_w}) == []


def test_a_callers_predicate_on_a_pair(write):
    path = write(rule(match='"Conv(a, b)"', where='{ pair = "b name_before a" }'))
    assert rules_of_conv(path, predicates={"name_before": name_before}) == ["mine"]
    path = write(rule(match='"Conv(a, b)"', where='{ pair = "a name_before b" }'))
    assert rules_of_conv(path, predicates={"name_before": name_before}) == []


def test_a_callers_predicate_can_be_negated(write):
    path = write(rule(match='"Conv(a, b)"', where='{ a = "not called_w" }'))
    assert rules_of_conv(path, predicates={"called_w": called_w}) == ["mine"]


@pytest.mark.parametrize("nothing", [False, np.False_, 0, None])
def test_what_a_callers_predicate_gives_counts_as_true_or_false(write, nothing):
    plain = write(rule(match='"Conv(a, b)"', where='{ a = "never" }'))
    assert rules_of_conv(plain, predicates={"never": lambda view, it: nothing}) == []
    negated = write(rule(match='"Conv(a, b)"', where='{ a = "not never" }'))
    assert rules_of_conv(negated, predicates={"never": lambda view, it: nothing}) == ["mine"]


class CalledW:
    def __call__(self, view, it):
        return it.tensor == "w"


def test_a_callers_predicate_may_be_an_object(write):
    path = write(rule(match='"Conv(a, b)"', where='{ b = "called_w" }'))
    assert rules_of_conv(path, predicates={"called_w": CalledW()}) == ["mine"]
    path = write(rule(match='"Conv(a, b)"', where='{ a = "called_w" }'))
    assert rules_of_conv(path, predicates={"called_w": CalledW()}) == []


@pytest.mark.parametrize("predicate", [3, type])
def test_a_callers_predicate_that_is_no_function_is_refused(write, predicate):
    with pytest.raises(PlacementError, match=r"the predicate 'called_w' .* write one of \(view, it\)"):
        load_placement(write(rule()), predicates={"called_w": predicate})


def test_a_predicate_that_the_caller_did_not_give_is_unknown(write):
    assert "unknown predicate 'called_w'" in complaint(write(rule(where='{ a = "called_w" }')))


# ---- what is refused, and what to write instead ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantise": '["a"]'}, "unknown key 'quantise'. Did you mean 'quantize'"),
        ({"where_": "{}"}, "unknown key 'where_'. Did you mean 'where'"),
        ({"because": None}, 'because is missing: write because = "..."'),
        ({"because": '""'}, 'because is missing: write because = "..."'),
        ({"match": None}, 'match is missing: write match = "..."'),
        ({"quantize": None}, "it does nothing: give it quantize, keep_float or share"),
        ({"quantize": None, "axis": "{ a = 0 }"}, "it does nothing: give it quantize, keep_float or share"),
        ({"match": '"Addd(a, b)"'}, "ONNX has no op 'Addd'. Did you mean 'Add'"),
        ({"match": '"Add(a, Relu)"'}, "write Relu(...)"),
        ({"where": '{ a = "activaton" }'}, "unknown predicate 'activaton'. Did you mean 'activation'"),
        ({"where": '{ a = "not activaton" }'}, "unknown predicate 'activaton'. Did you mean 'activation'"),
        ({"where": '{ c = "activation" }'}, "the pattern captures no 'c' (it captures a, b)"),
        ({"where": '"activation"'}, 'where is a table: where = { name = "predicate" }'),
        ({"where": "{ a = 1 }"}, "expected a string or a list of strings, not 1"),
        ({"where": '{ pair = "a deeper_then b" }'}, "unknown pair predicate 'deeper_then'. Did you mean 'deeper_than'"),
        ({"where": '{ pair = "a deeper_than" }'}, "a pair condition reads 'a predicate b', not 'a deeper_than'"),
        ({"where": '{ pair = "a deeper_than c" }'}, "the pattern captures no 'c' (it captures a, b)"),
        (
            {"quantize": '["skip"]', "match": '"Add(skips, b)"'},
            "captures no 'skip' (it captures b, skips). Did you mean",
        ),
        ({"quantize": '["out(c)"]'}, "quantize: the pattern captures no 'c'"),
        ({"keep_float": '["c"]'}, "keep_float: the pattern captures no 'c'"),
        ({"share": '["c"]'}, "share: the pattern captures no 'c'"),
        ({"quantize": "3"}, "quantize: expected a string or a list of strings, not 3"),
        ({"match": '"Relu(_)"', "quantize": '["a"]'}, "the pattern captures no 'a' (it captures nothing)"),
        ({"axis": "{ c = 0 }"}, "axis: the pattern captures no 'c'"),
        ({"axis": '{ a = "0" }'}, "axis is a table of whole numbers: axis = { w = 0 }"),
        ({"axis": "{ a = 1.5 }"}, "axis is a table of whole numbers"),
        ({"axis": "{ a = true }"}, "axis is a table of whole numbers"),
        ({"axis": "0"}, "axis is a table of whole numbers"),
        ({"range": "{ c = [0, 1] }"}, "range: the pattern captures no 'c'"),
        ({"range": "[0, 1]"}, "range is a table: range = { y = [0, 1] }"),
        ({"range": "{ a = [1, 0] }"}, "the range of a is written [low, high], not [1, 0]"),
        ({"range": "{ a = [1, 1] }"}, "the range of a is written [low, high]"),
        ({"range": "{ a = [0] }"}, "the range of a is written [low, high]"),
        ({"range": "{ a = 1 }"}, "the range of a is written [low, high], not 1"),
        ({"range": '{ a = [0, "1"] }'}, "the range of a is written [low, high]"),
        ({"range": "{ a = [0, nan] }"}, "the range of a is written [low, high]"),
        ({"range": "{ a = [0, inf] }"}, "the range of a is written [low, high]"),
        ({"share": '{ of = ["a"] }'}, "share is a list of names, or { of = [...], within = 4 } with a factor >= 1"),
        ({"share": '{ of = ["a"], within = 0.5 }'}, "{ of = [...], within = 4 } with a factor >= 1"),
        ({"share": '{ of = ["a"], within = "4" }'}, "{ of = [...], within = 4 } with a factor >= 1"),
        ({"share": '{ of = ["a"], within = nan }'}, "{ of = [...], within = 4 } with a factor >= 1"),
        ({"share": '{ of = ["a"], within = 4, more = 1 }'}, "{ of = [...], within = 4 } with a factor >= 1"),
        ({"any_order": '"yes"'}, "any_order"),
        ({"include": '"tensorrt"'}, "include stands alone in its [[rule]] entry: move the other keys to another"),
        ({"where": '{ a = "not deeper_than" }'}, 'deeper_than compares two names: write pair = "a deeper_than other"'),
        ({"where": '{ pair = "a single_use b" }'}, 'single_use is about one name: write a = "single_use" outside pair'),
        ({"match": '"y := Add(a, b)"', "quantize": '["a", "y"]'}, "quantize: y is the top of the pattern, which does"),
        ({"match": '"y := Add(a, b)"', "keep_float": '["y"]'}, "does not read it: write out(y) for the edges that do"),
        ({"match": '"x := Input()"', "quantize": '["x"]'}, "write out(x)"),
        ({"match": '"(y := Add(a, b)) | Relu(a)"', "quantize": '["y"]'}, "write out(y)"),
        ({"quantize": "[]"}, "quantize is empty: name what it speaks of, or leave it out"),
        ({"keep_float": "[]"}, "keep_float is empty"),
        ({"share": "[]"}, "share is empty"),
        ({"share": "{ of = [], within = 4 }"}, "share is empty"),
        ({"match": '"Add(a, b, axes=1)"'}, "in 'Add(a, b, axes=1)', Add has no attribute 'axes'. Did you mean 'axis'?"),
    ],
)
def test_a_wrong_rule_names_the_file_the_rule_and_what_to_write(write, changes, message):
    path = write(rule(**changes))
    said = complaint(path)
    assert said.startswith(f"{path}, rule 'mine': ")
    assert message in said


def test_a_rule_without_a_name_is_named_as_such(write):
    path = write(rule(name=None))
    assert complaint(path) == f"{path}, rule '(without a name)': name is missing: write name = \"...\""


def test_a_file_that_is_not_toml(write):
    path = write("[[rule]\n")
    assert complaint(path).startswith(f"{path} is not valid TOML: ")


def test_a_file_that_is_not_text(write, tmp_path):
    path = write("")
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert complaint(path).startswith(f"{path} cannot be read: ")


def test_an_unknown_key_outside_the_rules(write):
    path = write("version = 1\n" + rule())
    assert complaint(path) == f"{path}: unknown key 'version'; a placement file holds [[rule]] tables"


def test_rules_that_are_no_tables(write):
    path = write("rule = 3\n")
    assert complaint(path) == f"{path}: rules are written as [[rule]] tables"
    assert complaint(write("rule = [1, 2]\n")) == f"{path}: rules are written as [[rule]] tables"


def test_a_file_without_rules(write):
    path = write("# nothing yet\n")
    assert complaint(path) == f"the placement {path} has no rules"


def test_an_include_that_is_no_name(write):
    path = write("include = 3\n")
    assert complaint(path) == f"{path}: expected a string or a list of strings, not 3"


def test_a_missing_file():
    assert complaint("nowhere.toml") == "nowhere.toml: no such placement file"


def test_an_unknown_preset():
    said = complaint("tensort")
    assert said.startswith("unknown placement 'tensort'. Did you mean 'tensorrt'")
    assert "weights-only" in said
    assert "a file of your own ends in .toml" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include = 1" + "0" * 5000, "is not valid TOML: Exceeds the limit"),
        ("include = 0x" + "f" * 5000, "holds an integer of more than 64 bits"),
        ("include = " + "[" * 5000 + "]" * 5000, "nests too deep: write rules as [[rule]] tables"),
        ("include." + ".".join("a" * 5000) + " = 1", "nests more than 16 deep"),
        (rule(match=f'"{" | ".join(["Relu(a)"] * 3000)}"'), "the pattern is too large"),
    ],
)
def test_what_is_too_large_is_refused_in_one_line(write, text, message):
    path = write(text)
    said = complaint(path)
    assert said.startswith(path)
    assert message in said
    assert "\n" not in said


def test_a_name_that_the_pattern_also_reads_is_no_top(write):
    (read,) = load_placement(write(rule(match='"y := Add(a, b) | Relu(y)"', quantize='["y"]'))).rules
    assert read.quantize == (Selector("y"),)


def test_share_may_name_the_top(write):
    (read,) = load_placement(write(rule(match='"y := Add(a, b)"', share='["a", "y"]'))).rules
    assert read.share == (Selector("a"), Selector("y"))


def test_a_wrong_include_names_the_file_that_includes(write):
    path = write(include('"nowhere.toml"'))
    assert path in complaint(path)
    path = write(include('"tensort"'))
    assert path in complaint(path)


# ---- the shipped files -------------------------------------------------------------------------------------------


def test_the_shipped_files():
    assert presets() == (
        "tensorrt",
        "tensorrt-all-add-inputs",
        "tflite",
        "weights-only",
        "cases/attention-int8",
        "cases/efficientnet",
        "cases/inception",
        "cases/mobilenet",
        "cases/resnet-v1",
        "cases/resnet-v2",
    )


@pytest.mark.parametrize("preset", presets())
def test_every_reason_is_a_sentence(preset):
    for read in load_placement(preset).rules:
        assert read.because.endswith("."), read.name
        assert len(read.because.split()) > 3, read.name


@pytest.mark.parametrize("preset", presets())
def test_no_two_shipped_rules_have_one_name(preset):
    assert not [name for name in names(preset) if "#" in name]


@pytest.mark.parametrize("case", [name for name in presets() if name.startswith("cases/")])
def test_every_case_can_stand_before_the_default(case):
    assert names(f"{case},tensorrt")[0] == names(case)[0]
    assert set(names(f"{case},tensorrt")) == {*names(case), *names("tensorrt")}


def test_the_variant_with_all_add_inputs_is_one_rule_before_the_default():
    assert names("tensorrt-all-add-inputs") == ["all-add-inputs", *names("tensorrt")]
