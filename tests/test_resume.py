"""Killed anywhere, a run continues to the bit: methods, fits, moments and optimizers, each with each.

A process that dies leaves nothing but its files, so one uninterrupted run per script copies the folder at every moment at which
it could have died; each copy is then resumed by a Learner of its own, whose weights and random states are others."""
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.basics import Adam, Callback, SGD
from fastai.callback.tracker import SaveModelCallback

import paramfx.core.runs
from contracts import METHODS, N_STEPS, build, evolving, run_record, same, seed_all, sparse, two_groups
from paramfx.core.samples import rng_state
from paramfx.core.callback import EffectCallback
from paramfx.evolution.callback import KnowledgeEvolution
from paramfx.core.runs import RunState
from paramfx.sparse.callback import DynamicSparse
from paramfx.core.state import EffectState, effects

pytestmark = pytest.mark.filterwarnings('ignore')

ALL = METHODS | {m.name: m for m in [  # and what acts when a fit ends
    sparse('granet', name='granet_to_the_end', period=2, drop_frac=.1, stop=1.),
    evolving('evolve_wels', policy='wels'),
    evolving('evolve_kels', policy='kels', when='next_fit', clear_state='reset'),
    evolving('evolve_rewind', policy='llf', from_layer='1.2', reinit='rewind'),
]}
OPTS = {'sgd': partial(SGD, mom=.9), 'adam': Adam}


class Tick(Callback):
    "Tells a log of moments in the middle of an epoch, and around the ends of epochs and fits"
    order = 59  # unlike the trackers, which come next, it is there in each fit
    run_valid = False
    def __init__(self, log): self.__dict__['log'] = log
    def before_batch(self):
        if self.learn.iter == N_STEPS//2: self.log('mid-epoch')
    def after_epoch(self): self.log('before the file of an epoch')
    def after_fit(self): self.log('as the fit ends')


class Late(Tick):
    order = 69  # after `RunState`
    def before_batch(self): pass
    def after_epoch(self): self.log('after an epoch')
    def after_fit(self): self.log('before the file of a fit')


@dataclass
class Script:
    "A program of several fits, `cbs` given to the Learner or to each of the fits"
    run: object
    per_fit: bool = False

SCRIPTS = {
    'fit': Script(lambda l, cbs, tick: (l.fit(2), tick('between fits'), l.fit(1), tick('between fits'), l.fit(1))),
    'one_cycle': Script(lambda l, cbs, tick: (l.fit_one_cycle(2, 1e-2, cbs=cbs()), tick('between fits'), l.fit_one_cycle(2, 1e-2, cbs=cbs())), per_fit=True),
    'fine_tune': Script(lambda l, cbs, tick: (l.fine_tune(2, freeze_epochs=1), tick('between fits'), l.fit(1))),
}


def program(path, m, script, opt, tracked, seed=0, log=None, prepare=None):
    "Build the Learner and run the script; returns the Learner"
    script = SCRIPTS[script]
    ticks = lambda: [] if log is None else [Tick(log), Late(log)]
    def cbs(): return [m.make(**m.penalty), RunState(), *([SaveModelCallback(fname='best')] if tracked else []), *ticks()]
    learn = build(path, None if script.per_fit else cbs(), seed=seed, model=partial(m.net, dropout=.3), splitter=two_groups, opt_func=OPTS[opt])
    if prepare: prepare(learn)
    script.run(learn, cbs, log or (lambda what: None))
    return learn


def finished(learn, m):
    "All that a run leaves, and the random numbers that would come next"
    rec = learn.recorder
    return dict(run_record(learn), facts=m.facts(learn), hps={k: [float(o) for o in v] for k, v in vars(rec).get('hps', {}).items()},
                rng=rng_state(learn.dls), draw=torch.rand(3), fits=learn.__dict__['_n_fits'],
                grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()])


