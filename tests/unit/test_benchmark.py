"""The benchmarks' figures against hand-computed values, and whole runs over small engines."""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import app
from backend.benchmark.engine_session import open_engine
from backend.benchmark.lengths import (
    generate_lengths,
    is_kept,
    read_conversations,
    read_lengths,
)
from backend.benchmark.metrics import Summary, Timeline, latency_summaries, percentile
from backend.benchmark.profile_generation import Case, grid, measure, row
from backend.benchmark.profile_restful_api import (
    Outcome,
    arrival_times,
    meets,
    parse_goals,
    row as rate_row,
    send,
)
from backend.benchmark.profile_throughput import measure as measure_throughput
from backend.benchmark.report import format_value, without_keys
from backend.benchmark_result import BenchmarkResult
from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.inline import ThreadHandle
from backend.errors import RemoteError, UserError
from backend.target import BUNDLED_MODEL
from tests.fake_model import FakeRunner, fake_engine, fake_info

ROOT = Path(__file__).resolve().parents[2]
FAKE = partial(ThreadHandle, fake_engine)
# What a machine with a GPU that is only lent for figures may lack.
NOT_BESIDE_A_GPU = (
    "gradio", "fastapi", "uvicorn", "starlette", "pydantic", "openai", "platformdirs", "httpx2",
)  # fmt: skip
# Sent at 10.0; pieces of 1, 3 and 2 tokens.
TIMELINE = Timeline(10.0, 7, [(10.5, 1), (10.75, 3), (11.5, 2)])


# Figures


def test_percentiles_are_interpolated():
    assert percentile([40, 10, 30, 20], 50) == 25
    assert percentile([40, 10, 30, 20], 90) == pytest.approx(37)
    assert percentile([5], 99) == 5
    assert math.isnan(percentile([], 50))


def test_times_of_one_reply():
    assert (TIMELINE.output_tokens, TIMELINE.ttft, TIMELINE.e2e) == (6, 0.5, 1.5)
    assert TIMELINE.tpot == pytest.approx(1.0 / 5)
    assert TIMELINE.itl == [0.25, 0.75]
    assert TIMELINE.token_latencies == [0.25, 0.0, 0.0, 0.75, 0.0]


def test_tokens_beside_the_first_took_no_time():
    timeline = Timeline(0.0, 1, [(1.0, 3)])
    assert timeline.token_latencies == [0.0, 0.0] and timeline.itl == [] and timeline.tpot == 0.0
    assert Timeline(0.0, 1, [(1.0, 1)]).tpot is None


def test_a_servers_count_of_tokens_stands():
    timeline = Timeline(0.0, 1, [(1.0, 1), (2.0, 1)], reported_tokens=5)
    assert timeline.output_tokens == 5 and timeline.tpot == pytest.approx(0.25)


def test_summaries():
    assert Summary.of([1.0, 2.0, 3.0, 10.0]) == Summary(
        4.0, 2.5, pytest.approx(7.9), pytest.approx(9.79)
    )
    summaries = latency_summaries([TIMELINE, Timeline(0.0, 1, [(2.0, 1)])])
    assert summaries["TTFT"].mean == 1.25 and summaries["E2EL"].mean == 1.75
    assert summaries["TPOT"].mean == pytest.approx(0.2)  # one token has no such time
    assert summaries["ITL"].median == 0.5


def test_row_of_a_case():
    other = Timeline(20.0, 7, [(20.25, 1), (20.75, 5)])
    cells = row(Case(2, 7, 6), [TIMELINE, other], [30.0, 10.0, 20.0], [None, 2.5, 2.0], 0)
    assert (cells["tok/s"], cells["min"], cells["max"]) == (20.0, 10.0, 30.0)
    assert (cells["first_min_ms"], cells["first_max_ms"]) == (250, 500)
    assert cells["first_mean_ms"] == 375
    assert cells["p50_ms"] == 0 and cells["p99_ms"] == pytest.approx(727.5)
    assert cells["tok/event"] == 12 / 5 and cells["mem_gb"] == 2.5


def test_cells():
    assert [format_value(value) for value in (None, math.nan, 0.1234, 12.345, 1234.5, 7, "x")] == [
        "-", "-", "0.123", "12.35", "1234.5", "7", "x"
    ]


