"""Small models and data for the tests of feeds. Tests say `from tests.calibration.feeding import ...`."""

import numpy as np

from qdq_surgeon.calibration.feeds import read_data
from qdq_surgeon.model import load
from tests.graphs import model

OPEN = "g (float[N,3] x) => (y) { y = Relu(x) }"
BATCH_OF_1 = "g (float[1,3] x) => (y) { y = Relu(x) }"
BATCH_OF_4 = "g (float[4,3] x) => (y) { y = Relu(x) }"
UNKNOWN_RANK = "g (float[] x) => (y) { y = Relu(x) }"
IDS = "g (int64[N,5] ids) => (y) { y = Cast<to=1>(ids) }"
IDS_AND_MASK = "g (int64[N,5] ids, float[N,5] mask) => (y) { f = Cast<to=1>(ids)\n y = Mul(f, mask) }"
TOKENS = "g (int64[N,L] ids, int64[N,L] mask) => (y) { y = Mul(ids, mask) }"
IMAGES = "g (float[N,16,8,8] x) => (y) { y = Relu(x) }"


def rows(count, width=3):
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def opened(text, data, preprocessing=None):
    return read_data(data, load(model(text)), preprocessing)


def batches(text, data, preprocessing=None):
    return list(opened(text, data, preprocessing).batches)


def sizes(text, data):
    return [batch.samples for batch in batches(text, data)]


def fed(text, data, name):
    """All that one input is fed, joined along axis 0."""
    return np.concatenate([batch.feed[name] for batch in batches(text, data)])
