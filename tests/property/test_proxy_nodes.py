"""How the proxy chooses nodes: plain code, under a clock and a die of the test's own."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import given, settings, strategies as st

from backend.errors import EngineNotReadyError, ModelNotFoundError, UserError
from backend.proxy_command import ProxyConfig
from backend.server.proxy.nodes import MAX_NODES, SAMPLE_SECONDS, STRATEGIES, Node, Nodes

SEEDS = st.integers(0, 1 << 32)


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(strategy: str, *nodes: Node, seed: int = 0) -> tuple[Nodes, Time]:
    time = Time()
    made = Nodes(strategy, clock=time, rng=random.Random(seed))
    for node in nodes:
        made.add(node)
    return made, time


def test_the_settings_name_the_strategies():
    choices = ProxyConfig.__dataclass_fields__["strategy"].metadata["choices"]
    assert set(choices) == set(STRATEGIES)


NODE = st.builds(
    lambda models, speed, unfinished, healthy: ("", models, speed, unfinished, healthy),
    st.sets(st.sampled_from("abc")), st.none() | st.floats(0.01, 1000), st.integers(0, 50),
    st.booleans())


@given(st.lists(NODE, max_size=6), st.sampled_from(sorted(STRATEGIES)), SEEDS, st.data())
@settings(max_examples=200, deadline=None)
def test_only_nodes_that_can_answer_are_chosen(found, strategy, seed, data):
    nodes, _ = make(strategy, seed=seed)
    for i, (_, models, speed, unfinished, healthy) in enumerate(found):
        node = Node(f"http://n{i}", tuple(sorted(models)), speed, healthy=healthy)
        nodes.add(node).unfinished = unfinished
    tried = data.draw(st.sets(st.sampled_from(list(nodes)))) if found else set()
    having = [n for n in nodes if "a" in n.models]
    known = any(n.models for n in nodes)
    left = [n for n in having if n.healthy and n not in tried]
    try:
        chosen = nodes.choose("a", list(tried))
    except ModelNotFoundError:
        assert known and not having and not tried
    except EngineNotReadyError:
        assert (having or not known) and not left and not tried
    else:
        assert (chosen in left) if left else (chosen is None and tried)


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.sampled_from([0.5, 1.0, 4.0])),
                min_size=1, max_size=6), SEEDS)
@settings(max_examples=200, deadline=None)
def test_the_least_expected_latency_is_the_least(loads, seed):
    nodes, _ = make("min_expected_latency", seed=seed)
    for i, (unfinished, speed) in enumerate(loads):
        nodes.add(Node(f"http://n{i}", ("m",), speed)).unfinished = unfinished
    known = [speed for _, speed in loads if speed]
    usual = sum(known) / len(known) if known else 1.0
    chosen = nodes.choose("m")
    cost = {n: (n.unfinished + 1) / (n.speed or usual) for n in nodes}
    assert cost[chosen] == min(cost.values())


def serve(nodes: Nodes, time: Time, seconds: dict[str, float], requests: int, open_: int
          ) -> Counter[str]:
    """Simulate `requests`, `open_` of them at a time; how many each node got. A node works on one
    after the other, each for its `seconds`."""
    got: Counter[str] = Counter()
    free = dict.fromkeys(seconds, 0.0)
    running: list[tuple[float, int, ExitStack, object]] = []

    def finish() -> None:
        time.now, _, stack, work = heapq.heappop(running)
        work.done()
        stack.close()

    for i in range(requests):
        while len(running) >= open_:
            finish()
        node = nodes.choose("m")
        assert node is not None
        stack = ExitStack()
        work = stack.enter_context(nodes.working(node))
        got[node.url] += 1
        free[node.url] = max(free[node.url], time.now) + seconds[node.url]
        heapq.heappush(running, (free[node.url], i, stack, work))
    while running:
        finish()
    assert all(node.unfinished == 0 for node in nodes)
    return got


SECONDS = {"http://slow": 4.0, "http://middle": 2.0, "http://fast": 1.0}


@pytest.mark.parametrize("strategy", ["min_expected_latency", "random"])
@pytest.mark.parametrize("seed", range(5))
def test_nodes_get_work_by_their_speed(strategy: str, seed: int):
    nodes, time = make(
        strategy, *(Node(url, ("m",), 1 / s) for url, s in SECONDS.items()), seed=seed)
    got = serve(nodes, time, SECONDS, 7000, 14)
    for url, share in zip(SECONDS, (1000, 2000, 4000)):
        assert abs(got[url] - share) < 150


@pytest.mark.parametrize("seed", range(5))
def test_equal_nodes_share_alike(seed: int):
    for strategy in STRATEGIES:
        nodes, time = make(strategy, *(Node(f"http://n{i}", ("m",)) for i in range(4)), seed=seed)
        got = serve(nodes, time, {node.url: 1.0 for node in nodes}, 4000, 8)
        assert all(got[node.url] > 600 for node in nodes), (strategy, got)


@given(SEEDS, st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_observed_latency_tries_every_node_and_prefers_the_fastest(seed, count, open_):
    seconds = {f"http://n{i}": 1.0 + i for i in range(count)}
    nodes, time = make("min_observed_latency", *(Node(u, ("m",)) for u in seconds), seed=seed)
    got = serve(nodes, time, seconds, 40, open_)
    assert set(got) == set(seconds)
    if open_ == 1:
        assert got["http://n0"] == 40 - (count - 1)


def test_a_node_that_was_slow_once_gets_another_chance():
    nodes, time = make("min_observed_latency", Node("http://a", ("m",)), Node("http://b", ("m",)))
    serve(nodes, time, {"http://a": 50.0, "http://b": 1.0}, 2, 1)
    quick = {"http://a": 0.1, "http://b": 1.0}
    assert serve(nodes, time, quick, 20, 1)["http://a"] == 0
    time.now += SAMPLE_SECONDS
    assert serve(nodes, time, quick, 20, 1)["http://a"] >= 18


def test_only_one_request_tries_an_unknown_node():
    nodes, time = make("min_observed_latency", Node("http://a", ("m",)), Node("http://b", ("m",)))
    with nodes.working(nodes.get("http://a")) as work:
        time.now += 1
        work.done()
    with nodes.working(nodes.choose("m")):
        assert nodes.get("http://b").unfinished == 1
        assert {nodes.choose("m").url for _ in range(20)} == {"http://a"}


def test_what_fails_says_nothing_of_the_speed():
    nodes, _ = make("min_observed_latency", Node("http://a", ("m",)))
    with pytest.raises(ValueError), nodes.working(nodes.get("http://a")):
        raise ValueError
    assert not nodes.get("http://a").latencies and not nodes.get("http://a").unfinished


def test_adding_again_changes_a_node_and_keeps_its_counts():
    nodes, _ = make("random", Node("http://a", ("m",), 1.0))
    with nodes.working(nodes.get("http://a")):
        nodes.add(Node("http://a", ("other",), 2.0))
        node = nodes.get("http://a")
        assert (node.models, node.speed, node.unfinished) == (("other",), 2.0, 1)
    nodes.remove("http://a")
    with pytest.raises(UserError):
        nodes.remove("http://a")
    for i in range(MAX_NODES):
        nodes.add(Node(f"http://n{i}"))
    with pytest.raises(UserError, match=str(MAX_NODES)):
        nodes.add(Node("http://one-more"))


def test_a_model_need_be_named_only_if_there_are_several():
    nodes, _ = make("random")
    with pytest.raises(EngineNotReadyError):
        nodes.choose(None)
    nodes.add(Node("http://a", ("m",)))
    assert nodes.choose(None).url == "http://a"
    nodes.add(Node("http://b", ("other",), healthy=False))
    with pytest.raises(UserError, match="m, other"):
        nodes.choose(None)
    with pytest.raises(EngineNotReadyError):
        nodes.choose("other")
    assert nodes.models() == ["m"]
