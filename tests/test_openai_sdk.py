"""The promises of the endpoint, asked by OpenAI's own SDK of the real vLLM on the CPU."""

import asyncio
import json
import urllib.request

import openai
import pytest
from openai.types import CompletionUsage

from gemma_serve.adapters.package_data import data_path
from running import eventually

pytestmark = pytest.mark.engine

ANSWERS = json.loads(data_path("answers.json").read_text())
COMPLETIONS = {known["id"]: known for known in ANSWERS["completions"]}
CHATS = {known["id"]: known for known in ANSWERS["chats"]}
COUNT = COMPLETIONS["count"]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 256}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
CITIES = ("france", "italy", "spain", "portugal", "germany", "japan", "egypt", "greece")


class Sync:
    """The SDK as most use it."""

    def __init__(self, engine):
        self.client = openai.OpenAI(
            base_url=f"{engine.url}/v1", api_key=engine.key, max_retries=0, timeout=120
        )

    def result(self, answer):
        return answer

    def events(self, stream):
        return list(stream)

    def leave(self, stream, meanwhile):
        """Read one event, do `meanwhile`, and close the stream."""
        with stream:
            next(iter(stream))
            meanwhile()

    def close(self):
        self.client.close()


class Async:
    """The SDK with asyncio, behind the same names."""

    def __init__(self, engine):
        self.runner = asyncio.Runner()
        self.client = openai.AsyncOpenAI(
            base_url=f"{engine.url}/v1", api_key=engine.key, max_retries=0, timeout=120
        )

    def result(self, answer):
        async def awaited():
            return await answer

        return self.runner.run(awaited())

    def events(self, stream):
        async def collected():
            return [event async for event in await stream]

        return self.runner.run(collected())

    def leave(self, stream, meanwhile):
        async def left():
            async with await stream as events:
                await anext(aiter(events))
                meanwhile()

        self.runner.run(left())

    def close(self):
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(scope="module", params=[Sync, Async], ids=["sync", "async"])
def sdk(request, keyed_engine):
    sdk = request.param(keyed_engine)
    yield sdk
    sdk.close()


def completion(sdk, prompt, **more):
    """A completion's text, reason to end and usage."""
    create = sdk.client.completions.create
    answer = sdk.result(create(prompt=prompt, **{**GREEDY, **more}))
    (choice,) = answer.choices
    return choice.text, choice.finish_reason, answer.usage


def completion_stream(sdk, prompt, **more):
    """The same of a stream."""
    create = sdk.client.completions.create
    events = sdk.events(create(prompt=prompt, **{**GREEDY, **STREAMED, **more}))
    return _of_stream(events, lambda choice: choice.text)


def chat(sdk, messages, **more):
    """A chat's text, reason to end and usage."""
    create = sdk.client.chat.completions.create
    answer = sdk.result(create(messages=messages, **{**GREEDY, **more}))
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    return choice.message.content, choice.finish_reason, answer.usage


def chat_stream(sdk, messages, **more):
    """The same of a stream."""
    create = sdk.client.chat.completions.create
    events = sdk.events(create(messages=messages, **{**GREEDY, **STREAMED, **more}))
    return _of_stream(events, lambda choice: choice.delta.content or "")


def _of_stream(events, text_of):
    choices = [choice for event in events for choice in event.choices]
    (reason,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    (usage,) = [event.usage for event in events if event.usage]
    return "".join(map(text_of, choices)), reason, usage


def used(prompt, completion):
    """What the SDK says of so many tokens."""
    total = prompt + completion
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)


def test_the_model_is_listed(sdk):
    (model,) = sdk.result(sdk.client.models.list()).data
    assert (model.id, model.object, model.max_model_len) == ("demo", "model", 1024)


def test_a_completion_is_the_same_plain_and_streamed(sdk):
    known = COMPLETIONS["capital-of-france"]
    plain = completion(sdk, known["prompt"])
    assert plain == (known["answer"], "stop", used(8, 13))
    assert completion_stream(sdk, known["prompt"]) == plain


def test_a_stream_comes_piece_by_piece(sdk):
    known = COMPLETIONS["once-upon-a-time"]
    create = sdk.client.completions.create
    events = sdk.events(create(prompt=known["prompt"], **GREEDY, stream=True))
    pieces = [piece for event in events if (piece := event.choices[0].text)]
    assert "".join(pieces) == known["answer"]
    assert len(pieces) > 1


def test_a_chat_is_the_same_plain_and_streamed(sdk):
    known = CHATS["capital-of-france"]
    plain = chat(sdk, known["messages"])
    assert plain == (known["answer"], "stop", used(20, 11))
    assert chat_stream(sdk, known["messages"]) == plain