def moments(tmp, m, script, opt, tracked, monkeypatch):
    "The uninterrupted run, and the folder as it was at each moment: [(what, folder), ...]"
    home, seen = tmp/'whole', []
    home.mkdir(parents=True)
    def log(what):
        to = tmp/f'at{len(seen)}'
        shutil.copytree(home, to)
        seen.append((what, to))
    replace = paramfx.core.runs.os.replace
    def dying(a, b):
        "Half of the new file is there under its temporary name; then all of it"
        whole = Path(a).read_bytes()
        Path(a).write_bytes(whole[:len(whole)//2])
        log('during the write')
        Path(a).write_bytes(whole)
        log('during the write')
        replace(a, b)
    with monkeypatch.context() as mp:
        mp.setattr(paramfx.core.runs.os, 'replace', dying)
        whole = program(home, m, script, opt, tracked, log=log)
    return finished(whole, m), [o for o in seen if (o[1]/'models'/'run.pth').exists()]  # before the first file there is nothing to resume


def resumed(folder, m, script, opt, tracked):
    def prepare(learn):
        seed_all(23)
        learn.resume()
    return finished(program(folder, m, script, opt, tracked, seed=17, prepare=prepare), m)


def sweep(tmp, monkeypatch, m, script, opt, tracked, every=1):
    "Number of cells, and those in which something differs"
    whole, at = moments(tmp, m, script, opt, tracked, monkeypatch)
    assert {'mid-epoch', 'before the file of an epoch', 'after an epoch', 'as the fit ends',
        'before the file of a fit', 'between fits', 'during the write'} == {w for w, _ in at}
    cells = at[::every]
    bad = [f'{i} {what}: {where}' for i, (what, folder) in enumerate(cells) if (where := same(resumed(folder, m, script, opt, tracked), whole))]
    return len(cells), bad


@pytest.mark.parametrize('name,script', [('granet_to_the_end', 'fine_tune'), ('evolve_wels', 'fit'), ('evolve_wels', 'one_cycle')])
def test_killed_anywhere(name, script, tmp_path, monkeypatch):
    n, bad = sweep(tmp_path, monkeypatch, ALL[name], script, 'adam', tracked=False, every=5)
    assert n > 3 and not bad, bad


@pytest.mark.slow
@pytest.mark.parametrize('tracked', [False, True], ids=['', 'tracked'])
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('name', ALL)
def test_killed_anywhere_in_full(name, script, opt, tracked, tmp_path, monkeypatch, record_property):
    n, bad = sweep(tmp_path, monkeypatch, ALL[name], script, opt, tracked)
    record_property('cells', n)
    record_property('exact', n-len(bad))
    assert not bad, f'{n-len(bad)} of {n} exact: {bad}'


# what is not in the sweep ----------------------------------------------------------------------------------------------------

class Nudge(EffectCallback):
    "An effect of somebody else's, which draws random numbers when a fit ends"
    def __init__(self, scale=.1): self.scale = scale
    def plan(self, model, learn=None): return []
    def convert(self, model, learn=None): return EffectState(self.name, self.settings, ends=0.)
    def on_fit_end(self):
        self.effect.values['ends'] += 1
        with torch.no_grad(): self.learn.model[1][2].bias += self.scale*torch.randn(10)


class Shake(Callback):
    "A plain callback that does"
    order = 20
    run_valid = False
    def before_train(self): self.__dict__['trained'] = True
    def after_fit(self):
        if not self.learn.lock.locked(): self.learn.model[1][2].bias.data += torch.rand(10)


@pytest.mark.parametrize('name,cb', [('static', Nudge), ('evolve_wels', Shake)])
def test_callbacks_that_draw_random_numbers_when_a_fit_ends(name, cb, tmp_path, monkeypatch):
    m = ALL[name]
    monkeypatch.setitem(SCRIPTS, 'fit', Script(lambda l, cbs, tick: (l.add_cb(cb()), l.fit(1), tick('between fits'), l.fit(1))))
    n, bad = sweep(tmp_path, monkeypatch, m, 'fit', 'sgd', tracked=False, every=3)
    assert n > 3 and not bad, bad


def killed(tmp_path, m, log_at, script='fit', opt='sgd', tracked=False, which=0):
    "The folder at one of the moments"
    with pytest.MonkeyPatch.context() as mp: whole, at = moments(tmp_path, m, script, opt, tracked, mp)
    return whole, [f for w, f in at if w == log_at][which]


def test_file_of_an_older_version(tmp_path):
    "It tells nothing of the ends of fits, and its last epoch was followed by none"
    m = ALL['evolve_wels']
    whole, folder = killed(tmp_path, m, 'as the fit ends')
    state = torch.load(folder/'models'/'run.pth', weights_only=True)
    del state['ended'], state['callbacks']['scheduled']
    state['callbacks']['recorder'].pop('hps', None)
    torch.save(state, folder/'models'/'run.pth')
    assert not same(resumed(folder, m, 'fit', 'sgd', False), whole)


def test_three_generations(tmp_path):
    "The example of the report: killed after the first fit, the third is the third generation still"
    def learner(d, seed=0): return build(tmp_path/d, [KnowledgeEvolution(policy='wels'), RunState('run')], seed=seed)
    whole, half, rest = learner('a'), learner('b'), learner('b', 5)
    for _ in range(3): whole.fit(1)
    half.fit(1)
    rest.resume()
    for _ in range(3): rest.fit(1)
    values = effects(rest.model)['knowledge_evolution'].values
    assert values == effects(whole.model)['knowledge_evolution'].values and values['generation'] == 2
    assert not same(run_record(rest), run_record(whole))


def test_fit_stopped_early_is_over(tmp_path):
    "No epoch after the one that stopped it is trained on resuming, and the best weights are those of that fit"
    from fastai.callback.tracker import EarlyStoppingCallback
    def learner(seed=0, *cbs): return build(tmp_path, [DynamicSparse(.8, period=2), RunState(), EarlyStoppingCallback(min_delta=9., patience=1),
                                                     SaveModelCallback(fname='best'), *cbs], seed=seed)
    whole, m = learner(), METHODS['dsr']
    whole.fit(4)
    assert len(whole.recorder.values) == 2
    shutil.copytree(tmp_path/'models', tmp_path/'then'/'models')
    whole.fit(1)
    whole = finished(whole, m)
    rest = learner(5)
    rest.path = tmp_path/'then'
    rest.resume().fit(4)
    assert len(rest.recorder.values) == 2
    rest.fit(1)
    assert not same(finished(rest, m), whole)


def test_tracker_over_several_fits(tmp_path):
    "One instance in `fit(cbs=...)` of several fits, whose best value goes on"
    def run(path, seed=0, resume=False, kill=False):
        learn = build(path, [DynamicSparse(.8, period=2)], seed=seed)
        best = SaveModelCallback(fname='best', reset_on_fit=False)
        if resume: learn.resume()
        learn.fit(2, cbs=[RunState(), best])
        if not kill: learn.fit(2, 1e-6, cbs=[RunState(), best])
        return finished(learn, METHODS['dsr']) | dict(best=float(best.best))
    whole = run(tmp_path/'a')
    run(tmp_path/'b', kill=True)
    assert not same(run(tmp_path/'b', seed=5, resume=True), whole)


@pytest.mark.parametrize('refused', ['epochs', 'callback'])
def test_fit_that_was_refused_does_not_count(refused, tmp_path):
    "After the remedy the same call continues; it does not begin anew"
    whole, half, rest = build(tmp_path/'a', DynamicSparse(.8)), build(tmp_path/'b', DynamicSparse(.8)), build(tmp_path/'b', seed=5)
    whole.fit(2)
    half.fit(2, cbs=RunState())
    rest.resume()
    with pytest.raises(ValueError, match='epochs' if refused == 'epochs' else 'no such callback'):
        rest.fit(3, cbs=DynamicSparse(.8)) if refused == 'epochs' else rest.fit(2)
    rest.fit(2, cbs=DynamicSparse(.8))
    assert not same(run_record(rest), run_record(whole))


def test_fit_of_no_epoch_does_not_count(tmp_path):
    "`fine_tune(2, freeze_epochs=0)` fits twice, and trains once"
    def run(path, seed=0, kill=False):
        learn = build(path, [DynamicSparse(.8), RunState()], seed=seed, splitter=two_groups)
        if seed: learn.resume()
        learn.fine_tune(1, freeze_epochs=0)
        if not kill: learn.fit(1)
        return learn
    whole = run(tmp_path/'a')
    run(tmp_path/'b', kill=True)
    assert not same(run_record(run(tmp_path/'b', seed=5)), run_record(whole))
    assert not same(run_record(run(tmp_path/'b', seed=6)), run_record(whole))  # the run that was over


def test_lr_find_between_fits_is_no_fit(tmp_path):
    def run(path, seed=0, kill=False):
        learn = build(path, [KnowledgeEvolution(policy='wels'), RunState()], seed=seed)
        if seed: learn.resume()
        learn.fit(1)
        learn.lr_find(num_it=6, show_plot=False)
        if not kill: learn.fit(2)
        return learn
    whole = run(tmp_path/'a')
    run(tmp_path/'b', kill=True)
    assert not same(run_record(run(tmp_path/'b', seed=5)), run_record(whole))
