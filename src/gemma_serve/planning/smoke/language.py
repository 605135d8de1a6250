"""Whether an answer is language, or what a broken model writes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemma_serve.planning.smoke.verdicts import GARBAGE, Fault, Reply, head

# The tokens that steer Gemma (1 to 4). The server leaves them out of every text.
_CONTROL_TOKEN = re.compile(
    r"<(?:pad|eos|bos|unk|mask|unused\d+|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token|audio_soft_token|\|(?:turn|channel|think|image|audio|video|tool)"
    r"|(?:turn|channel|think|image|audio|video|tool)\|)>|\[multimodal\]"
)
# Of one character a few say enough; of words more: a poem may say one four times.
_REPEATED_CHARS = 4
# A healthy base model may fall into repeating a sentence, one that was taught to chat does not.
_LOOPED_WORDS = re.compile(r"(?P<unit>\S{1,40}(?:\s+\S{1,40}){0,2}?)(?:\s+(?P=unit)){7,}")
_LOOPED_PHRASE = re.compile(r"(?P<unit>\S{1,40}(?:\s+\S{1,40}){0,11}?)(?:\s+(?P=unit)){4,}")
_LOOPED_CHARS = re.compile(r"(?P<unit>.{1,8}?)(?P=unit){15,}", re.DOTALL)
SAME_ANSWERS = 3
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LOST = re.compile(f"[{_REPLACEMENT}\ud800-\udfff]")  # and halves of a surrogate pair


def judge_variety(answers: Mapping[str, str]) -> Fault | None:
    """Different questions (the keys) get different answers."""
    texts = list(answers.values())
    same = max((texts.count(text) for text in texts), default=0)
    if same < SAME_ANSWERS:
        return None
    text = next(text for text in texts if texts.count(text) == same)
    return Fault(f"{same} different questions got the same answer {head(text)!r}", GARBAGE)


def judge_language(reply: Reply, *, is_chat: bool) -> Fault | None:
    """The answer is text that a person could read."""
    text = reply.text
    if not text.strip():
        return Fault(f"the answer is empty, of {reply.completion_tokens} tokens", GARBAGE)
    visible = "".join(_CONTROL_TOKEN.sub("", text).split())
    if not visible:
        return Fault(f"the answer holds only special tokens: {head(text)!r}", GARBAGE)
    if found := _CONTROL_TOKEN.search(text):
        hint = "the server must skip special tokens: is the tokenizer's configuration whole?"
        return Fault(f"the special token {found[0]} stands in the answer {head(text)!r}", hint)
    if len(visible) >= _REPEATED_CHARS and len(set(visible)) == 1:
        return Fault(f"the answer is one character over and over: {head(text)!r}", GARBAGE)
    looped = (_LOOPED_PHRASE if is_chat else _LOOPED_WORDS).search(text)
    if found := looped or _LOOPED_CHARS.search(text):
        return Fault(f"the answer repeats {found['unit']!r} over and over", GARBAGE)
    if _LOST.search(text.rstrip(_REPLACEMENT)):
        return Fault(f"characters are lost in the answer: {head(text)!r}", GARBAGE)
    return None
