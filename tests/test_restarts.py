"""Restarts after a death: their pauses, their limit, and what is forgiven."""

from gemma_serve.engine.restarts import RestartPolicy, Restarts

EVERY_10_S = [10.0 * n for n in range(1, 7)]


def pauses(restarts, deaths, ready_for_s=1.0):
    return [restarts.after_death(now, ready_at=now - ready_for_s) for now in deaths]


def test_the_pauses_double_until_the_restarts_are_used_up():
    restarts = Restarts(RestartPolicy())
    assert restarts.count == 0
    assert pauses(restarts, EVERY_10_S) == [1.0, 2.0, 4.0, 8.0, 16.0, None]
    assert restarts.count == 5


def test_no_pause_is_longer_than_the_longest():
    restarts = Restarts(RestartPolicy(max_restarts=2000, window_s=1e9))
    assert pauses(restarts, range(2000))[4:9] == [16.0, 32.0, 60.0, 60.0, 60.0]
    assert pauses(restarts, [2000.0]) == [None]


def test_an_engine_that_was_stable_is_forgiven_its_earlier_deaths():
    policy = RestartPolicy(window_s=1e9)
    used_up, not_quite = Restarts(policy), Restarts(policy)
    for restarts in (used_up, not_quite):
        assert pauses(restarts, EVERY_10_S)[-1] is None
    assert pauses(not_quite, [400.0], ready_for_s=299.9) == [None]
    assert pauses(used_up, [400.0, 410.0], ready_for_s=300.0) == [1.0, 1.0]
    assert used_up.count == 1


def test_deaths_older_than_the_window_drop_out():
    restarts = Restarts(RestartPolicy(max_restarts=2, window_s=100.0))
    assert pauses(restarts, [0.0, 60.0, 100.0, 101.0]) == [1.0, 2.0, None, 2.0]
    assert restarts.count == 2
    assert pauses(restarts, [300.0]) == [1.0]


def test_without_restarts_the_first_death_is_the_last():
    assert pauses(Restarts(RestartPolicy(max_restarts=0)), [10.0]) == [None]
