"""Whatever gives batches one by one is read one by one, and what is for which input is never guessed."""

import itertools

import numpy as np
import pytest

from qdq_surgeon.errors import DataError
from tests.calibration.feeding import BATCH_OF_1, BATCH_OF_4, IDS_AND_MASK, OPEN, TOKENS, batches, fed, opened, rows

IDS_ROW = np.arange(5)
STEPS = "g (int64[N] step, float[N,3] x) => (y, z) { y = Relu(x)\n z = Neg(step) }"


class Tensor:
    """As a torch tensor: what needs a gradient must be detached first, and what is on a GPU moved to the CPU."""

    def __init__(self, array, requires_grad=True, device="cuda"):
        self._array, self.requires_grad, self.device = array, requires_grad, device

    def detach(self):
        return Tensor(self._array, False, self.device)

    def cpu(self):
        return Tensor(self._array, self.requires_grad, "cpu")

    def _exported(self):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if self.device != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self._array

    def __array__(self, dtype=None, copy=None):
        return self._exported()

    def __dlpack__(self, **options):
        return self._exported().__dlpack__(**options)

    def __dlpack_device__(self):
        return self._exported().__dlpack_device__()


# ---- what an item may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(lambda x: {"x": x}, id="a mapping"),
        pytest.param(lambda x: x, id="an array"),
        pytest.param(lambda x: Tensor(x), id="a tensor"),
        pytest.param(lambda x: {"x": Tensor(x)}, id="a mapping of tensors"),
        pytest.param(lambda x: (x, np.zeros(len(x))), id="images and labels"),
        pytest.param(lambda x: [x, np.zeros(len(x))], id="images and labels in a list, as a DataLoader collates them"),
        pytest.param(lambda x: (Tensor(x), Tensor(np.zeros(len(x)))), id="tensors of images and labels"),
        pytest.param(lambda x: (x, ["cat"] * len(x), 7), id="images and what is no array"),
        pytest.param(lambda x: (x,), id="a tuple of one"),
        pytest.param(lambda x: ({"x": x}, np.zeros(len(x))), id="a mapping and labels, as Keras has them"),
    ],
)
def test_a_model_with_one_input_takes(item):
    x = rows(6)
    np.testing.assert_array_equal(fed(OPEN, (item(part) for part in np.split(x, 3)), "x"), x)


def test_a_tensor_may_be_the_data():
    np.testing.assert_array_equal(fed(OPEN, Tensor(rows(6)), "x"), rows(6))
    np.testing.assert_array_equal(fed(OPEN, {"x": Tensor(rows(6))}, "x"), rows(6))


def test_a_torch_data_loader_is_data():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(rows(6)).requires_grad_(), torch.arange(6))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    np.testing.assert_array_equal(fed(OPEN, loader, "x"), rows(6))
    np.testing.assert_array_equal(fed(OPEN, dataset, "x"), rows(6))


def test_a_tuple_serves_several_inputs_where_types_and_shapes_leave_no_choice():
    item = (np.ones((2, 5), np.int64), rows(2, 5), np.zeros(2, np.int64))
    (batch,) = batches(IDS_AND_MASK, [item])
    np.testing.assert_array_equal(batch.feed["ids"], item[0])
    np.testing.assert_array_equal(batch.feed["mask"], item[1])


@pytest.mark.parametrize(
    ("text", "item"),
    [
        pytest.param(TOKENS, (np.ones((2, 5), int), np.ones((2, 5), int)), id="two elements that are alike"),
        pytest.param(IDS_AND_MASK, (np.ones((2, 5), int), rows(2, 5), rows(2, 5)), id="a third that is alike"),
        pytest.param(IDS_AND_MASK, (rows(2, 5), np.ones((2, 5), int)), id="another order than the model's"),
        pytest.param(IDS_AND_MASK, (np.ones((2, 5), int),), id="too few"),
        pytest.param(IDS_AND_MASK, (np.ones((2, 5), int), np.ones((2, 5))), id="another type"),
        pytest.param(IDS_AND_MASK, np.ones((2, 2, 5)), id="one array"),
        pytest.param(IDS_AND_MASK, "ids", id="text"),
        pytest.param(IDS_AND_MASK, [], id="nothing"),
    ],
)
def test_where_a_choice_is_left_the_expression_to_write_is_shown(text, item):
    with pytest.raises(
        DataError, match=r"batch 0 is a .*: give one mapping .* \(\{'ids': .*, 'mask': .*\} for item in data\)"
    ):
        batches(text, [item])


