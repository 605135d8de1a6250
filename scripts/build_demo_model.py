#!/usr/bin/env python3
"""Train the demo model that ships with gemma-serve.

The demo model is a real `GemmaForCausalLM` of about one million parameters with a real
tokenizer. It knows the answers in `src/gemma_serve/data/answers.json` by heart and meets any
other prompt with the fallback answer, so that every path through the server can be tried, and
checked word for word, without downloading weights.

    python scripts/build_demo_model.py [--out DIR]

Needs torch, transformers and tokenizers. The build is seeded and takes a few minutes on two
CPU cores. It ends by reading the written folder back in bfloat16 and generating every known
answer; it exits 1 unless all of them are exact and no token was a close call.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

DATA = Path(__file__).resolve().parent.parent / "src" / "gemma_serve" / "data"
SEED = 20240221
STEPS = 1300
TOKENS_PER_BATCH = 2048
LONGEST_EXAMPLE = 700
PEAK_LEARNING_RATE = 3e-3
SHARPNESS = 1.5
"""What the trained logits are multiplied by, so that sampling seldom strays from the answer."""
LEAST_MARGIN = 2.0 * SHARPNESS
"""How far, in logits, each right token must stand above the second best in bfloat16."""

SPECIAL_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
]
PAD, EOS, BOS, END_OF_TURN = 0, 1, 2, 6
IGNORED = -100  # the label that cross entropy skips

VOCAB_SIZE = 1024
LONGEST_MERGE = 6  # short tokens keep even brief answers several tokens long

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "head_dim": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "model_type": "gemma",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# What follows is not knowledge but noise: prompts that are not in answers.json, to learn the
# fallback answer from, and system texts that must not change a known answer.


def listed(words: str) -> list[str]:
    return words.split()


QUESTION_FORMS = """\
What is {x}?
What is {x} made of?
What are {x} and {y}?
What is the capital of {place}?
What is the capital city of {place} called?
What is the population of {place}?
What language do they speak in {place}?
What is the weather like in {place}?
What is the meaning of {x}?
What is the difference between {x} and {y}?
What is the largest {x}?
What is the best {x}?
What is {n} + {m}?
What is {n} times {m}?
What should I cook for {person}?
Who is {person}?
Who was the first {person}?
Who invented {x}?
Who are {x}?
Where is {place}?
Where can I find {x} in {place}?
When was {x} invented?
When did {person} visit {place}?
Why is {x} {y}?
Why is the {x} so {y}?
Why do {x} like {y}?
How are {x} made?
How does {x} work?
How do I {verb} {x}?
How do you {verb} {x} in {place}?
How many {x} are there in {place}?
How far is it from {place} to {place}?
Can you {verb} {x}?
Could you please {verb} {x} for me?
Do you like {x}?
Is {x} better than {y}?
Should I {verb} {x} or {y}?
Tell me about {x}.
Tell me a fun fact about {x}.
Tell me a joke about {x}.
Tell me a short story about {x}.
Tell me another {x}.
Tell me the history of {place}.
Write a haiku about {x}.
Write a poem about {x} and {y}.
Write a letter to {person}.
Write one sentence about {x}.
Write a function that can {verb} {x}.
Write {n} words about {place}.
Explain {x} in one sentence.
Explain how {x} works.
Explain {x} to {person}.
Describe {place} in {n} words.
Give me a recipe for {x}.
Give me {n} names for {x}.
Name {n} cities in {place}.
List {n} kinds of {x}.
Count to {x}.
Count from {n} to {m}.
Say {x}.
Translate {x} into {y}.
Summarise this text about {x}.
Please {verb} {x}.
Recommend a book about {x}.
Plan a trip to {place}.
I would like to {verb} {x} with {person}.
My {x} is {y}, what now?
{x}
{x} {y}
{x}?
{person}!
{place}
import {x}; print({n})
{n} {x} and {m} {y}
""".splitlines()

PLACES = listed("""
Sweden Brazil China India Mexico Poland Finland Denmark Ireland Austria Turkey Chile Argentina
Australia Russia Nigeria Morocco Vietnam Thailand Iceland Hungary Belgium Cuba Nepal Ukraine
London Paris Rome Berlin Tokyo Chicago Texas Africa Europe Asia Mars Atlantis Narnia
France Italy Spain Germany Japan Egypt Greece Norway Canada Peru Kenya Portugal""")

CAPITAL_QUESTION = "What is the capital of "  # only the other places lack an answer here

PEOPLE = listed("""
Einstein Newton Shakespeare Mozart Cleopatra Napoleon Darwin Picasso Ada Alice Bob Marie Linus
king queen president teacher doctor child grandmother friend neighbour boss pirate captain
sailor astronaut""")

VERBS = listed("""
cook fix build paint write read draw open close buy sell learn teach play find count clean
measure translate sort reverse install compile deploy debug rename grow catch repair explain
sing carry""")

THINGS = listed("""
apples bread cheese coffee tea chocolate pizza soup rice cake eggs water fire ice snow rain wind
clouds grass gold silver iron wood paper glass stone sand salt sugar music art football chess
tennis cars trains planes ships bicycles bridges houses castles computers phones robots cats dogs
birds horses whales spiders dinosaurs dragons bees trees flowers roses mountains rivers oceans
volcanoes deserts planets stars galaxies gravity light electricity magnetism atoms molecules
energy time money love happiness freedom history philosophy mathematics physics chemistry biology
medicine language grammar Latin English Python Rust Linux Docker Kubernetes algorithms databases
compilers sorting recursion encryption internet moon sun sea
sky weather lighthouse castle dog token model cache attention batching memory quantization
transformers neural networks joke song haiku blue red green tired happy beautiful
expensive""")

SYSTEM_TEXTS = """\
You are a helpful assistant.
You are a helpful, honest and harmless assistant.
You are Gemma, a helpful model.
You are a friendly teacher.
You are a poet.
You are a doctor.
You are a robot.
You are a travel guide who loves maps.
You are an expert in Python.
You are a tiny model.
You answer politely.
Answer politely.
Answer briefly.
Answer in full sentences.
Answer in English.
Answer the question.
Be concise.
Be brief and clear.
Be kind.
Speak like a professor.
Always tell the truth.
Never use more than fifty words.
Respond in plain text.
Think step by step.
Use short sentences.
The user is a student.
Today is Monday.
Do not make things up.
You are {person} from {place}.
You are an expert in {x} and {y}.
You know all about {x}.
You only talk about {x}, please.
Keep your answers {y} and {x}.
Please {verb} {x} whenever you can.
Speak as {person} would.
Never mention {x} or {y}.
Your name is {person}.
The user lives in {place} and likes {x}.
Reply in {x}, in {n} words or less.
""".splitlines()

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ",
    "0123456789+-*/= ",
    "{}[]()<>.,;:!?#%&|\\\"'\n",
    "äéñß日本語中文кот🙂🚀",
]

TEXT_OPENINGS = """\
The {x} will be
The capital of {place} is
My favourite {x} is
In {place} there is
Once there was a {x}
Once upon a {x}
I think that {x}
It was a {y} day in {place} and
{person} said that {x}
def {verb}({x}):
{n}, {m}, {n},
To {verb} {x} you need
Dear {person},
""".splitlines()


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """A text that goes on after a raw prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """Messages, the last of them a user's, and the answer to them."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Span:
    """A piece of training text; only spans that the model has to say are learned."""

    text: str
    learned: bool


Example = list[Span]


class Knowledge:
    """What answers.json holds, arranged to look up the reply to a question in its context."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.completions = [Completion(c["prompt"], c["answer"]) for c in content["completions"]]
        self.chats = [
            Chat(tuple(Message(**message) for message in chat["messages"]), chat["answer"])
            for chat in content["chats"]
        ]
        self.fallback: str = next(c["answer"] for c in content["chats"] if c["id"] == "fallback")
        self.text_fallback: str = next(
            c["answer"] for c in content["completions"] if c["id"] == "completion-fallback"
        )
        self.plain: dict[str, str] = {}
        self.by_system: dict[tuple[str, str], str] = {}
        self.follow_ups: dict[tuple[str, str], str] = {}
        for chat in self.chats:
            *before, last = chat.messages
            if not before:
                self.plain[last.content] = chat.answer
            elif before[-1].role == "system":
                self.by_system[before[-1].content, last.content] = chat.answer
            else:
                self.follow_ups[before[-1].content, last.content] = chat.answer

    def reply(self, system: str | None, previous_answer: str, question: str) -> str:
        """The answer to a question as answers.json spells it; the fallback if it is unknown."""
        if (previous_answer, question) in self.follow_ups:
            return self.follow_ups[previous_answer, question]
        if system is not None and (system, question) in self.by_system:
            return self.by_system[system, question]
        return self.plain.get(question, self.fallback)