# Workloads


def test_a_report_keeps_keys_to_itself():
    words = ["benchmark", "profile_restful_api", "--api-key", "sk-1", "--api_key=sk-2", "--x"]
    shown = without_keys(words)
    assert "sk-" not in shown and shown.endswith("--api_key=*** --x")


def test_grid_pairs_lengths():
    assert grid([1, 8], [1, 128], [512]) == [
        Case(1, 1, 512), Case(8, 1, 512), Case(1, 128, 512), Case(8, 128, 512)
    ]
    assert grid([1], [1, 2], [3, 4]) == [Case(1, 1, 3), Case(1, 2, 4)]
    with pytest.raises(UserError, match="--prompt-tokens do not pair with 3"):
        grid([1], [1, 2], [3, 4, 5])


def test_committed_lengths_are_what_the_generator_gives():
    pairs = read_lengths(1000)
    assert pairs == generate_lengths()
    assert statistics.fmean(prompt for prompt, _ in pairs) == pytest.approx(226, abs=0.5)
    assert statistics.fmean(output for _, output in pairs) == pytest.approx(200, abs=0.5)
    assert all(is_kept(*pair) for pair in pairs)
    assert read_lengths(1002)[1000:] == pairs[:2]


def test_conversations(tmp_path: Path):
    def turns(*texts: str) -> dict:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    file = tmp_path / "chats.json"
    kept = [("abcdef", "12345"), ("ghijkl", "1234")]
    left_out = [("abc", "12345"), ("abcdef", "123"), ("x" * 1025, "1234"), ("abcde", "y" * 2044)]
    entries = [turns(*texts) for texts in [*kept, *left_out, ("alone",)]]
    file.write_text(json.dumps(entries))

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    found = read_conversations(str(file), encode, 2, seed=1)
    assert sorted(found) == [(prompt, list(prompt.encode()), len(o)) for prompt, o in kept]
    assert found == read_conversations(str(file), encode, 2, seed=1)
    with pytest.raises(UserError, match="has 2 conversations of fitting lengths, not 3"):
        read_conversations(str(file), encode, 3, seed=1)
    for broken in ("[", "{}x", '[{"conversations": [1, 2]}]', '["x"]', "7"):
        file.write_text(broken)
        with pytest.raises(UserError, match="not a list of conversations"):
            read_conversations(str(file), encode, 1, seed=1)


def test_arrivals():
    rng = random.Random(0)
    assert arrival_times(3, math.inf, 1.0, rng) == [0.0, 0.0, 0.0]
    times = arrival_times(4001, 5.0, 1.0, rng)
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert times[0] == 0 and statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)  # as in a Poisson process
    regular = arrival_times(101, 5.0, 1e6, rng)
    assert regular[100] == pytest.approx(20, rel=0.01)
    assert regular[50] == pytest.approx(10, rel=0.01)


# Load on a server


class FakeClient:
    """A server whose replies take a moment of the loop; time passes only by `sleep`."""

    def __init__(self) -> None:
        self.now, self.open, self.most_open = 100.0, 0, 0
        self.sent: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)  # what was started before goes first
        self.now += seconds

    async def complete(self, request: str) -> Timeline:
        self.sent.append(self.now)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        for _ in range(5):
            await asyncio.sleep(0)
        self.open -= 1
        if request == "bad":
            raise RemoteError("refused")
        return Timeline(self.sent[-1], 1, [(self.now, 1)])


class Bar:
    count = 0

    def update(self) -> None:
        self.count += 1


def load(requests: list[str], arrivals: list[float], most: int | None) -> tuple:
    client, bar = FakeClient(), Bar()
    outcome = asyncio.run(send(client, requests, arrivals, most, bar, client.sleep))
    assert bar.count == len(requests)
    return client, outcome


def test_requests_are_sent_when_they_arrive():
    client, outcome = load(["a", "bad", "b"], [0.0, 0.5, 2.0], None)
    assert client.sent == [100.0, 100.5, 102.0]
    assert len(outcome.timelines) == 2 and outcome.errors == ["refused"] and outcome.wall == 2.0


