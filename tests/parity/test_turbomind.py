"""The tutorials' Python integration, by their own snippet and on the engine's own terms."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backend import turbomind as tm
from backend.engine.types import StepOutput
from backend.errors import UserError
from backend.messages import EngineGenerationConfig, ResponseType
from tests.parity.test_engine import drain, engine_for, made
from tests.tiny_model import make_checkpoint

GREEDY = dict(top_k=0, top_p=1.0, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("turbomind")
    make_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def tm_model(folder) -> Iterator[tm.TurboMind]:
    with tm.TurboMind.from_pretrained(
        str(folder), dtype="float32", device="cpu", session_len=4000, kv_cache_tokens=8192
    ) as model:
        yield model


def last(outputs: Iterator) -> list[tuple[torch.Tensor, int]]:
    return list(outputs)[-1]


def expected(folder: Path, prompt: list[int], count: int) -> list[int]:
    engine = engine_for(folder)
    request = made(0, prompt)
    engine.add_request(request)
    return drain(engine)[0][:count]


def test_the_snippet_of_the_tutorial(tm_model):
    generator = tm_model.create_instance()
    query = "你好啊兄嘚"
    prompt = tm_model.model.get_prompt(query)
    input_ids = tm_model.tokenizer.encode(prompt)
    for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids]):
        res, tokens = outputs[0]
    response = tm_model.tokenizer.decode(res.tolist())
    assert isinstance(response, str) and tokens == len(res) > 0
    assert prompt == f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
    assert input_ids[0] == 257 and res.dtype == torch.int64


def test_greedy_tokens_whole_and_as_they_come(tm_model, folder):
    prompt = [5, 6, 7, 8]
    reply = expected(folder, prompt, 12)
    generator = tm_model.create_instance()
    options = dict(request_output_len=12, ignore_eos=True, **GREEDY)
    whole = list(generator.stream_infer(1, [prompt], **options))
    assert len(whole) == 1 and whole[0][0][0].tolist() == reply
    steps = list(generator.stream_infer(1, torch.tensor(prompt), stream_output=True, **options))
    numbers = [step[0][1] for step in steps]
    assert numbers == sorted(numbers) and numbers[0] < 12 == numbers[-1]
    assert all(step[0][0].tolist() == reply[: step[0][1]] for step in steps)


def test_with_a_gen_config_it_yields_what_lmdeploy_0_2_does(tm_model, folder):
    prompt = [5, 6, 7, 8]
    reply = expected(folder, prompt, 12)
    generator = tm_model.create_instance()
    config = EngineGenerationConfig(max_new_tokens=12, ignore_eos=True)  # greedy by default
    [(status, token_ids, count)] = generator.stream_infer(3, prompt, gen_config=config)
    assert (status, token_ids, count) == (ResponseType.FINISH, reply, 12)
    steps = list(generator.stream_infer(3, prompt, gen_config=config, stream_output=True))
    assert [s.status for s in steps[:-1]] == [ResponseType.SUCCESS] * (len(steps) - 1)
    assert all(s.token_ids == reply[: s.num_token] for s in steps) and len(steps) > 2
    config.stop_words = [next(t for t in reply if t != reply[0])]
    stopped = list(generator.stream_infer(3, prompt, gen_config=config))[-1].token_ids
    assert stopped == reply[: reply.index(config.stop_words[0])]
    config.stop_words, config.bad_words = None, [reply[0]]
    assert reply[0] not in list(generator.stream_infer(3, prompt, gen_config=config))[-1].token_ids
    config.n = 2
    with pytest.raises(UserError, match="n must be 1, not 2"):
        list(generator.stream_infer(3, prompt, gen_config=config))
    with pytest.raises(UserError, match="for one prompt"):
        list(generator.stream_infer([3, 4], [prompt, prompt], gen_config=config))


@pytest.mark.parametrize("said, kept", [
    ("Hello\n", "Hello\n"), ("Hello\nUSER: more", "Hello\n"), ("A US\nUSE", "A US\nUSE"),
    ("USER:", ""), ("好US好USER:好", "好US好"),
])  # fmt: skip
def test_a_text_of_several_tokens_ends_a_reply(tm_model, monkeypatch, said, kept):
    """As chat templates have it whose turns end by a text that is no token."""
    ids = tm_model.tokenizer.encode(tm.Prompt(said))

    async def generate(request):
        for token_id in ids:
            yield StepOutput(request.request_id, [token_id])
        yield StepOutput(request.request_id, [256], "stop")

    monkeypatch.setattr(tm_model._service.engine, "generate", generate)
    monkeypatch.setattr(tm_model._service, "stop", ("USER:",))
    generator = tm_model.create_instance()
    steps = [step[0][0].tolist() for step in generator.stream_infer(4, [5], stream_output=True)]
    assert tm_model.tokenizer.decode(steps[-1]) == kept
    assert all(step == steps[-1][: len(step)] for step in steps)  # nothing was taken back
    assert len(steps) > len(kept) / 2
    assert tm_model._sessions[4].token_ids == [5, *steps[-1]]
    whole = list(generator.stream_infer(4, [5], ignore_eos=True))[-1][0][0].tolist()
    assert tm_model.tokenizer.decode(whole) == said


def test_several_prompts_at_once(tm_model, folder):
    prompts = [[5, 6, 7, 8], [9] * 20]
    outputs = last(tm_model.create_instance().stream_infer(
        [1, 2], prompts, request_output_len=8, ignore_eos=True, **GREEDY))
    assert [res.tolist() for res, _ in outputs] == [expected(folder, p, 8) for p in prompts]
    for ids, words in (([1], "2 prompts for 1 sessions"), ([1, 1], "of its own")):
        with pytest.raises(UserError, match=words):
            list(tm_model.create_instance().stream_infer(ids, prompts))


def test_a_session_goes_on_steps_back_and_ends(tm_model, folder):
    generator = tm_model.create_instance()
    options = dict(request_output_len=4, ignore_eos=True, **GREEDY)

    def say(ids: list[int], **more) -> list[int]:
        return last(generator.stream_infer(7, ids, **{**options, **more}))[0][0].tolist()

    first = say([5, 6, 7])
    second = say([8, 9], sequence_start=False)
    assert second == expected(folder, [5, 6, 7, *first, 8, 9], 4)
    again = say([8, 9], sequence_start=False, step=7, sequence_end=True)
    assert again == second
    with pytest.raises(UserError, match="no session 7"):
        say([1], sequence_start=False)
    with pytest.raises(UserError, match="has 0 tokens, not 3"):
        say([1], step=3)
    with pytest.raises(UserError, match="the context holds 4000"):
        say([1] * 5000)
    with pytest.raises(UserError, match="outside the vocabulary"):
        say([1 << 20])


def test_another_thread_stops_a_reply_and_its_tokens_stay(tm_model):
    generator, other = tm_model.create_instance(), tm_model.create_instance()
    options = dict(request_output_len=3000, ignore_eos=True, stream_output=True, **GREEDY)
    seen = []
    for outputs in generator.stream_infer(9, [5, 6, 7], **options):
        seen.append(outputs[0][1])
        if len(seen) == 3:
            with pytest.raises(UserError, match="Session 9 is busy"):
                next(other.stream_infer(9, [1], **options))
            thread = threading.Thread(target=lambda: list(other.stream_infer(9, [], stop=True)))
            thread.start()
            thread.join()
    assert seen[-1] < 3000
    kept = tm_model._sessions[9].token_ids
    assert kept[:3] == [5, 6, 7] and len(kept) == 3 + seen[-1]
    list(other.stream_infer(9, [], stop=True, sequence_end=True))
    assert 9 not in tm_model._sessions


def test_a_reply_that_nobody_waits_for_is_aborted(tm_model):
    generator = tm_model.create_instance()
    outputs = generator.stream_infer(3, [5], request_output_len=3000, ignore_eos=True,
                                     stream_output=True, **GREEDY)
    next(outputs)
    outputs.close()
    assert tm_model._sessions[3].running is None
    assert last(generator.stream_infer(3, [5], request_output_len=2, **GREEDY))


def test_prompts_of_later_turns(tm_model):
    model = tm_model.model
    later = model.get_prompt("more", sequence_start=False)
    assert later == "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    whole = model.messages2prompt([
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "more"}])
    assert whole == model.get_prompt("one") + "two" + later


def test_options(folder):
    with pytest.raises(UserError, match="no option sesion_len. Did you mean session_len?"):
        tm.TurboMind.from_pretrained(str(folder), sesion_len=64)
    with pytest.raises(UserError, match="a server, not a model"):
        tm.TurboMind.from_pretrained("http://127.0.0.1:23333")
    with pytest.raises(UserError, match="no 4-bit weights"):
        tm.TurboMind.from_pretrained(str(folder), model_format="awq")
    with pytest.raises(UserError, match="no model folder"):
        tm.TurboMind.from_pretrained(str(folder / "typo"))
    with tm.TurboMind.from_pretrained(
        str(folder), model_name="internlm-chat-20b", session_len=64, kv_cache_tokens=256
    ) as model:
        assert (model.model_name, model.session_len) == ("internlm-chat-20b", 64)
        assert "<|User|>:hi\n<|Bot|>:" in model.model.get_prompt("hi")
        generator = model.create_instance()
        outputs = generator.stream_infer(0, [5, 6, 7], 10_000, ignore_eos=True, **GREEDY)
        assert last(outputs)[0][1] == 61  # what the context leaves
