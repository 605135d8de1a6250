"""Whether a ready engine still generates: the probe, and what the token counters say of it."""

from gemma_serve.engine.watch import Health, TokenCounters, Watch

LATE = "no token within 20 s"
BEHIND_LOAD = f"{LATE}, but the counters moved: it queued behind load"
IDLE = Health(ok=True, probed=True)
BUSY = Health(ok=True)


def missed(times):
    return Health(ok=False, reason=LATE, missed=times, probed=True)


class Engine:
    """An engine whose counters a test moves; each probe that it answers costs 1 + 2 tokens."""

    def __init__(self):
        self.counters = TokenCounters(generation=100.0, prompt=700.0)
        self.readable = True
        self.hangs = False
        self.during_probe = lambda: None
        self.deadlines = []
        self.watch = Watch(read_counters=self.read, probe=self.probe, deadline_s=20.0)

    def read(self):
        return self.counters if self.readable else None

    def probe(self, deadline_s):
        self.deadlines.append(deadline_s)
        self.during_probe()
        if self.hangs:
            return LATE
        self.work(generation=1, prompt=2)
        return None

    def work(self, *, generation=0, prompt=0):
        now = self.counters
        self.counters = TokenCounters(now.generation + generation, now.prompt + prompt)

    def looks(self, times):
        return [self.watch.look() for _ in range(times)]


def test_an_idle_engine_is_probed_each_time_and_the_probes_tokens_are_no_traffic():
    engine = Engine()
    assert engine.looks(3) == [IDLE] * 3
    assert engine.deadlines == [20.0] * 3


def test_no_probe_is_sent_while_either_counter_moves():
    engine = Engine()
    assert engine.looks(1) == [IDLE]
    engine.work(generation=5)
    assert engine.looks(1) == [BUSY]
    engine.work(prompt=4096)
    assert engine.looks(1) == [BUSY]
    assert len(engine.deadlines) == 1
    assert engine.looks(1) == [IDLE]


def test_a_hang_is_seen_at_the_first_miss_counted_and_forgotten_with_a_token():
    engine = Engine()
    assert engine.looks(1) == [IDLE]
    engine.hangs = True
    assert engine.looks(3) == [missed(1), missed(2), missed(3)]
    engine.hangs = False
    assert engine.looks(2) == [IDLE] * 2
    engine.hangs = True
    assert engine.looks(1) == [missed(1)]


def test_traffic_ends_a_row_of_misses():
    engine = Engine()
    engine.hangs = True
    assert engine.looks(2) == [missed(1), missed(2)]
    engine.work(generation=3)
    assert engine.looks(2) == [BUSY, missed(1)]


def test_a_probe_that_is_late_under_load_is_not_counted():
    engine = Engine()
    engine.hangs = True
    engine.during_probe = lambda: engine.work(generation=40)
    assert engine.looks(2) == [Health(ok=True, reason=BEHIND_LOAD, probed=True)] * 2


def test_a_late_probe_that_is_not_counted_leaves_the_misses_before_it():
    engine = Engine()
    engine.hangs = True
    assert engine.looks(1) == [missed(1)]
    engine.during_probe = lambda: engine.work(prompt=40)
    assert engine.looks(1) == [Health(ok=False, reason=BEHIND_LOAD, missed=1, probed=True)]
    engine.during_probe = lambda: None
    assert engine.looks(1) == [missed(2)]


def test_counters_that_cannot_be_read_stand_still():
    engine = Engine()
    engine.readable = False
    assert engine.looks(2) == [IDLE] * 2
    engine.during_probe = lambda: engine.work(generation=40)
    engine.hangs = True
    assert engine.looks(2) == [missed(1), missed(2)]


def test_counters_that_can_be_read_again_are_no_traffic():
    engine = Engine()
    assert engine.looks(1) == [IDLE]
    engine.readable = False
    assert engine.looks(1) == [IDLE]
    engine.readable = True
    assert engine.looks(1) == [IDLE]


def test_a_restarted_engine_counts_from_zero_and_that_is_a_move():
    engine = Engine()
    engine.hangs = True
    assert engine.looks(1) == [missed(1)]
    engine.hangs = False
    engine.counters = TokenCounters(0.0, 0.0)
    assert engine.looks(2) == [BUSY, IDLE]
