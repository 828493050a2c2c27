"""The verdict: right figures for known changes, and "failed" for what is broken."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from backend.errors import UserError
from backend.target import BUNDLED_MODEL
from backend.tokenizer import Tokenizer
from quantize import model_run
from quantize.evaluate import EvaluationSettings, evaluate, heldout_windows
from quantize.progress import Progress
from quantize.verdict import VERDICT_FILE, Comparison, Measured, bootstrap, judge
from tests.parity.test_logits import CPU, LONGROPE, ids_of
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import quantize_checkpoint

DEMO = str(BUNDLED_MODEL)
FEW = EvaluationSettings(tokens=1024, seqlen=128, device="cpu")
WHOLE = "model.safetensors"


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "tiny", "llama")
    return tmp_path / "tiny"


@pytest.fixture
def demo_4bit(tmp_path: Path) -> Path:
    """The bundled model in one file, rounded to 4 bits in groups of 128."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "demo-4bit", ignore=shutil.ignore_patterns(
        "train", "exam", "*.safetensors", "*.index.json")))
    tensors = {}
    for shard in sorted(Path(DEMO).glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file(tensors, folder / WHOLE)
    quantize_checkpoint(folder, 128)
    return folder


def test_a_models_nats_are_those_of_transformers(tiny):
    verdict = evaluate(str(tiny), settings=FEW, progress=quiet())
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    total, count = 0.0, 0
    for window in heldout_windows(Tokenizer.from_folder(tiny), FEW.tokens, FEW.seqlen):
        ids = torch.tensor(window.ids)
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert verdict.tokens == count
    assert verdict.model.nats == pytest.approx(total / count, abs=1e-5)
    assert verdict.against is None and verdict.comparison is None


def test_replies_are_those_of_transformers(tiny):
    verdict = evaluate(str(tiny), settings=FEW, progress=quiet())
    tokenizer = Tokenizer.from_folder(tiny)
    prompt = f"<|im_start|>user\n{verdict.prompts[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    assert verdict.model.replies[0] == tokenizer.decode(made[0, ids.shape[1]:].tolist())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_that_does_not_fit_is_run_block_by_block(tiny, monkeypatch, quantized):
    if quantized:
        quantize_checkpoint(tiny)
    whole = evaluate(str(tiny), settings=FEW, progress=quiet())
    monkeypatch.setattr(model_run, "free_bytes", lambda device: 1000)
    parts = evaluate(str(tiny), settings=FEW, progress=quiet())
    assert parts.model.nats == pytest.approx(whole.model.nats, abs=1e-5)
    assert parts.model.replies == (model_run.NO_REPLY,) * 3
    assert parts.model.memory_bytes == pytest.approx(whole.model.memory_bytes, rel=0.35)


@pytest.mark.parametrize("whole", [True, False])
def test_each_window_is_rotated_by_its_own_length(tmp_path, monkeypatch, whole):
    """longrope: those up to the original 64 tokens by the short factors, the others by the long."""
    rope = dict(rope_parameters=dict(LONGROPE), max_position_embeddings=128)
    reference = make_checkpoint(tmp_path, "llama", **rope)
    windows = [model_run.Window(0, ids_of(count).tolist()) for count in (30, 65, 66, 101, 2)]
    if not whole:
        monkeypatch.setattr(model_run, "free_bytes", lambda device: 1000)
    run = model_run.run_model(
        str(tmp_path), windows, CPU, torch.float32, quiet(), model_run.KVFormat())
    for window, hidden in zip(windows, run.hidden, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([window.ids[:-1]])).logits[0]
            torch.testing.assert_close(run.head(hidden), expected, atol=1e-4, rtol=0)
    if not whole:
        return
    tokenizer = Tokenizer.from_folder(tmp_path)
    for prompt, reply in zip(model_run.PROMPTS, run.replies, strict=True):
        ids = model_run.prompt_ids(str(tmp_path), tokenizer, prompt)
        assert len(ids) < 64 < len(ids) + model_run.REPLY_TOKENS  # each may cross the bound
        assert reply == tokenizer.decode(greedy(reference, ids, model_run.REPLY_TOKENS))


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens after `ids`, without a cache, or fewer if the reply ends."""
    said = list(ids)
    while len(said) < len(ids) + count:
        token = int(model(torch.tensor([said])).logits[0, -1].argmax())
        if token in (256, 258):  # as write_tokenizer has them
            break
        said.append(token)
    return said[len(ids):]


def test_a_model_against_itself(tiny):
    verdict = evaluate(str(tiny), str(tiny), FEW, quiet())
    assert verdict.passed and verdict.comparison is not None
    assert verdict.comparison.loss == verdict.comparison.low == verdict.comparison.high == 0.0
    assert verdict.comparison.mean_kl == pytest.approx(0.0, abs=1e-6)
    assert verdict.comparison.top1_agreement == 1.0


def test_four_bits_pass_and_shuffled_nibbles_fail(demo_4bit):
    settings = EvaluationSettings(tokens=2048, device="cpu")
    good = evaluate(str(demo_4bit), DEMO, settings, quiet())
    assert good.comparison is not None and good.comparison.loss < 0.2
    assert good.comparison.low <= good.comparison.loss <= good.comparison.high
    assert good.model.disk_bytes < good.against.disk_bytes

    tensors = load_file(demo_4bit / WHOLE)
    for name, words in tensors.items():
        if name.endswith(".qweight"):  # as if a writer had packed them in the order 0 1 2 ... 7
            nibbles = [(words >> (4 * i)) & 15 for i in range(8)]
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            shuffled = sum(
                nibbles[i].to(torch.int64) << (4 * place) for place, i in enumerate(order)
            )
            tensors[name] = shuffled.to(torch.uint32).view(torch.int32)
    save_file(tensors, demo_4bit / WHOLE)
    bad = evaluate(str(demo_4bit), DEMO, settings, quiet())
    assert not bad.passed and bad.sentence.startswith("Failed")
    assert bad.comparison is not None and bad.comparison.low > 1.0


def test_random_weights_alone_are_no_better_than_chance(tiny):
    verdict = evaluate(str(tiny), settings=FEW, progress=quiet())
    assert not verdict.passed and "no better than chance" in verdict.sentence


def test_other_vocabularies_are_refused(tiny):
    with pytest.raises(UserError, match="do not share a vocabulary"):
        evaluate(str(tiny), DEMO, FEW, quiet())


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        evaluate(str(tmp_path), settings=FEW, progress=quiet())


def test_windows_cover_both_languages_within_the_budget():
    tokenizer = Tokenizer.from_folder(DEMO)
    windows = heldout_windows(tokenizer, 4096, 100)
    assert sum(len(window.ids) for window in windows) <= 4096
    assert all(2 <= len(window.ids) <= 100 for window in windows)
    text = tokenizer.decode([i for window in windows for i in window.ids])
    assert "的" in text and " the " in text
    assert len({window.document for window in windows}) >= 20
    assert windows == heldout_windows(tokenizer, 4096, 100)


def test_the_interval_of_equal_documents_is_a_point_and_covers_a_known_mean():
    counts = torch.full((40,), 100.0, dtype=torch.float64)
    assert bootstrap(counts * 0.25, counts) == (0.25, 0.25)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap(counts * (0.02 + 0.01 * noise), counts)
    assert low < 0.02 < high and high - low < 0.01
    # Standard error of a mean of 40: 0.01 / sqrt(40); the interval is about 3.9 of them.
    assert high - low == pytest.approx(3.92 * 0.01 / math.sqrt(40), rel=0.3)


def verdict_of(loss: float, mean_kl: float = 0.01, nats: float = 3.0):
    original = Measured("/a/original", 3.0, 10, 10, "float32", ("x",), 1.0)
    model = Measured("/a/model", nats, 5, 10, "float32", ("y",), 1.0)
    comparison = Comparison(loss, loss - 0.01, loss + 0.01, mean_kl, 0.9)
    return judge(
        model, original, comparison, threshold=0.05, vocab_size=100, tokens=9, documents=1,
        text="a text", prompts=("p",),
    )


def test_the_threshold():
    assert verdict_of(0.05).passed and verdict_of(-0.3).passed
    assert not verdict_of(0.0501).passed
    assert "do not use it" in verdict_of(0.0501).sentence


@pytest.mark.parametrize("loss, mean_kl", [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.1)])
def test_what_is_not_a_number_fails(tmp_path, loss, mean_kl):
    verdict = verdict_of(loss, mean_kl, nats=math.nan)
    assert not verdict.passed
    verdict.write(str(tmp_path))
    said = json.loads((tmp_path / VERDICT_FILE).read_text())
    assert said["passed"] is False and said["model"]["nats"] is None
    assert [path.name for path in tmp_path.iterdir()] == [VERDICT_FILE]
    assert "Failed" in verdict.table()


def test_a_quantization_that_left_nan_is_refused(tiny):
    quantize_checkpoint(tiny)
    tensors = load_file(tiny / WHOLE)
    name = next(n for n in tensors if n.endswith(".scales"))
    tensors[name][0, 0] = math.nan
    save_file(tensors, tiny / WHOLE)
    with pytest.raises(UserError, match="NaN"):
        evaluate(str(tiny), settings=FEW, progress=quiet())
