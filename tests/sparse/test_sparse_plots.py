"""Plots of sparse runs: what is drawn equals what was given; and a recorder that reads, never writes, and counts as sets do."""
import pickle
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.basics import Callback, load_learner
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from matplotlib.figure import Figure

from contracts import build, run_record, same
from paramfx.report.plots import plot_inputs, plot_shares, plot_survival, plot_tradeoff
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.callback import DynamicSparse
from paramfx.core.registry import PICTURES
from paramfx.sparse.plots import MaskRecorder, live_counts, plot_rewiring
from paramfx.sparse.methods import DSR

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning', 'ignore::FutureWarning')
CBS = {'dsr': partial(DynamicSparse, .8, period=2, method=DSR(threshold=.02)), 'rigl': partial(DynamicSparse, .8, method='rigl', period=2),
       'kernel': partial(DynamicSparse, .5, method='set', granularity='kernel', period=2), 'prune': partial(IterativePrune, .8, n_prunes=3)}


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def axes(**kw): return Figure(figsize=(7, 4), layout='constrained').subplots(**kw)


class Sets(Callback):
    "Live units as Python sets after each batch, by a route of its own"
    order = 61
    def __init__(self): self.sets = []
    def look(self):
        held = next(iter(self.learn.effect_keeper.held.values()))
        now = {(e.name, i) for e in held.store.items for i in e.mask.flatten().nonzero().flatten().tolist()}
        if not self.sets or now != self.sets[-1]: self.sets.append(now)
    def before_train(self): self.look()
    def after_batch(self): self.look()
    def after_train(self): self.look()


# -- the plots

@pytest.mark.parametrize('n', [1, 3, 50])
def test_shares(n):
    rng = np.random.default_rng(n)
    a, b = ({f'l{i}.weight': int(v) for i, v in enumerate(rng.integers(1, 1000, n))} for _ in range(2))
    for ax in (None, axes()):
        ax = plot_shares(a, b, ax=ax, title='t')
        for line, d in zip(ax.lines, (a, b)):
            np.testing.assert_allclose(line.get_xdata(), np.array([*d.values()])/sum(d.values()))
            assert list(line.get_ydata()) == list(range(n))
        assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_title() == 't'  # the first layer on top
        names = [t.get_text() for t in ax.get_yticklabels()]
        assert set(names) <= set(a) and len(names) >= min(n, 20)
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
        assert all(x.y0 >= y.y1-1 for x, y in zip(boxes, boxes[1:])), 'labels touch'
    with pytest.raises(ValueError, match='same layers twice'): plot_shares({}, {})


def test_survival():
    counts = [[100, 60, 50], [0, 0], [40, 10], [7]]
    ax = plot_survival(counts, ax=axes())
    assert [list(l.get_ydata()) for l in ax.lines[:2]] == [[1, .6, .5], [1, .25]]
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [1, 70/140, 70/140*50/60])
    assert len(plot_survival([[5, 4]], ax=axes()).lines) == 1  # one curve has no colour bar
    assert len(plot_survival([torch.tensor(c) for c in counts], ax=axes()).lines) == 3
    assert plot_survival([[5, 0, 0], [4, 0]], ax=axes()).lines[-1].get_ydata().tolist() == [1, 0, 0]
    for bad in ([], [[3]], [[0, 0]]):
        with pytest.raises(ValueError, match='something grew'): plot_survival(bad)


def test_inputs_of_a_convolution():
    m = np.random.default_rng(0).random((16, 3, 5, 4)) < .3
    img = plot_inputs(torch.tensor(m)).images[0].get_array()
    for c in range(3): assert img[:, 5*c:5*c+4].tolist() == m[:, c].sum(0).tolist()
    assert np.isnan(np.ma.filled(img[:, 4], np.nan)).all()
    for bad, shape in ((m, (5, 4)), (m[0], None), (np.ones((3, 4)), None)):
        with pytest.raises(ValueError, match='pass the `shape`'): plot_inputs(bad, shape)