@pytest.mark.parametrize(
    ("text", "item", "expression"),
    [
        (TOKENS, (np.ones((2, 5), int), np.ones((2, 5), int)), "({'ids': item[0], 'mask': item[1]} for item in data)"),
        (
            TOKENS,
            (7, np.ones((2, 5), int), np.ones((2, 5), int)),
            "({'ids': item[1], 'mask': item[2]} for item in data)",
        ),
        (OPEN, (7, rows(2)), "({'x': item[1]} for item in data)"),
        (OPEN, [[1.0, 2.0, 3.0]], "({'x': item} for item in data)"),
        (TOKENS, 7, "({'ids': ..., 'mask': ...} for item in data)"),
    ],
)
def test_the_expression_shown_names_inputs_and_elements(text, item, expression):
    with pytest.raises(DataError) as error:
        batches(text, [item])
    assert expression in str(error.value)


# ---- samples without a batch axis --------------------------------------------------------------------------


def test_rows_of_a_dataset_get_the_batch_axis():
    data = [{"ids": [1, 2, 3], "mask": [1, 1, 1], "label": 7}, {"ids": [4, 5], "mask": [1, 0], "label": 8}]
    assert [batch.feed["ids"].tolist() for batch in batches(TOKENS, data)] == [[[1, 2, 3]], [[4, 5]]]


def test_single_numbers_get_the_batch_axis():
    given = batches(STEPS, ({"step": step, "x": row} for step, row in enumerate(rows(3))))
    assert [batch.feed["step"].tolist() for batch in given] == [[0], [1], [2]]
    assert [batch.samples for batch in given] == [1, 1, 1]


def test_a_batch_of_one_gets_the_batch_axis():
    assert [batch.feed["x"].shape for batch in batches(BATCH_OF_1, iter(rows(3)))] == [(1, 3)] * 3


def test_one_sample_is_no_batch_of_four():
    with pytest.raises(DataError, match=r"batch 0: 'x' has shape \[3\], but the model wants \[4, 3\]"):
        batches(BATCH_OF_4, iter(rows(4)))


def test_sequences_may_have_different_lengths():
    data = ({"ids": np.ones((2, length), int), "mask": np.ones((2, length), int)} for length in (3, 9, 4))
    assert [batch.feed["ids"].shape for batch in batches(TOKENS, data)] == [(2, 3), (2, 9), (2, 4)]


# ---- how far, and what goes wrong --------------------------------------------------------------------------


def test_a_stream_is_read_no_further_than_its_batches_are_asked_for():
    taken = []

    def stream():
        for index in itertools.count():
            taken.append(index)
            yield {"x": rows(2)}

    given = opened(OPEN, stream()).batches
    assert taken == []
    next(given)
    assert taken == [0]
    next(given)
    assert taken == [0, 1]


def test_an_error_of_the_stream_comes_through_as_it_is():
    class NoSuchImageError(Exception):
        pass

    def stream():
        yield rows(2)
        raise NoSuchImageError("cat.png")

    given = opened(OPEN, stream()).batches
    next(given)
    with pytest.raises(NoSuchImageError, match=r"cat\.png"):
        next(given)


def test_a_tensor_that_cannot_be_read_says_why():
    class Stubborn(Tensor):
        def detach(self):
            return self

        def cpu(self):
            return self

    with pytest.raises(DataError, match=r"batch 0: 'x' cannot be read as an array .*requires grad"):
        batches(OPEN, [{"x": Stubborn(rows(2))}])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"y": rows(2)}, "batch 1 has no 'x'"),
        ({"x": rows(2).astype(complex)}, "batch 1: 'x' holds complex"),
        (rows(2, 4), r"batch 1: 'x' has shape \[2, 4\]"),
        (rows(0), "batch 1: 'x' is empty"),
        ((np.full((2, 3), np.nan), 7), "batch 1: 'x' holds NaN"),
        ({"x": None}, "batch 1: 'x' holds object"),
    ],
)
def test_an_item_that_does_not_fit_is_refused_with_its_number(item, message):
    given = opened(OPEN, [rows(2), item]).batches
    next(given)
    with pytest.raises(DataError, match=message):
        next(given)