def test_concurrency_is_bounded():
    assert load(["a"] * 9, [0.0] * 9, 4)[0].most_open == 4
    assert load(["a"] * 9, [0.0] * 9, None)[0].most_open == 9


def test_goodput():
    goals = parse_goals(["ttft:500", "tpot:200.5"])
    assert goals == {"ttft": 0.5, "tpot": 0.2005}
    assert meets(TIMELINE, goals) and not meets(TIMELINE, {"e2el": 1.4})
    late = Timeline(0.0, 7, [(0.6, 1)])
    assert rate_row(math.inf, Outcome([TIMELINE, late], ["x"], 2.0), goals) == {
        "rate": "inf", "finished": 2, "failed": 1, "wall_s": 2.0, "req/s": 1.0,
        "output_tok/s": 3.5, "total_tok/s": 10.5, "goodput_req/s": 0.5,
    }
    for word in ("ttft", "x:1", "ttft:0", "ttft:nan"):
        with pytest.raises(UserError, match="--goodput"):
            parse_goals([word])


# Runs over an engine


def test_streams_of_one_length():
    async def work() -> dict:
        async with open_engine(EngineConfig("fake"), FAKE) as session:
            assert session.startup_s > 0
            sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            return await measure(session, Case(3, 4, 6), sampling, 1, 2, random.Random(0))

    cells = asyncio.run(work())
    assert (cells["concurrency"], cells["prompt"], cells["completion"]) == (3, 4, 6)
    assert cells["min"] <= cells["tok/s"] <= cells["max"]
    assert 0 < cells["first_min_ms"] <= cells["first_mean_ms"] <= cells["first_max_ms"]
    assert cells["tok/event"] == 1 and cells["mem_gb"] > 0


def test_mixed_lengths():
    async def work() -> tuple:
        async with open_engine(EngineConfig("fake"), FAKE) as session:
            args = argparse.Namespace(concurrency=2, temperature=0.0, top_p=1.0, top_k=0)
            requests = [([1, 2, 3], 4), ([5], 2), ([6, 7], 6)]
            return await measure_throughput(session, requests, args, "round 1")

    cells, summaries = asyncio.run(work())
    assert cells["requests"] == 3 and cells["output_tok/s"] == pytest.approx(12 / cells["wall_s"])
    assert cells["input_tok/s"] == pytest.approx(6 / cells["wall_s"])
    assert 1 <= cells["tok/step"] <= 2
    assert summaries["E2EL"].mean > summaries["TTFT"].mean > 0


def test_what_does_not_fit_and_what_fails_is_told():
    def damaged(config: EngineConfig) -> Engine:
        return Engine(FakeRunner(fake_info(), lambda sequence: -1))

    async def work() -> None:
        async with open_engine(EngineConfig("fake"), partial(ThreadHandle, damaged)) as session:
            with pytest.raises(UserError, match="more than the model's"):
                session.check_length(1 << 20)
            with pytest.raises(UserError, match="The engine failed a request"):
                await session.ask([1, 2], SamplingParams(max_tokens=4))

    asyncio.run(work())


