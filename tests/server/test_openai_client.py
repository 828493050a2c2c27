"""OpenAI's own client against the server: what it parses is what it is meant to."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai import AsyncOpenAI

from tests.server.support import NAME, Served


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def stream_text(chunks) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
    return texts


def test_models(served: Served):
    client = served.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match=f'has "{NAME}"'):
        client.models.retrieve("gpt-4o")


def test_chat(served: Served):
    reply = served.client().chat.completions.create(model=NAME, messages=user("Grüße, 世界 🌍"))
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert reply.model == NAME
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Grüße, 世界 🌍"
    assert choice.finish_reason == "stop" and choice.logprobs is None
    size = len("Grüße, 世界 🌍".encode())
    assert reply.usage.prompt_tokens == size
    assert reply.usage.completion_tokens == size + 1  # the end token counts
    assert reply.usage.total_tokens == 2 * size + 1


def test_a_begun_reply_goes_on(served: Served):
    messages = [*user("ab"), {"role": "assistant", "content": "cd"}]
    create = served.client().chat.completions.create
    reply = create(model=NAME, messages=messages, extra_body={
        "continue_final_message": True, "add_generation_prompt": False})
    assert reply.choices[0].message.content == "abcd"  # the model echoes what it is given
    for body, sentence in (({"continue_final_message": True}, "can be continued"),
                           ({"add_generation_prompt": False}, "the opposite")):
        with pytest.raises(openai.BadRequestError, match=sentence):
            create(model=NAME, messages=user("ab"), extra_body=body)


def test_ids_are_unique(served: Served):
    client = served.client()
    ids = {client.chat.completions.create(model=NAME, messages=user("a")).id for _ in range(5)}
    assert len(ids) == 5


def test_chat_stream_says_the_same(served: Served):
    text = "Ein Satz, 一句话, and one more 🙂."
    with served.client().chat.completions.create(
            model=NAME, messages=user(text), stream=True) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert stream_text(chunks) == {0: text}
    assert "\ufffd" not in stream_text(chunks)[0]
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_on_the_wire(served: Served):
    body = {"messages": user("ab"), "stream": True, "stream_options": {"include_usage": True}}
    with served.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    events = reply.text.split("\n\n")
    assert events.pop() == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-1])
    assert all('"usage":null' in event for event in events[:-2])


def test_line_separators_do_not_break_events(served: Served):
    text = "a\u2028b\u0085c\x0bd\r\ne\x00f"
    with served.http() as http:
        body = {"messages": user(text), "stream": True}
        lines = http.post("/v1/chat/completions", json=body).text.splitlines()
    assert all(line.startswith("data: ") for line in lines if line)
    chunks = served.client().chat.completions.create(
        model=NAME, messages=user(text), stream=True)
    assert stream_text(chunks) == {0: text}


def test_usage_chunk_comes_last(served: Served):
    chunks = list(served.client().chat.completions.create(
        model=NAME, messages=user("hello"), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 5 and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


def test_cached_tokens_are_told(served: Served):
    messages = user("the same long beginning " * 8)
    client = served.client()
    client.chat.completions.create(model=NAME, messages=messages)
    again = client.chat.completions.create(model=NAME, messages=messages)
    assert 100 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_n_replies_differ_by_seed_and_are_repeatable(served: Served, stream: bool):
    def texts() -> list[str]:
        reply = served.client().chat.completions.create(
            model=NAME, messages=user("random"), n=4, seed=7, stream=stream)
        if stream:
            return [text for _, text in sorted(stream_text(reply).items())]
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert reply.usage.prompt_tokens == 6  # the prompt counts once
        assert reply.usage.completion_tokens == 4 * 21
        return [choice.message.content for choice in reply.choices]

    first = texts()
    assert len(set(first)) == 4 and first == texts()
    second = served.client().chat.completions.create(
        model=NAME, messages=user("random"), seed=8).choices[0].message.content
    assert second == first[1]


def test_a_seed_and_its_negative_differ(served: Served):
    reply = served.client().chat.completions.create(
        model=NAME, messages=user("random"), n=3, seed=-1)  # these are -1, 0 and 1
    assert len({choice.message.content for choice in reply.choices}) == 3


def test_the_largest_seed_has_neighbours_too(served: Served):
    reply = served.client().chat.completions.create(
        model=NAME, messages=user("random"), n=2, seed=(1 << 63) - 1)
    assert len({choice.message.content for choice in reply.choices}) == 2


@pytest.mark.parametrize("stop", ["lo w", ["zzz", "lo w"], ["o w", "lo w"]])
def test_stop_strings_never_show(served: Served, stop):
    client = served.client()
    reply = client.chat.completions.create(model=NAME, messages=user("hello world"), stop=stop)
    assert reply.choices[0].message.content == "hel"
    assert reply.choices[0].finish_reason == "stop"
    assert stream_text(client.chat.completions.create(
        model=NAME, messages=user("hello world"), stop=stop, stream=True)) == {0: "hel"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_the_length_limit_brings_out(served: Served, stream: bool):
    """ "lo there" might still come, and it begins before "o"; then the limit ends the reply."""
    client = served.client()
    reply = client.chat.completions.create(
        model=NAME, messages=user("hello world"), stop=["lo there", "o"], max_tokens=6,
        stream=stream)
    choices = [c for chunk in reply for c in chunk.choices] if stream else reply.choices
    assert choices[-1].finish_reason == "stop"
    text = "".join((c.delta if stream else c.message).content or "" for c in choices)
    assert text == "hell"


def test_stop_false_means_none(served: Served):
    reply = served.client().chat.completions.create(
        model=NAME, messages=user("hi"), extra_body={"stop": False})
    assert reply.choices[0].message.content == "hi"


def test_max_tokens_ends_by_length(served: Served):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = served.client().chat.completions.create(
            model=NAME, messages=user("hello"), **{name: 3})
        assert reply.choices[0].message.content == "hel"
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 3


def test_chat_logprobs(served: Served):
    request = dict(model=NAME, messages=user("hi"), logprobs=True, top_logprobs=2)
    reply = served.client().chat.completions.create(**request)
    content = reply.choices[0].logprobs.content
    assert [(t.token, t.bytes, t.logprob) for t in content] == [
        ("h", [104], 0.0), ("i", [105], 0.0)]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("h", 0.0), ("\x00", -30.0)]
    streamed = []
    for chunk in served.client().chat.completions.create(**request, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content


def test_completion_logprobs_and_offsets(served: Served):
    reply = served.client().completions.create(model=NAME, prompt="a你b", logprobs=1)
    found = reply.choices[0].logprobs
    assert found.tokens[0] == "a" and found.tokens[-1] == "b"
    assert found.text_offset == [0, 1, 1, 1, 2]
    assert found.top_logprobs[0] == {"a": 0.0}
    assert found.token_logprobs == [0.0] * 5


@pytest.mark.parametrize("prompt", ["hello", [104, 101, 108, 108, 111], ["hello"],
                                    [[104, 101, 108, 108, 111]]])
def test_completion_takes_four_forms_of_prompt(served: Served, prompt):
    reply = served.client().completions.create(model=NAME, prompt=prompt)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert [choice.text for choice in reply.choices] == ["hello"]


@pytest.mark.parametrize("stream", [False, True])
def test_completion_of_several_prompts_with_echo(served: Served, stream: bool):
    reply = served.client().completions.create(
        model=NAME, prompt=["ab", "cde"], n=2, echo=True, stream=stream)
    texts = stream_text(reply) if stream else {c.index: c.text for c in reply.choices}
    assert texts == {0: "abab", 1: "abab", 2: "cdecde", 3: "cdecde"}


def test_completion_echoes_token_ids_as_text(served: Served):
    reply = served.client().completions.create(
        model=NAME, prompt=list("你好".encode()), echo=True)
    assert reply.choices[0].text == "你好你好"


def test_completion_has_16_tokens_by_default(served: Served):
    for extra in ({}, {"extra_body": {"max_tokens": None}}):
        reply = served.client().completions.create(model=NAME, prompt="x" * 40, **extra)
        assert reply.choices[0].text == "x" * 16
        assert reply.choices[0].finish_reason == "length"


def test_text_parts_and_a_sent_back_reply(served: Served):
    client = served.client()
    first = client.chat.completions.create(model=NAME, messages=user("one")).choices[0].message
    reply = client.chat.completions.create(model=NAME, messages=[
        *user("one"), first.model_dump(),
        {"role": "user", "content": [
            {"type": "text", "text": "two"}, {"type": "text", "text": "three"}]}])
    assert reply.choices[0].message.content == "two\nthree"


def test_fields_that_ask_for_nothing_are_taken(served: Served):
    reply = served.client().chat.completions.create(
        model=NAME, messages=user("hi"), tools=[], user="me", metadata={"a": "b"}, store=False,
        response_format={"type": "text"}, service_tier="auto", presence_penalty=0, n=1,
        extra_body={"session_id": -1, "skip_special_tokens": True, "temperature": None})
    assert reply.choices[0].message.content == "hi"


def test_async_client_many_at_once(served: Served):
    async def work() -> None:
        async with AsyncOpenAI(
                base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            async def one(i: int) -> None:
                text = f"message {i} " * 5
                stream = await client.chat.completions.create(
                    model=NAME, messages=user(text), stream=True)
                pieces = [c.choices[0].delta.content or "" async for c in stream]
                assert "".join(pieces) == text
            await asyncio.gather(*(one(i) for i in range(40)))
    asyncio.run(work())


def test_error_classes(served: Served):
    chat = served.client().chat.completions
    with pytest.raises(openai.BadRequestError) as bad:
        chat.create(model=NAME, messages=user("hi"), temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    assert "from 0.0 to 2.0, not 3" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        chat.create(model="gpt-4o", messages=user("hi"))
    assert missing.value.code == "model_not_found" and f'has "{NAME}"' in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        chat.create(model=NAME, messages=user("x" * 140_000), stream=True)
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        served.client().completions.create(model=NAME, prompt="x" * 140_000)
    assert long.value.param == "prompt"
    with pytest.raises(openai.APIStatusError) as large:
        chat.create(model=NAME, messages=user("x" * 3_000_000))
    assert large.value.status_code == 413 and large.value.code == "request_too_large"