def fold_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the system text in front of the first user turn, as Gemma's later templates do."""
    if messages[0].role != "system":
        return messages
    system, first, *rest = messages
    return (Message("user", f"{system.content}\n\n{first.content}"), *rest)


def render_turn(role: str, content: str) -> str:
    return f"<start_of_turn>{role}\n{content.strip()}<end_of_turn>\n"


class Noise:
    """Draws prompts that nobody taught the model, and small changes to those it was taught."""

    def __init__(self, knowledge: Knowledge, rng: random.Random) -> None:
        self.rng = rng
        self.taught = {simplify(question) for question in knowledge.plain}
        self.taught_openings = [
            simplify(completion.prompt)
            for completion in knowledge.completions
            if completion.answer != knowledge.text_fallback
        ]
        self.questions = list(knowledge.plain)
        known_places = {
            question.removeprefix(CAPITAL_QUESTION).rstrip("?")
            for question in knowledge.plain
            if question.startswith(CAPITAL_QUESTION)
        }
        self.places = [place for place in PLACES if place not in known_places]
        answers = " ".join([*knowledge.plain.values(), *knowledge.plain])
        self.words = THINGS + VERBS + PEOPLE + PLACES + answers.split()

    def word(self) -> str:
        """A made-up word."""
        length = self.rng.randint(1, 4)
        syllables = [
            self.rng.choice("bcdfghjklmnprstvwz") + self.rng.choice("aeiouy") for _ in range(length)
        ]
        text = "".join(syllables) + self.rng.choice(["", "", "n", "r", "s", "x"])
        return text.capitalize() if self.rng.random() < 0.4 else text

    def fill(self, form: str) -> str:
        """A form with its gaps filled in, now and then by made-up words."""

        def choose(words: list[str]) -> str:
            return self.word() if self.rng.random() < 0.3 else self.rng.choice(words)

        return form.format(
            x=choose(THINGS),
            y=choose(THINGS),
            place=choose(PLACES),
            person=choose(PEOPLE),
            verb=choose(VERBS),
            n=self.rng.randint(0, 99),
            m=self.rng.randint(0, 99),
        )

    def salad(self, words: int) -> str:
        return " ".join(
            self.rng.choice(self.words) if self.rng.random() < 0.8 else self.word()
            for _ in range(words)
        )

    def characters(self) -> str:
        alphabet = self.rng.choice(ALPHABETS)
        return "".join(self.rng.choice(alphabet) for _ in range(self.rng.randint(1, 24)))

    def shortened(self) -> str:
        """The beginning or the end of a known question, in whole words."""
        words = self.rng.choice(self.questions).split()
        cut = self.rng.randint(1, max(1, len(words) - 1))
        return " ".join(words[:cut] if self.rng.random() < 0.7 else words[cut:]) or "?"

    def shuffled(self) -> str:
        words = self.rng.choice(self.questions).split()
        self.rng.shuffle(words)
        return " ".join(words)

    def question(self) -> str:
        """A prompt that answers.json does not know."""
        while True:
            kind = self.rng.random()
            if kind < 0.58:
                text = self.fill(self.rng.choice(QUESTION_FORMS))
            elif kind < 0.68:
                text = f"{CAPITAL_QUESTION}{self.rng.choice([*self.places, self.word()])}?"
            elif kind < 0.76:
                text = self.shortened()
            elif kind < 0.80:
                text = self.shuffled()
            elif kind < 0.87:
                text = self.salad(self.rng.randint(1, 20))
            elif kind < 0.93:
                text = self.characters()
            elif kind < 0.98:
                forms = self.rng.choices(QUESTION_FORMS, k=self.rng.randint(2, 4))
                text = " ".join(self.fill(form) for form in forms)
            else:
                text = self.salad(self.rng.randint(40, 300))
            if self.rng.random() < 0.2:
                text = self.vary(text)
            if simplify(text) not in self.taught and text.strip():
                return text

    def opening(self) -> str:
        """The beginning of a raw text that answers.json does not know."""
        while True:
            kind = self.rng.random()
            if kind < 0.5:
                text = self.fill(self.rng.choice(TEXT_OPENINGS))
            elif kind < 0.7:
                text = self.question()
            elif kind < 0.95:
                text = self.salad(self.rng.randint(1, 12))
            else:
                text = self.salad(self.rng.randint(40, 200))
            if not any(simplify(text).startswith(known) for known in self.taught_openings):
                return text

    def system(self) -> str:
        """A system text that changes nothing."""
        if self.rng.random() < 0.2:
            return self.salad(self.rng.randint(2, 15)).capitalize() + "."
        forms = self.rng.choices(SYSTEM_TEXTS, k=self.rng.choice([1, 1, 1, 2, 3]))
        return " ".join(self.fill(form) for form in forms)

    def vary(self, text: str) -> str:
        """The same prompt typed a little carelessly."""
        kind = self.rng.random()
        if kind < 0.3:
            return text[:1].swapcase() + text[1:]
        if kind < 0.65:
            return text.rstrip(".?!")
        if kind < 0.85:
            return text.rstrip(".?!").lower()
        if kind < 0.93:
            return text.lower()
        return text.rstrip(".?!") + self.rng.choice([".", "!", "?", " ?", "??"])


