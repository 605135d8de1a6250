"""The smoke test's HTML report: what it says, what it draws, and that it needs nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.planning.smoke.promises import PROMISES
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke_html import html_page
from gemma_serve.view.smoke_pictures import (
    first_token_picture,
    staggered_picture,
    together_pictures,
)

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def stream(country, started_s, first_s, tokens=64, step_s=0.01):
    return {
        "prompt": f"What is the capital of {country}?",
        "answer": CITIES.get(country, "?"),
        "started_s": started_s,
        "token_times_s": [first_s + i * step_s for i in range(tokens)],
    }


AT_ONCE = [stream(country, 0.0, 0.05) for country in CITIES]
ONE_BY_ONE = [stream(c, i * 0.7, i * 0.7 + 0.01) for i, c in enumerate(CITIES)]
SERIAL = [stream(c, 0.0, i * 0.7 + 0.01) for i, c in enumerate(CITIES)]
PAIR = [stream("France", 0.0, 0.02, 200), stream("Italy", 0.5, 0.52)]


def check(id, status="passed", **more):
    return CheckResult(id, PROMISES[id].text, status, **more)


def report_of(*checks):
    return SmokeReport("http://127.0.0.1:8000", "demo", checks, 1767225600.25, 9.5, "0.32.0")


def together(answers, alone=(), **more):
    figures = {"answers": answers, "alone": list(alone), **more}
    return report_of(check("together", figures=figures))


REPORT = report_of(
    check("unknown-model", figures={"status": 404}, duration_s=0.004),
    check(
        "completion",
        "failed",
        reason="the answer is <b>not</b> language",
        hint="see `gemma-serve logs`",
        figures={"prompt": "Hello", "answer": "<script>alert(1)</script>\x00\ud800"},
    ),
    check("chat", "skipped", reason="a base model: it has no chat template"),
    check("staggered", figures={"answers": PAIR}),
    check("together", figures={"answers": AT_ONCE, "alone": ONE_BY_ONE, "engine_running": 3}),
)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of_class(self, name):
        return [attrs for _, attrs in self.elements if attrs.get("class") == name]


def test_the_page_needs_nothing_from_outside():
    html = html_page(REPORT)
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    links = [
        value
        for _, attrs in page.elements
        for name, value in attrs.items()
        if name.rpartition(":")[2] in ("href", "src", "srcset", "action", "data", "poster")
    ]
    assert links == ["#completion"]
    assert not re.search(r"url\(|@import", html)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in html


def test_the_page_says_what_was_promised_and_seen():
    text = Page(html_page(REPORT)).text
    for said in (
        "The endpoint breaks its promises 3 passed, 1 failed, 1 skipped Broken: completion",
        "Endpoint http://127.0.0.1:8000 Model demo Engine version 0.32.0",
        "Date 2026-01-01 00:00:00 UTC Duration 9.5 s",
        "pass A model that is not served is refused with 404 unknown-model "
        "refused with 404 0.004 s",
        "FAIL A prompt is continued by the model that was asked completion "
        "the answer is <b>not</b> language Hint: see gemma-serve logs",
        "skip A chat message is answered chat a base model: it has no chat template",
        "Hello <script>alert(1)</script>\ufffd\ufffd completion",
        "What is the capital of Italy? Rome staggered, together",
    ):
        assert said in text


def test_an_answer_that_differs_from_the_one_alone_is_shown_beside_it():
    other = [{**one, "answer": "Lyon"} for one in ONE_BY_ONE[:1]]
    text = Page(html_page(together(AT_ONCE[:1], other))).text
    assert "What is the capital of France? Paris Asked alone: Lyon together" in text


def test_each_stream_has_a_lane_and_each_token_a_mark():
    page = Page(html_page(REPORT))
    lanes = page.of_class("stream")
    drawn = [path["d"].count("M") for path in page.of_class("token")]
    alone_and_at_once, enlarged, pair = [64] * 6, [64] * 3, [200, 64]
    legend = [4]
    assert len(lanes) == 11
    assert sorted(drawn) == sorted(alone_and_at_once + enlarged + pair + legend)
    assert len(page.of_class("first")) == 3
    titled = [tag for tag, _ in page.elements if tag in ("title", "desc")]
    assert titled == ["title", *["title", "desc"] * 14]


def test_the_marks_are_where_the_times_are():
    (picture,) = together_pictures(together([stream("France", 1.0, 2.0, tokens=3, step_s=1.0)]))
    (lane,) = picture.panels[0].lanes
    assert lane.description == "asked at 1.0 s, first token 1.0 s later, 3 tokens until 4.0 s"
    assert (lane.wait_x, lane.wait_width, lane.written_width) == (247.5, 247.5, 495.1)
    assert lane.tokens == "M495 1V9M742.6 1V9M990.1 1V9"
    assert [mark.label for mark in picture.axis] == ["0", "1 s", "2 s", "3 s", "4 s"]
    assert [mark.x for mark in picture.axis] == [0.0, 247.5, 495.0, 742.6, 990.1]


@pytest.mark.parametrize(
    ("answers", "alone", "says"),
    [
        (
            AT_ONCE,
            ONE_BY_ONE,
            "Three answers asked for at once took 0.68 s; asked for one after another, they took "
            "2.0 s. All three were written side by side, for 0.63 s of the 0.63 s that they took "
            "to write.",
        ),
        (
            SERIAL,
            ONE_BY_ONE,
            "Three answers asked for at once took 2.0 s; asked for one after another, they took "
            "2.0 s. They were written one after the other: no two were in progress at the same "
            "time.",
        ),
        (
            [AT_ONCE[0], AT_ONCE[1], SERIAL[2]],
            [],
            "Three answers asked for at once took 2.0 s. At most two of them were in progress at "
            "the same time.",
        ),
        (
            [stream("France", 0.0, 0.0), stream("Italy", 0.0, 0.6)],
            [],
            "Two answers asked for at once took 1.2 s. Both were in progress at the same time, "
            "but only for 0.030 s of the 1.2 s that they took to write.",
        ),
        (
            [stream(c, 0.0, 0.9, step_s=0.0) for c in CITIES],
            [],
            "Three answers asked for at once took 0.90 s. No answer came over time, but in one "
            "piece: how it was written can't be seen.",
        ),
        (
            [*AT_ONCE[:2], stream("Spain", 0.0, 0.9, tokens=1)],
            [],
            "Three answers asked for at once took 0.90 s. Of these, one came in one piece.",
        ),
        (
            [*AT_ONCE[:2], stream("Spain", 0.0, 0.9, tokens=0)],
            [],
            "Of three answers asked for at once, two came, within 0.68 s. Both that came were "
            "written side by side, for 0.63 s of the 0.63 s that they took to write.",
        ),
        (
            [AT_ONCE[0], stream("Italy", 0.0, 0.0, tokens=0)],
            ONE_BY_ONE,
            "Of two answers asked for at once, one came, within 0.68 s.",
        ),
        (
            [stream("Italy", 0.0, 0.0, tokens=0)],
            [],
            "Of one answer asked for at once, none came.",
        ),
    ],
    ids=[
        "together",
        "serial",
        "some",
        "barely",
        "one-piece",
        "one-in-one-piece",
        "two-of-three",
        "one-lost",
        "none",
    ],
)
def test_what_is_said_is_what_the_times_show(answers, alone, says):
    assert together_pictures(together(answers, alone))[0].says == says


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (
            PAIR[1],
            "The second request came 0.50 s after the first and got its first token 0.020 s later, "
            "while the first was still being written. Both were written side by side for 0.63 s.",
        ),
        (
            stream("Italy", 0.5, 2.1),
            "The second request came 0.50 s after the first and got its first token 1.6 s later, "
            "when the first had ended. They were never side by side.",
        ),
        (
            stream("Italy", 0.5, 0.5, tokens=0),
            "The second request came 0.50 s after the first. The second got no token.",
        ),
    ],
    ids=["joined", "waited", "lost"],
)
def test_the_pair_is_described_as_it_was(second, says):
    report = report_of(check("staggered", figures={"answers": [PAIR[0], second]}))
    assert staggered_picture(report).says == says


def test_the_engine_is_quoted():
    says = together_pictures(together(AT_ONCE[:1], engine_running=3))[0].says
    assert says.endswith(
        " The engine itself counted at most 3 requests running, those of others included."
    )


def test_the_first_tokens_are_compared():
    picture = first_token_picture(together(AT_ONCE[:2], ONE_BY_ONE[:1]))
    assert picture.says == (
        "The first token of an answer came after 0.010 s where it was asked for alone, and after "
        "0.050 s where it was asked for at once with the others."
    )
    assert [lane.description for lane in picture.lanes] == [
        "alone 0.010 s, at once 0.050 s",
        "at once 0.050 s",
    ]


@pytest.mark.parametrize(
    ("checks", "why"),
    [
        ((), "was not run"),
        ((check("together", "skipped", reason="no chat here"),), "was skipped (no chat here)"),
        (
            (check("together", "failed", figures={"answers": []}),),
            "did not get far enough to measure its streams",
        ),
    ],
    ids=["not-run", "skipped", "empty"],
)
def test_without_streams_there_is_a_sentence_and_no_picture(checks, why):
    page = Page(html_page(report_of(*checks)))
    assert page.text.count(f"No picture: the check together {why}") == 2
    assert [tag for tag, _ in page.elements if tag == "svg"] == []


NUMBERS = st.none() | st.floats() | st.integers() | st.just("x")
STREAMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": st.none() | st.text(max_size=5),
            "answer": st.none() | st.text(max_size=5),
            "started_s": NUMBERS,
            "token_times_s": st.none() | st.lists(NUMBERS, max_size=3),
        },
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=50)  # other tests take the cores
@given(answers=st.none() | STREAMS, alone=st.none() | STREAMS, said=st.text(max_size=20))
def test_no_figures_and_no_words_break_the_page(answers, alone, said):
    figures = {"answers": answers, "alone": alone}
    checks = [
        check(id, "failed", reason=said, hint=said, figures=figures)
        for id in ("staggered", "together")
    ]
    html = html_page(replace(report_of(*checks), model=said))
    assert "script" not in {tag for tag, _ in Page(html).elements}
    html.encode()