def test_tradeoff_curves():
    points = {'dense': (1e5, .99), **{f'm{i}': [(10**(3+j/2), .9+i/100+j/1000) for j in (2, 0, 1)] for i in range(10)}}
    ax = plot_tradeoff(points, ax=axes(), xlabel='live')
    lines = {l.get_label(): l for l in ax.lines}
    assert list(lines) == list(points) and lines['dense'].get_xydata().tolist() == [[1e5, .99]]
    for k, v in points.items():
        if k != 'dense': assert lines[k].get_xydata().tolist() == [list(p) for p in sorted(v)]
    assert len({(l.get_color(), l.get_linestyle()) for l in ax.lines}) == len(points)
    with pytest.raises(ValueError, match="'m' has no place"): plot_tradeoff({'m': [(1, 2), (0, 1)]})
    assert plot_tradeoff({'m': [(1, 2), (0, 1)]}, log_x=False, ax=axes()).lines[0].get_xdata().tolist() == [0, 1]


@pytest.mark.parametrize('kind', CBS)
def test_rewiring(mk, kind):
    learn = mk()
    learn.fit(3, cbs=CBS[kind]())
    cb = next(iter(learn.effect_keeper.held.values()))
    tr = cb.traces
    axs = plot_rewiring(cb, title='a run')
    by = {ax.get_ylabel(): ax for ax in axs}
    for k, label in dict(threshold='threshold', fraction='share to drop', moved='units moved', pruned='units dropped').items():
        assert (k in tr) == (label in by)
        if k in tr: assert by[label].lines[0].get_xydata().tolist() == [list(map(float, o)) for o in zip(tr['step'], tr[k])]
    assert {l.get_label(): l.get_ydata().tolist() for l in by['sparsity'].lines} == tr['sparsity']
    assert [len(ax.lines) for ax in plot_rewiring(tr, axs=axes(nrows=len(axs)))] == [len(ax.lines) for ax in axs]


# -- the recorder

@pytest.mark.parametrize('kind', CBS)
def test_recorder_counts_as_sets_do(mk, kind):
    learn = mk(cbs=MaskRecorder())
    sets = Sets()
    learn.fit(3, cbs=[CBS[kind](), sets])
    rec, cb = learn.mask_recorder, next(iter(learn.effect_keeper.held.values()))
    snaps = [{(n, i) for n, m in rec.masks(k).items() for i in np.flatnonzero(m).tolist()} for k in range(len(rec.snaps))]
    assert [s for i, s in enumerate(snaps) if not i or s != snaps[i-1]] == sets.sets  # a rewire may move nothing
    want = []
    for k in range(1, len(snaps)):
        alive = snaps[k]-snaps[k-1]
        want.append([len(alive)])
        for later in snaps[k+1:]:
            alive = alive & later
            want[-1].append(len(alive))
    assert rec.survival() == want
    size, total = {e.name: e.size for e in cb.store.items}, sum(e.weight.numel() for e in cb.store.items)
    weigh = lambda s: sum(size[n] for n, _ in s)
    np.testing.assert_allclose(rec.explored(), [weigh(set().union(*snaps[:k+1]))/total for k in range(len(snaps))])
    for n, s in rec.shares().items(): np.testing.assert_allclose(s, [weigh(o for o in snap if o[0] == n)/weigh(snap) for snap in snaps])
    first, last = live_counts(cb)
    for n in first: assert (first[n], last[n]) == tuple(size[n]*sum(o[0] == n for o in snaps[i]) for i in (0, -1))
    draws = dict(rec.pictures())
    assert set(draws) == {'shares', 'explored'} | ({'survival'} if kind != 'prune' else set())
    for draw in draws.values(): draw(axes(), title='t')


def test_recorder_changes_nothing(mk):
    a, b = mk(cbs=CBS['dsr']()), mk(cbs=[CBS['dsr'](), MaskRecorder()])
    for learn in (a, b): learn.fit_one_cycle(2, 1e-2)
    assert not same(run_record(a), run_record(b))