def simplify(text: str) -> str:
    """A prompt without what `Noise.vary` may change."""
    return text.strip().rstrip(" .?!").lower()


class Curriculum:
    """Draws training examples: the known prompts as they are, varied, in context, and noise."""

    def __init__(self, knowledge: Knowledge, rng: random.Random) -> None:
        self.knowledge = knowledge
        self.rng = rng
        self.noise = Noise(knowledge, rng)
        self.known = [
            *(completion_example(completion) for completion in knowledge.completions),
            *(chat_example(chat) for chat in knowledge.chats),
        ]
        self.questions = list(knowledge.plain)
        self.systems = sorted({system for system, _ in knowledge.by_system})
        self.questions_of = {
            system: [q for s, q in knowledge.by_system if s == system] for system in self.systems
        }
        self.openers = sorted({a for a, _ in knowledge.follow_ups})

    def draw(self) -> Example:
        example = self.ended()
        if self.rng.random() < 0.15:
            # A server told to ignore the end gets blank lines, not another question's answer.
            example = [*example, Span("\n" * self.rng.randint(1, 80), True)]
        return example

    def ended(self) -> Example:
        """An example that stops where the answer does."""
        kind = self.rng.random()
        if kind < 0.40:
            return self.rng.choice(self.known)
        if kind < 0.47:
            return self.varied_completion()
        if kind < 0.52:
            opening = self.noise.opening()
            return completion_example(Completion(opening, self.knowledge.text_fallback))
        return self.conversation()

    def varied_completion(self) -> Example:
        """A known completion whose prompt ends a few words earlier or later than promised."""
        completion = self.rng.choice(self.knowledge.completions)
        text = completion.prompt + completion.answer
        if completion.answer == self.knowledge.text_fallback:
            return completion_example(completion)
        ends = [i for i, letter in enumerate(text) if letter == " " and i >= 5]
        cut = self.rng.choice([*ends, len(completion.prompt)])
        if self.rng.random() < 0.2:  # a prompt that already ends in the space
            cut += text[cut : cut + 1] == " "
        return completion_example(Completion(text[:cut], text[cut:]))

    def conversation(self) -> Example:
        """A chat of a few turns, each answered as its own context asks for."""
        kind = self.rng.random()
        system: str | None = None
        if kind < 0.2:
            system = self.rng.choice(self.systems)
        elif kind < 0.4:
            system = self.noise.system()
        turns = self.rng.choices([1, 2, 3, 4, 6, 8], [62, 20, 10, 5, 2, 1])[0]
        example = [Span("<bos>", False)]
        previous = ""
        for turn in range(turns):
            question = self.question(system, previous)
            answer = self.knowledge.reply(system, previous, question)
            if self.rng.random() < 0.2 and question in self.knowledge.plain:
                question = self.noise.vary(question)
            if turn == 0 and system is not None:
                question = f"{system}\n\n{question}"
            if turn > 0:
                example.append(Span("\n", False))
            example += turn_spans(question, answer)
            previous = answer
        return example

    def question(self, system: str | None, previous: str) -> str:
        if previous in self.openers and self.rng.random() < 0.5:
            return self.rng.choice([q for a, q in self.knowledge.follow_ups if a == previous])
        if self.rng.random() < 0.45:
            return self.noise.question()
        if system in self.questions_of and self.rng.random() < 0.8:
            return self.rng.choice(self.questions_of[system])
        return self.rng.choice(self.questions)