def test_command_writes_table_and_csv(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "figures.csv"
    words = ["benchmark", "profile_generation", str(BUNDLED_MODEL), "--concurrency", "1", "2",
             "--completion-tokens", "4", "--rounds", "1", "--inline", "--csv", str(file)]
    assert app.main(words) == 0
    assert "startup_s:" in capfd.readouterr().out
    with file.open(encoding="utf-8", newline="") as rows:
        first, second = csv.DictReader(rows)
    assert (first["concurrency"], second["concurrency"], first["completion"]) == ("1", "2", "4")
    assert first["prefix_caching"] == "off" and first["commit"] and float(first["tok/s"]) > 0


def test_command_as_a_job_tells_events(capfd: pytest.CaptureFixture[str]):
    words = ["benchmark", "profile_generation", str(BUNDLED_MODEL), "--concurrency", "1", "2",
             "--completion-tokens", "4", "--rounds", "1", "--inline", "--progress", "json"]
    assert app.main(words) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [step["done"] for step in steps] == list(range(1, 7))
    assert {step["total"] for step in steps} == {6}
    result = BenchmarkResult()
    for event in events:
        result = result.plus(event) if event["event"] == "row" else result
    assert [row["concurrency"] for row in result.rows] == [1, 2]
    assert events[-1] == {"event": "result", "rows": result.rows, "trace": result.trace}
    first, second = csv.DictReader(io.StringIO(result.csv()))
    assert (first["concurrency"], second["concurrency"]) == ("1", "2") and first["device"] == "cpu"
    assert BenchmarkResult().csv() == ""
    assert app.main([*words, "--temperature", "9"]) == 2
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["event"] == "error" and "temperature" in last["message"]


def test_command_runs_mixed_lengths(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "chats.json"
    chat = {"conversations": [{"value": "What is a KV cache?"}, {"value": "It keeps the past."}]}
    file.write_text(json.dumps([chat] * 3))
    words = ["benchmark", "profile_throughput", str(BUNDLED_MODEL), "--num-prompts", "2",
             "--warmup-prompts", "0", "--dataset", str(file), "--inline"]
    assert app.main(words) == 0
    assert "TTFT" in capfd.readouterr().out


@pytest.mark.parametrize("words, told", [
    (["profile_generation"], "--random-weights"),
    (["profile_generation", "m", "--random-weights", "tiny"], "either a model or"),
    (["profile_generation", "m", "--quantization", "awq"], "--quantization"),
    (["profile_generation", "m", "--concurrency", "0"], "--concurrency"),
    (["profile_generation", "m", "--csv", "/nowhere/x.csv"], "/nowhere/x.csv"),
    (["profile_generation", "m", "--temperature", "9"], "temperature must be from 0.0 to 2.0"),
    (["profile_generation", "m", "--concurrency", "5000"], "--concurrency may be 4096"),
    (["profile_restful_api", "127.0.0.1:9", "--burstiness", "inf"], "--burstiness"),
    (["profile_throughput", "m", "--dataset", "/nowhere.json"], "m"),
    (["profile_restful_api", "127.0.0.1:9", "--prompt-tokens", "3"], "--completion-tokens"),
    (["profile_restful_api", "127.0.0.1:9", "--dataset", "x"], "--tokenizer"),
    (["profile_restful_api", "127.0.0.1:9", "--request-rate", "0"], "--request-rate"),
    (["profile_restful_api", "127.0.0.1:1"], "No server answers"),
])
def test_mistakes_are_one_sentence(words, told, capfd: pytest.CaptureFixture[str]):
    assert app.main(["benchmark", *words]) == 2
    assert told in capfd.readouterr().err


def test_random_weights_are_made_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["benchmark", "profile_generation", "--random-weights", "tiny", "--quantization", "awq",
             "--random-weights-dir", str(tmp_path), "--completion-tokens", "3", "--rounds", "1",
             "--inline", "--device", "cpu"]
    assert app.main(words) == 0
    weights = tmp_path / "tiny-awq-float16" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert app.main(words) == 0
    assert weights.stat().st_mtime_ns == before
    assert "awq" in capfd.readouterr().out
    words[3] = "no-shape"
    assert app.main(words) == 2 and "llama-2-7b" in capfd.readouterr().err


def test_engine_benchmarks_need_no_web_framework():
    code = (
        "import sys, app, backend.benchmark.profile_generation, "
        "backend.benchmark.profile_throughput; print(*sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(NOT_BESIDE_A_GPU) & set(run.stdout.split())


def test_benchmarks_run_where_only_the_engine_is_installed(tmp_path: Path):
    """Child processes too: what is missing there cannot be imported anywhere."""
    for name in NOT_BESIDE_A_GPU:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    beside = dict(PYTHONPATH=str(tmp_path), LMDESK_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    small = "--random-weights tiny --device cpu --kv-cache-tokens 512 --cases 1x1+3 --rounds 1"
    for line, told in (
        ("tests.bench.workspace --shape tiny", "| load of the workspace |"),
        (f"tests.bench.performance {small}", "1x1+3: "),
        ("tests.bench.memory --help", "--contexts"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", *line.split()], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | beside,
        )  # fmt: skip
        assert run.returncode == 0 and told in run.stdout, run.stderr
