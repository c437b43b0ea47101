"""`simulate_load` against an event loop in whole milliseconds, and against what no run may break."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from paramfx.core.tables import Table
from paramfx.slicing.serve import LoadRun, poisson_arrivals, simulate_load

MS = {1: 20, .75: 12, .5: 6, .25: 2}


def by_clock(at, ms, sla, reject):
    "The same service, a millisecond at a time, in integers: [(answered or None, rate)] per request"
    half, narrow = sla//2, min(ms)
    waiting, res, busy_until, t, todo = [], [None]*len(at), 0, 0, list(enumerate(at))
    while todo or waiting:
        if waiting and t >= busy_until:
            oldest = at[waiting[0]]
            closed = (oldest//half+1)*half <= t   # the window in which the oldest came is over
            if closed:
                left = min(half, oldest+sla-t)
                fitting = [r for r in ms if len(waiting)*ms[r] <= left]
                rate = max(fitting) if fitting else narrow
                served = waiting[:half//ms[narrow]]
                busy_until = t+len(served)*ms[rate]
                for i in served: res[i] = (busy_until, rate)
                waiting = [] if reject else waiting[len(served):]
        while todo and todo[0][1] == t: waiting.append(todo.pop(0)[0])
        t += 1
    return res


def both(at, reject=False, ms=MS, sla=200):
    run = simulate_load({r: m/1000 for r, m in ms.items()}, np.array(at)/1000, sla/1000, overload='reject' if reject else 'late')
    return run, by_clock(at, ms, sla, reject)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 70)), max_size=20), st.booleans())
def test_like_a_loop_over_milliseconds(bursts, reject):
    at = sorted(t+4*i | 1 for t, n in bursts for i in range(n))  # batches begin at even times: no tie is left to rounding
    run, loop = both(at, reject)
    assert run.rejected.tolist() == [r is None for r in loop]
    mine = [(round(1000*d), r) for d, r in zip(run.done, run.rate) if not np.isnan(d)]
    assert mine == [(t, r) for t, r in filter(None, loop)]


@pytest.mark.parametrize('load', [20, 200, 450, 900])
@pytest.mark.parametrize('overload', ['late', 'reject'])
@pytest.mark.parametrize('seed', range(3))
def test_nothing_is_lost(load, overload, seed):
    run = simulate_load({r: m/1000 for r, m in MS.items()}, lambda t: load*(1+np.sin(t)), .2, duration=10, seed=seed, overload=overload)
    row = run.row
    in_time = int((run.latency <= .2*(1+1e-9)).sum())
    assert in_time+row['late']+row['rejected'] == row['requests'] == len(run.arrived) == run.taken.sum()
    assert row['in_time'] == pytest.approx(in_time/row['requests'])
    assert (row['rejected'] if overload == 'late' else row['late']) == 0
    assert sum(row[f'at {r:g}'] for r in MS) == pytest.approx(1)
    assert row['mean_rate'] == pytest.approx(sum(r*row[f'at {r:g}'] for r in MS))
    # one server: no two batches at once, none before its requests, in their order
    assert (run.start[1:] >= run.end[:-1]-1e-9).all()
    assert np.nanmin(run.latency) > 0
    done = run.done[~run.rejected]
    assert (np.diff(done) >= 0).all()
    # a batch takes what its requests take
    assert run.end-run.start == pytest.approx(run.served*[MS[r]/1000 for r in run.rates])
    # what waits, counted one by one
    for t in np.linspace(0, 10, 41):
        begun = np.repeat(run.start, run.taken.astype(int))
        assert run.queue(t) == ((run.arrived < t) & (begun >= t)).sum()


@pytest.mark.parametrize('load', [1, 100, 300])
def test_within_the_bound_as_long_as_the_narrowest_keeps_up(load):
    "The published rule: n requests, the widest rate with n times its time within half of the bound"
    run = simulate_load({r: m/1000 for r, m in MS.items()}, load, .2, duration=20)
    assert run.waiting.max()*2 <= 100 and run.row['in_time'] == 1
    for n, rate in zip(run.waiting, run.rates): assert rate == max(r for r, m in MS.items() if n*m <= 100)


def test_one_request_at_a_time_gets_full_width():
    run = simulate_load({r: m/1000 for r, m in MS.items()}, np.arange(50)*1.07, .2)
    assert (run.rate == 1).all() and run.row['in_time'] == 1 and run.row['mean_rate'] == 1


def test_a_sliced_server_keeps_what_a_whole_one_misses():
    rush = lambda t: 20+300*(5 < t < 10)
    sliced = simulate_load({r: m/1000 for r, m in MS.items()}, rush, .2, duration=15)
    fixed = simulate_load({1: .02}, rush, .2, duration=15)
    assert sliced.row['in_time'] == 1 and fixed.row['in_time'] < .25
    assert fixed.row['requests'] == sliced.row['requests']


def test_it_recovers():
    "After a rush that is too much for the narrowest, all is as before"
    run = simulate_load({r: m/1000 for r, m in MS.items()}, lambda t: 10+2000*(5 < t < 6), .2, duration=30)
    late = run.arrived[run.late]
    assert len(late) and 5 < late.min() and late.max() < 12
    assert (run.rate[run.arrived > 12] == 1).mean() > .95


def test_rows_are_milliseconds():
    rows = Table([dict(rate=r, latency=8*m, accuracy=.9) for r, m in MS.items()])
    a = simulate_load(rows, 200, .2, duration=5, items=8)
    b = simulate_load({r: m/1000 for r, m in reversed(MS.items())}, 200, .2, duration=5)
    np.testing.assert_allclose(a.done, b.done)
    assert a.row.keys() == b.row.keys() and a.rate.tolist() == b.rate.tolist()


def test_a_narrow_rate_that_is_no_faster_is_not_chosen():
    run = simulate_load({1: .02, .5: .005, .25: .006}, 300, .2, duration=20, overload='reject')
    assert run.row['at 0.25'] == 0 and run.row['at 0.5'] > 0


def test_poisson_arrivals():
    rate = lambda t: 50 if t < 10 else 400
    at = [poisson_arrivals(rate, 20, seed) for seed in range(20)]
    assert np.array_equal(at[3], poisson_arrivals(rate, 20, 3)) and not np.array_equal(at[3], at[4])
    assert all((np.diff(a) >= 0).all() and a[0] >= 0 and a[-1] < 20 for a in at)
    early, later = [np.array([((a >= s) & (a < s+10)).sum() for a in at]) for s in (0, 10)]
    for n, mean in ((early, 500), (later, 4000)):
        assert abs(n.mean()-mean) < 4*(mean/20)**.5
        assert .3 < n.var(ddof=1)/mean < 2.5   # as many as its mean
    inside = poisson_arrivals(400, 20, steps=10) % 2   # intervals of two seconds, filled evenly
    assert inside.mean() == pytest.approx(1, abs=.03) and inside.std() == pytest.approx(3**-.5, abs=.03)
    gaps = np.diff(at[0][at[0] > 10])
    assert gaps.std()/gaps.mean() == pytest.approx(1, abs=.1)   # exponential


def test_no_requests():
    run = simulate_load({1: .02}, [], .2)
    assert run.row['requests'] == 0 and run.row['mean_rate'] is None and 'requests' in repr(run)
    with pytest.raises(ValueError, match='nothing to draw'): run.plot()


def test_the_picture():
    import matplotlib.pyplot as plt
    run = simulate_load({r: m/1000 for r, m in MS.items()}, lambda t: 10+900*(2 < t < 3), .2, duration=6)
    top, low = run.plot(title='a rush')
    assert low.get_xlabel() == 'seconds' and top.get_ylabel() and low.get_ylabel() and top.get_title() == 'a rush'
    drawn = sum(len(line.get_xdata()) for line in low.lines)
    assert drawn == len(run.start) and len(low.lines) == 2
    top_of_area = top.collections[0].get_datalim(top.transData).y1
    assert top_of_area == max(run.queue(run.start))
    same = plt.subplots(2, 1)[1]
    assert run.plot(axs=same)[0] is same[0]
    plt.close('all')


@pytest.mark.parametrize('kw, match', [
    (dict(sla=.003), 'sla=0.003: one request takes 0.002 s at rate 0.25.*Allow at least 0.004'),
    (dict(sla=0), 'sla=0'), (dict(sla='1'), "sla='1'"), (dict(sla=float('nan')), 'sla=nan'),
    (dict(overload='drop'), "overload='drop': choose"),
    (dict(table={}), 'empty'), (dict(table={2: .1}), 'rate=2'), (dict(table={1: 0.}), 'rate 1: a time of 0.0'),
    (dict(table={1: float('inf')}), 'a time of inf'), (dict(table=[dict(rate=1, latency=None)]), 'rate 1: a time of None'),
    (dict(table=[dict(rate=1, ms=3)]), 'no latency'), (dict(table=[dict(rate=.5, latency=3), dict(rate=.5, latency=2)]), 'rate 0.5 stands in the table twice'),
    (dict(table=[dict(rate='small', latency=3)]), "rate='small'"),
    (dict(arrivals=[1., -1.]), 'Times of arrival'), (dict(arrivals=[1., float('nan')]), 'Times of arrival'),
    (dict(arrivals=[1., 2.], duration=3), 'duration=3 is for a rate'),
    (dict(arrivals=5), 'duration=None'), (dict(arrivals=5, duration=-1), 'duration=-1'),
    (dict(arrivals=-5, duration=1), '-5'), (dict(arrivals=lambda t: float('nan'), duration=1), 'nan'),
])
def test_bad_input(kw, match):
    args = dict(table={r: m/1000 for r, m in MS.items()}, arrivals=[1., 2.], sla=.2) | kw
    with pytest.raises(ValueError, match=match): simulate_load(**args)


def test_is_a_load_run(): assert isinstance(simulate_load({1: .02}, [1.], .2), LoadRun)