def test_recorder_sleeps(mk):
    learn = mk(cbs=[CBS['dsr'](), MaskRecorder()])
    learn.lr_find(show_plot=False)
    learn.validate(); learn.get_preds()
    assert not learn.mask_recorder.snaps
    learn.fit(1)
    n = len(learn.mask_recorder.snaps)
    learn.lr_find(show_plot=False)
    learn.validate(); learn.get_preds()
    assert n > 1 and len(learn.mask_recorder.snaps) == n
    learn.materialize()
    learn.fit(1); learn.validate()  # without masks it has nothing more to record
    assert len(learn.mask_recorder.snaps) == n


def test_limit_and_memory(mk):
    all_, few = mk(cbs=[CBS['dsr'](), MaskRecorder()]), mk(cbs=[CBS['dsr'](), MaskRecorder(limit=5)])
    for learn in (all_, few): learn.fit(6)
    a, b = ({s['rewire']: s for s in o.mask_recorder.snaps} for o in (all_, few))
    assert len(b) <= 5 < len(a) and set(b) <= set(a) and min(b) == 0 and max(b) == max(a)
    for k in b: assert all((a[k]['bits'][n] == b[k]['bits'][n]).all() for n in b[k]['bits'])
    bits = sum(o.nbytes for o in b[0]['bits'].values())
    assert bits <= sum(e.units/8+1 for e in few.dynamic_sparse.store.items)
    for kw in (dict(every=0), dict(limit=3)):
        with pytest.raises(ValueError, match='at least'): MaskRecorder(**kw)
    every = mk(cbs=[CBS['dsr'](), MaskRecorder(every=3)])
    every.fit(3)
    assert all(s['rewire']%3 == 0 for s in every.mask_recorder.snaps[:-1])


def test_a_loaded_file_takes_back_what_came_after(mk):
    learn = mk(cbs=[CBS['dsr'](), MaskRecorder()])
    learn.fit(1)
    learn.save('one')
    n = [s['rewire'] for s in learn.mask_recorder.snaps]
    learn.fit(1)
    learn.load('one')
    learn.fit(1)
    got = [s['rewire'] for s in learn.mask_recorder.snaps]
    assert got == sorted(set(got)) and got[:len(n)] == n
    assert all(np.array_equal(m, learn.dynamic_sparse.store.items[i].mask.flatten().numpy()) for i, m in enumerate(learn.mask_recorder.masks().values()))
    learn.release()
    learn.sparsify(.5, period=2)
    learn.fit(1)
    rec, live = learn.mask_recorder, learn.dynamic_sparse.store.live
    assert rec.snaps[0]['rewire'] == 0 and all(sum(m.sum() for m in rec.masks(i).values()) == live for i in range(len(rec.snaps)))


def test_pickle_export_and_no_masks(mk):
    learn = mk(cbs=[CBS['dsr'](), MaskRecorder()])
    learn.fit(1)
    learn.export('x.pkl')
    again = load_learner(learn.path/'x.pkl')
    assert again.mask_recorder.survival() == learn.mask_recorder.survival()
    assert pickle.loads(pickle.dumps(learn.mask_recorder)).explored() == learn.mask_recorder.explored()
    with pytest.raises(ValueError, match='no masks'): mk(cbs=MaskRecorder()).fit(1)


def test_pictures_of_the_demo(mk):
    import paramfx.sparse.demo # registers its rows  # noqa: F401
    learn = mk(cbs=[CBS['dsr'](), MaskRecorder()])
    learn.fit(2)
    got = dict(PICTURES['sparse_pictures']('row', learn))
    assert list(got) == ['sparsity', 'threshold', 'mask', 'shares', 'survival', 'explored']
    for draw in got.values():
        ax = axes()
        draw(ax)
        assert ax.get_title().startswith('row: ')
