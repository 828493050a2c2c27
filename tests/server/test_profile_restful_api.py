"""profile_restful_api against the real server."""

from __future__ import annotations

import asyncio
import csv
import time
from pathlib import Path

import pytest

import app
from backend.benchmark.api_client import ApiClient, Completion, first_model, http_client
from backend.errors import RemoteError
from tests.server.support import NAME, Served, serve


def benchmark(served: Served, *words: str) -> int:
    return app.main(["benchmark", "profile_restful_api", served.url, *words])


@pytest.mark.parametrize("form", ["ids", "text"])
def test_rates_have_rows(served: Served, form: str, tmp_path: Path):
    file = tmp_path / "rates.csv"
    assert benchmark(
        served, "--num-prompts", "6", "--prompt-tokens", "5", "--completion-tokens", "4",
        "--sweep", "200", "inf", "--max-concurrency", "2", "--prompt-form", form,
        "--goodput", "ttft:60000", "tpot:60000", "--csv", str(file),
    ) == 0
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["rate"] for row in rows] == ["200.0", "inf"]
    for row in rows:
        assert (row["finished"], row["failed"], row["model"]) == ("6", "0", NAME)
        assert float(row["output_tok/s"]) == pytest.approx(4 * float(row["req/s"]))
        assert row["goodput_req/s"] == row["req/s"]
        assert 0 < float(row["ttft_mean_ms"]) <= float(row["e2el_mean_ms"])


def test_tokens_are_counted_by_the_server(served: Served):
    """Its usage tells them: bytes of one character come in one piece, or in none."""
    async def work() -> None:
        async with http_client(served.url, "") as http:
            client = ApiClient(http, await first_model(http), time.perf_counter)
            snowman = list("☃a".encode())
            timeline = await client.complete(Completion(snowman, 4))
            assert (timeline.prompt_tokens, timeline.output_tokens) == (4, 4)
            assert len(timeline.events) == 2
            silent = await client.complete(Completion([257], 3))  # nothing but end tokens
            assert silent.output_tokens == 3 and len(silent.events) == 1
            with pytest.raises(RemoteError, match="400"):
                await client.complete(Completion([1], 0))

    asyncio.run(work())


def test_key(capfd: pytest.CaptureFixture[str]):
    with serve(api_keys=("secret",)) as served:
        words = ["--num-prompts", "2", "--prompt-tokens", "3", "--completion-tokens", "2"]
        assert benchmark(served, *words) == 2
        assert "--api-key" in capfd.readouterr().err
        assert benchmark(served, *words, "--api-key", "secret") == 0


def test_a_failed_engine_is_told(served: Served, capfd: pytest.CaptureFixture[str]):
    async def work() -> None:
        async with http_client(served.url, "") as http:
            client = ApiClient(http, NAME, time.perf_counter)
            with pytest.raises(RemoteError):
                await client.complete(Completion(list(b"damaged"), 4))

    asyncio.run(work())