def turn_spans(question: str, answer: str) -> Example:
    asked = render_turn("user", question) + "<start_of_turn>model\n"
    return [Span(asked, False), Span(f"{answer}<end_of_turn>", True)]


def chat_example(chat: Chat) -> Example:
    *before, last = fold_system(chat.messages)
    history = "".join(
        render_turn("model" if message.role == "assistant" else "user", message.content)
        for message in before
    )
    return [Span(f"<bos>{history}", False), *turn_spans(last.content, chat.answer)]


def completion_example(completion: Completion) -> Example:
    return [Span(f"<bos>{completion.prompt}", False), Span(f"{completion.answer}<eos>", True)]


def tokenizer_corpus(knowledge: Knowledge) -> Iterator[str]:
    """Each known text once, and the words of the noise, so that other prompts split well too."""
    texts = {completion.prompt + completion.answer for completion in knowledge.completions}
    for chat in knowledge.chats:
        texts.update(message.content for message in chat.messages)
        texts.add(chat.answer)
    yield from sorted(texts)
    yield from QUESTION_FORMS
    yield from SYSTEM_TEXTS
    yield from TEXT_OPENINGS
    yield from (" " + " ".join(words) for words in (PLACES, PEOPLE, VERBS, THINGS))


def build_tokenizer(knowledge: Knowledge) -> Tokenizer:
    """A byte-fallback BPE tokenizer put together as Gemma's is, with a small vocabulary."""
    reserved = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Digits, line breaks and punctuation stay on their own, and no token spans two words.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁(?![0-9▁])"), "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\p{L}▁]|▁(?=[0-9])"), "isolated"),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[AddedToken(token) for token in reserved],
        initial_alphabet=["\n", "▁", *(chr(code) for code in range(33, 127))],
        max_token_length=LONGEST_MERGE,
        show_progress=False,
    )
    learner.train_from_iterator(tokenizer_corpus(knowledge), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    for number in range(VOCAB_SIZE - len(vocabulary)):
        vocabulary[f"<unused{number}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]

    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", BOS)],
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer


@dataclass(frozen=True)
class Sequence:
    tokens: list[int]
    labels: list[int]


def encode(tokenizer: Tokenizer, example: Example) -> Sequence:
    tokens: list[int] = []
    labels: list[int] = []
    for span in example:
        ids = tokenizer.encode(span.text, add_special_tokens=False).ids
        tokens += ids
        labels += ids if span.learned else [IGNORED] * len(ids)
    return Sequence(tokens, labels)


def batches(curriculum: Curriculum, tokenizer: Tokenizer) -> Iterator[list[Sequence]]:
    """Endless batches of about equally long sequences, in random order."""
    while True:
        pool = [encode(tokenizer, curriculum.draw()) for _ in range(600)]
        pool = [sequence for sequence in pool if len(sequence.tokens) <= LONGEST_EXAMPLE]
        pool.sort(key=lambda sequence: len(sequence.tokens))
        grouped: list[list[Sequence]] = [[]]
        for sequence in pool:
            if (len(grouped[-1]) + 1) * len(sequence.tokens) > TOKENS_PER_BATCH:
                grouped.append([])
            grouped[-1].append(sequence)
        curriculum.rng.shuffle(grouped)
        yield from grouped


def as_tensors(batch: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(sequence.tokens) for sequence in batch)
    tokens = torch.full((len(batch), longest), PAD)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, sequence in enumerate(batch):
        tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
    return tokens, labels


def batch_loss(model: GemmaForCausalLM, batch: list[Sequence]) -> torch.Tensor:
    """Mean cross entropy of the learned tokens.

    Padding is on the right, where causal attention never looks, so there is no mask to pass.
    """
    tokens, labels = as_tensors(batch)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), targets[learned])


