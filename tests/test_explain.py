import qdq_surgeon
from qdq_surgeon.model import load
from qdq_surgeon.report.explain import explain
from tests.graphs import model


class CountedPlan:
    """A plan that counts how often its lists are asked for."""

    def __init__(self, plan):
        self._plan = plan
        self.asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self._plan, name)


def test_all_nodes_are_explained_from_one_reading_of_the_plan():
    chain = "g (float[4] x) => (y) { a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c) }"
    loaded = load(model(chain))
    plan = CountedPlan(qdq_surgeon.plan(loaded))
    assert explain(plan, loaded.graph, "*").count("\n\n") == 3
    assert sorted(plan.asked) == ["because", "kept", "misses", "sites"]