def test_an_answer_ends_at_max_tokens_plain_and_streamed(sdk):
    plain = completion(sdk, COUNT["prompt"], max_tokens=5)
    assert plain == (" 5, 6", "length", used(12, 5))
    assert COUNT["answer"].startswith(plain[0])
    assert completion_stream(sdk, COUNT["prompt"], max_tokens=5) == plain
    messages = CHATS["capital-of-france"]["messages"]
    assert chat(sdk, messages, max_tokens=4) == ("The capital of", "length", used(20, 4))


def test_a_stop_sequence_ends_the_answer_and_is_left_out_plain_and_streamed(sdk):
    before, _, _ = COUNT["answer"].partition("9,")
    for ask in (completion, completion_stream):
        assert ask(sdk, COUNT["prompt"], stop="9,")[:2] == (before, "stop")
    for ask in (chat, chat_stream):
        answer = ask(sdk, CHATS["capital-of-france"]["messages"], stop=["Rome", " Paris"])
        assert answer[:2] == ("The capital of France is", "stop")


def test_earlier_turns_and_a_system_message_change_the_answer(sdk):
    asked = ("another-one-alone", "second-fun-fact", "system-one-word", "system-pirate")
    answers = {id: chat_stream(sdk, CHATS[id]["messages"])[0] for id in asked}
    assert answers == {id: CHATS[id]["answer"] for id in asked}


def test_a_model_that_is_not_served_is_not_found(sdk):
    with pytest.raises(openai.NotFoundError, match="gemma-9"):
        completion(sdk, "Hello", model="gemma-9")
    with pytest.raises(openai.NotFoundError, match="gemma-9"):
        chat_stream(sdk, CHATS["hello"]["messages"], model="gemma-9")


def test_a_wrong_key_is_refused_everywhere(sdk):
    wrong = sdk.client.with_options(api_key="sk-wrong")
    hello = CHATS["hello"]["messages"]
    for ask in (
        lambda: sdk.result(wrong.models.list()),
        lambda: sdk.result(wrong.completions.create(model="demo", prompt="Hello")),
        lambda: sdk.result(wrong.chat.completions.create(model="demo", messages=hello)),
    ):
        with pytest.raises(openai.AuthenticationError):
            ask()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"messages": CHATS["hello"]["messages"] * 2}, "must alternate"),
        ({"messages": [{"role": "user", "content": "1, " * 1024}]}, "maximum context length"),
        ({"messages": "Hello"}, "valid list"),
        ({"max_tokens": "many"}, "valid integer"),
    ],
    ids=["turns that do not alternate", "beyond the context", "no messages", "no number"],
)
def test_a_wrong_request_is_refused_and_the_server_lives_on(sdk, wrong, said):
    known = CHATS["hello"]
    with pytest.raises(openai.BadRequestError, match=said):
        chat(sdk, **{"messages": known["messages"], **wrong})
    assert chat(sdk, known["messages"])[0] == known["answer"]


def test_eight_streams_at_once_get_each_its_own_answer(keyed_engine):
    known = [CHATS[f"capital-of-{city}"] for city in CITIES]

    async def answer(client, messages):
        create = client.chat.completions.create
        stream = await create(messages=messages, stream=True, **GREEDY)
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    async def all_at_once():
        address = {"base_url": f"{keyed_engine.url}/v1", "api_key": keyed_engine.key}
        async with openai.AsyncOpenAI(**address, max_retries=0) as client:
            return await asyncio.gather(*(answer(client, one["messages"]) for one in known))

    assert asyncio.run(all_at_once()) == [one["answer"] for one in known]


def requests(url):
    """How many requests run, and how many were answered to their end, as the engine counts."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return tuple(
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
        for name in ("vllm:num_requests_running{", "vllm:request_success_total{")
    )


def test_a_stream_that_is_left_is_given_up(sdk, keyed_engine):
    def runs(count):
        eventually(lambda: requests(keyed_engine.url)[0] == count, f"{count} requests run")

    runs(0)
    _, finished = requests(keyed_engine.url)
    endless = {**GREEDY, "max_tokens": 1000, "extra_body": {"ignore_eos": True}, "stream": True}
    create = sdk.client.completions.create
    sdk.leave(create(prompt=COUNT["prompt"], **endless), meanwhile=lambda: runs(1))
    runs(0)
    assert requests(keyed_engine.url) == (0, finished)
    known = CHATS["hello"]
    assert chat(sdk, known["messages"])[0] == known["answer"]