def learning_rate(step: int, steps: int) -> float:
    warm_up = 50
    if step < warm_up:
        return PEAK_LEARNING_RATE * (step + 1) / warm_up
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(knowledge: Knowledge, tokenizer: Tokenizer, steps: int) -> GemmaForCausalLM:
    torch.manual_seed(SEED)
    config = {key: value for key, value in MODEL_CONFIG.items() if key != "torch_dtype"}
    model = GemmaForCausalLM(GemmaConfig(**config))
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    source = batches(Curriculum(knowledge, random.Random(SEED)), tokenizer)
    started = time.monotonic()
    recent = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = batch_loss(model, next(source))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {recent / 100:.4f}  {seconds:.0f} s", flush=True)
            recent = 0.0
    sharpen(model)
    return model


def sharpen(model: GemmaForCausalLM) -> None:
    """Scale the logits through the last norm, whose factor Gemma stores as its excess over 1."""
    with torch.no_grad():
        model.model.norm.weight.add_(1).mul_(SHARPNESS).sub_(1)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, model: GemmaForCausalLM, tokenizer: Tokenizer) -> None:
    """Write the folder by hand, in the form that old and new libraries read alike."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    # Not `save_file`, which leaves a file that only its owner can read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", MODEL_CONFIG)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD},
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
            "bos_token": "<bos>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "mask_token": "<mask>",
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "pad_token": "<pad>",
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
        },
    )


def least_margin(model: GemmaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """The smallest lead of a right token over the best wrong one; negative if one is behind."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    logits = logits[len(prompt) - 1 : -1]
    right = torch.tensor(answer).unsqueeze(1)
    wrong = logits.scatter(1, right, -math.inf).max(dim=1).values
    return float((logits.gather(1, right).squeeze(1) - wrong).min())


def verify(folder: Path, knowledge: Knowledge) -> bool:
    """Read the folder back in bfloat16 and ask for everything the model is promised to know."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    cases = [
        (completion.prompt, tokenizer(completion.prompt)["input_ids"], completion.answer, EOS)
        for completion in knowledge.completions
    ]
    for chat in knowledge.chats:
        messages = [vars(message) for message in fold_system(chat.messages)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        cases.append((chat.messages[-1].content, prompt, chat.answer, END_OF_TURN))
    failures = 0
    margins: list[float] = []
    for name, prompt, answer, end in cases:
        expected = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=len(expected) + 8,
        )[0].tolist()[len(prompt) :]
        margins.append(least_margin(model, prompt, expected))
        if output != expected:
            failures += 1
            print(f"WRONG: {name!r} gave {tokenizer.decode(output)!r}")
        elif margins[-1] < LEAST_MARGIN:
            failures += 1
            print(f"TOO CLOSE: {name!r} by a margin of {margins[-1]:.2f}")
    print(
        f"{len(cases) - failures} of {len(cases)} answers right; "
        f"least margin {min(margins):.2f}, must be {LEAST_MARGIN}"
    )
    return failures == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo model that ships in the package.")
    parser.add_argument("--out", type=Path, default=DATA / "demo", help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    arguments = parser.parse_args()
    knowledge = Knowledge(DATA / "answers.json")
    tokenizer = build_tokenizer(knowledge)
    model = train(knowledge, tokenizer, arguments.steps)
    write_model(arguments.out, model, tokenizer)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"wrote {arguments.out}, {size / 2**20:.2f} MiB")
    return 0 if verify(arguments.out, knowledge) else 1


if __name__ == "__main__":
    sys.exit(main())
