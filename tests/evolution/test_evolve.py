"""Training in generations: what must hold in every generation, through crashes, files, freezing and other people's callbacks."""
import os
import pickle
import re
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, OptimWrapper
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from torch import nn

from contracts import Stop, build, footprint, quiet, run_record, same, seed_all, small_net, snapshot, tiny_dls, two_groups
import paramfx.evolution.evolve
import paramfx.core.runs
import paramfx.export.materialize # gives Learner materialize  # noqa: F401
from paramfx.core.samples import rng_state
from paramfx.evolution.masks import kels_masks
from paramfx.evolution.callback import KnowledgeEvolution
from paramfx.evolution.forgetting import Rewind
from paramfx.evolution.generations import CosineWarmup, Evaluation # noqa: F401  read by `eval`
from paramfx.evolution.policies import KELS, LLF, POLICIES as CLASSES, WELS, Magnitude, Policy, Snip # noqa: F401  read by `eval`
from paramfx.sparse.callback import DynamicSparse
from paramfx.slicing.callback import SliceTrain
from fresh import run_fresh
from settings import evolve_settings

HERE = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')


@pytest.fixture
def mk(tmp_path):
    "Builder of Learners that write below this test's own folder"
    return partial(build, tmp_path, dls=lambda: tiny_dls(n=64, n_valid=32, bs=16))


def assert_same(a, b): assert not (where := same(a, b)), where
def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def plain_rows(log): return [{k: v for k, v in r.items() if k != 'seconds'} for r in log]
def masks_of(learn, rate=.5): return kels_masks(learn.model, torch.randn(2, 1, 8, 8), rate)


class Each(Callback):
    "Weights, optimizer state, learning rate and buffers when each fit starts to train, and weights when it ends"
    order = 65
    def __init__(self): self.__dict__.update(starts=[], ends=[], fresh=[], lrs=[])
    def before_train(self):
        if 'lr_finder' in self.learn.__dict__: return
        if not self.learn.epoch:
            self.starts.append(snapshot(self.learn.model))
            self.fresh.append(not any(torch.is_tensor(t) for s in self.learn.opt.state.values() for t in s.values()))
    def after_batch(self):
        if self.learn.training: self.lrs.append(self.learn.opt.hypers[-1]['lr'])
    def after_fit(self):
        if not self.learn.lock.locked(): self.ends.append(snapshot(self.learn.model))


# 1. what holds between two generations ---------------------------------------------------------------------------------------

def test_only_what_is_not_kept_changes_and_the_optimizer_begins_anew(mk):
    each = Each()
    learn = mk(each)
    masks = masks_of(learn)
    log = learn.evolve(3, 2, lr=1e-2)
    assert len(log) == 3 and each.fresh == [True]*3
    assert each.lrs[:8] == each.lrs[8:16] == each.lrs[16:]  # the schedule starts again
    for end, start in zip(each.ends, each.starts[1:]):
        for n, t in end.items():
            if n in masks: assert torch.equal(start[n] == t, masks[n]), n
            else: assert torch.equal(start[n], t), n
        for n, m in masks.items():
            fan_in = end[n][0].numel()
            assert start[n][~m].abs().max() <= fan_in**-.5
    assert_same(each.starts[1]['1.2.weight'][masks['1.2.weight']], each.ends[0]['1.2.weight'][masks['1.2.weight']])
    assert not torch.equal(each.starts[1]['1.2.weight'][~masks['1.2.weight']], each.starts[2]['1.2.weight'][~masks['1.2.weight']])  # drawn anew each time


@pytest.mark.parametrize('rate', [.5, .3, {'0.0': .5}])
def test_slim_row_is_the_masked_dense_network(mk, rate):
    learn = mk()
    log = learn.evolve(2, 1, lr=1e-2, policy=KELS(rate))
    masks = masks_of(learn, rate)
    twin = deepcopy(learn.model)
    for n, m in masks.items(): twin.get_parameter(n).data.mul_(m)
    slim = deepcopy(learn).extract_slim().model
    x, y = learn.dls.valid.one_batch()
    assert torch.allclose(twin.eval()(x), slim.eval()(x), atol=1e-5)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in learn.model.parameters())
    acc = float((torch.cat([slim(x).argmax(1) == y for x, y in learn.dls.valid])).float().mean())
    assert log[-1]['slim_accuracy'] == pytest.approx(acc)
    assert footprint(slim).keys() == footprint(small_net()).keys() and not [m for m in slim.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_rate_1_resets_nothing(mk):
    each = Each()
    log = mk(each).evolve(3, 1, lr=1e-2, policy=KELS(1.))
    for end, start in zip(each.ends, each.starts[1:]): assert_same(start, end)
    assert [r['reset'] for r in log] == [0, 0, 0]


FITS = dict(fit=lambda l, n, **kw: l.fit(n, **kw), fit_one_cycle=lambda l, n, **kw: l.fit_one_cycle(n, **kw),
    fit_flat_cos=lambda l, n, **kw: l.fit_flat_cos(n, **kw),
            fine_tune=lambda l, n, **kw: l.fine_tune(n, **kw), fit_sgdr=None)

@pytest.mark.parametrize('method', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune', 'callable', 'cosine_warmup'])
def test_one_generation_is_the_plain_fit(mk, method):
    from paramfx.evolution.generations import EpochLR
    kw = dict(model=partial(small_net, dropout=.3), splitter=two_groups)
    a, b = mk(**kw), mk(**kw)
    seed_all(5); a.dls.train.rng.seed(5)
    if method == 'callable': a.evolve(1, 2, fit_method=lambda learn, epochs, cbs: learn.fit_one_cycle(epochs, 2e-2, cbs=cbs))
    else: a.evolve(1, 2, fit_method=method, lr=2e-2)
    seed_all(5); b.dls.train.rng.seed(5)
    if method == 'callable': b.fit_one_cycle(2, 2e-2)
    elif method == 'cosine_warmup': b.fit(2, 2e-2, cbs=EpochLR('cosine', 5))
    else: getattr(b, method)(2, 2e-2)
    assert_same(snapshot(a.model), snapshot(b.model))
    assert_same(run_record(a), run_record(b))


def test_evaluating_and_writing_changes_nothing(mk):
    "Slim rows, files, bars, the best of all: the weights that are trained are the same"
    def run(**kw):
        learn = mk(model=partial(small_net, dropout=.3))
        log = learn.evolve(3, 1, lr=1e-2, **evolve_settings(**kw))
        return snapshot(learn.model), [r['accuracy'] for r in log]
    first = run()
    for kw in (dict(eval_slim=False), dict(file=None), dict(long_run=True)): assert_same(run(**kw), first)


# 2. all policies and starts --------------------------------------------------------------------------------------------------

POLICIES = ['kels', 'wels', 'llf', 'head', 'lw', 'magnitude', 'snip']

@pytest.mark.parametrize('policy', POLICIES + ['callable'])
def test_policies(mk, policy):
    p = (lambda model, sample, gen: {'1.2.weight': torch.arange(1920).view(10, 192)%3 > 0}) if policy == 'callable' else policy
    each = Each()
    learn = mk(each)
    log = learn.evolve(3, 1, policy=p, lr=1e-2)
    assert all(r['reset'] > 0 for r in log[1:]) or policy in ('magnitude', 'lw')  # what is held grows again; the blocks before the frontier stay
    changed = [[n for n in e if not torch.equal(e[n], s[n])] for e, s in zip(each.ends, each.starts[1:])]
    want = dict(kels={'0.0.weight', '0.3.weight', '1.2.weight'}, callable={'1.2.weight'}, head={'1.2.weight', '1.2.bias'})
    if policy in want: assert all(set(c) == want[policy] for c in changed)
    assert changed[0] and not any('running' in n or n.split('.')[1] in '14' for c in changed for n in c)
    if policy == 'magnitude':
        for n in ('0.0.weight', '0.3.weight', '1.2.weight'):
            zeros = each.starts[1][n] == 0
            assert abs(int(zeros.sum())*2-zeros.numel()) <= 1
            assert torch.equal(each.ends[1][n] == 0, zeros)   # pruned, and trained sparse
            assert (each.ends[2][n][zeros] != 0).float().mean() > .6  # dense again, but for what no gradient reaches


@pytest.mark.parametrize('reinit', ['default', 'zero', 'original', 'rewind', 'pretrained', 'callable'])
def test_reinits(mk, reinit):
    each = Each()
    learn = mk(each, splitter=two_groups)
    masks = masks_of(learn)
    epochs = []
    class Ends(Callback):
        def after_epoch(self): epochs.append(snapshot(self.learn.model)) if not self.learn.lock.locked() else None
    learn.evolve(3, 2, reinit=(lambda n, w, g: torch.full(w.shape, .25)) if reinit == 'callable' else reinit, lr=1e-2, cbs=Ends())
    ref = dict(original=each.starts[0], pretrained=each.starts[0], rewind=epochs[0]).get(reinit)
    for start in each.starts[1:]:
        for n, m in masks.items():
            got = start[n][~m]
            if reinit == 'zero': assert not got.any()
            elif reinit == 'callable': assert (got == .25).all()
            elif reinit == 'default' or reinit == 'pretrained' and n == '1.2.weight':
                assert got.abs().max() <= start[n][0].numel()**-.5 and not torch.equal(got, each.starts[0][n][~m])
            else: assert torch.equal(got, ref[n][~m]), n


def test_distill_learns_from_the_last_generation(mk):
    "The teacher is the whole network before anything was reset; weight 0 is the plain evolution"
    from paramfx.losses import Distill
    seen, ends = [], Each()
    class Spy(Callback):
        order = 66
        def before_train(self): seen.append(snapshot(self.learn.distill.teacher) if 'distill' in self.learn.__dict__ else None)
    a = mk([ends, Spy()])
    a.evolve(3, 1, distill=.5, lr=1e-2)
    assert seen[0] is None
    for t, e in zip(seen[1:], ends.ends): assert_same(t, e)
    (b := mk()).evolve(2, 1, distill=0., lr=1e-2)
    (c := mk()).evolve(2, 1, lr=1e-2)
    assert_same(snapshot(b.model), snapshot(c.model))
    assert not [cb for cb in a.cbs if isinstance(cb, Distill)]


# 3. the best, and the long run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', ['dense', 'slim'])
def test_keep_best(mk, which):
    each = Each()
    learn = mk(each)
    bad = lambda l, epochs, cbs: l.fit(epochs, [1e-2, 1e-2, 5.][len(each.ends)%3 if len(each.ends) < 3 else 2], cbs=cbs)
    log = learn.evolve(3, 2, fit_method=bad, evaluation=Evaluation(keep_best=which))
    values = [r['accuracy' if which == 'dense' else 'slim_accuracy'] for r in log]
    assert_same(snapshot(learn.model), each.ends[int(np.argmax(values))])
    assert int(np.argmax(values)) < 2 or which == 'slim'


def test_long_run_starts_where_the_evolution_did_and_repeats(mk):
    net = partial(small_net, dropout=.3)
    runs = []
    for _ in range(2):
        learn = mk(model=net)
        log = learn.evolve(2, 1, lr=1e-2, evaluation=Evaluation(long_run=True))
        runs.append({k: v for k, v in log.long_run.items() if k != 'seconds'})
    assert runs[0] == runs[1] and runs[0]['epochs'] == 2
    plain = mk(model=net)
    plain.fit_one_cycle(2, 1e-2)
    assert runs[0]['accuracy'] == pytest.approx(float(plain.recorder.values[-1][2])) and runs[0][
        'valid_loss'] == pytest.approx(float(plain.recorder.values[-1][1]), rel=1e-6)


# 4. crashes ------------------------------------------------------------------------------------------------------------------

CHILD = '''
import os, signal, sys
import torch
from functools import partial
from contracts import *
from settings import evolve_settings
import paramfx.evolution.evolve
path, resume, at = sys.argv[1], sys.argv[2] == 'resume', int(sys.argv[3])
class Kill(FastaiCallback):
    order, run_valid = 7, False
    def __init__(self): self.__dict__['seen'] = 0
    def before_batch(self):
        self.__dict__['seen'] += 1
        if self.seen == at: os.kill(os.getpid(), signal.SIGKILL)
learn = build(path, Kill() if at else None, seed=3 if resume else 0, dls=lambda: tiny_dls(n=64, n_valid=32, bs=16), model=partial(small_net, dropout=.3))
if resume: seed_all(77)
log = learn.evolve(4, 1, lr=1e-2, resume=resume, **eval(sys.argv[4]))
torch.save(([{k: v for k, v in r.items() if k != 'seconds'} for r in log], snapshot(learn.model)), path+'/seen.pt')
'''

def child(path, resume, at, kw):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
    return run_fresh(CHILD, str(path), 'resume' if resume else 'new', str(at), kw, env=env)


def test_killed_and_resumed_in_another_process(mk, tmp_path):
    "kill -9 in the third generation; what comes of it is, bit for bit, the run that was left alone"
    kw = "evolve_settings(policy='snip', split_rate=.7, reinit='rewind', keep_best='dense', long_run=True)"
    learn = mk(model=partial(small_net, dropout=.3))
    log = learn.evolve(4, 1, lr=1e-2, **eval(kw))
    path = tmp_path/'killed'
    r = child(path, False, 2*4+2, kw)
    assert r.returncode == -9, r.stderr[-3000:]
    assert not (path/'seen.pt').exists()
    r = child(path, True, 0, kw)
    assert r.returncode == 0, r.stderr[-3000:]
    rows, state = torch.load(path/'seen.pt', weights_only=True)
    assert_same(rows, plain_rows(log))
    assert_same(state, snapshot(learn.model))


@pytest.mark.parametrize('kw', [dict(), dict(policy='wels', resplit=True), dict(policy='llf', reset_norm=True),
    dict(policy='lw'), dict(policy='magnitude'), dict(distill=.5),
                                dict(reinit='original', keep_best='slim'), dict(reinit='pretrained'), dict(fit_method='fine_tune')], ids=str)
@pytest.mark.parametrize('at', [2, 6, 11])
def test_interrupted_and_resumed(mk, kw, at):
    new = lambda *cbs, **k: mk([*cbs], model=partial(small_net, dropout=.3), splitter=two_groups, **k)
    kw = evolve_settings(**kw)
    log = (whole := new()).evolve(3, 1, lr=1e-2, file='whole', **kw)
    with pytest.raises(KeyboardInterrupt): new(Stop(at)).evolve(3, 1, lr=1e-2, **kw)
    rest = new(seed=9)  # other weights, other order: all of it has to come from the file
    again = rest.evolve(3, 1, lr=1e-2, resume=True, **kw)
    assert_same(plain_rows(again), plain_rows(log))
    assert_same(snapshot(rest.model), snapshot(whole.model))


def test_a_finished_evolution_goes_on(mk):
    log = (a := mk()).evolve(4, 1, lr=1e-2, file='a')
    mk().evolve(2, 1, lr=1e-2)
    (c := mk(seed=4)).evolve(4, 1, lr=1e-2, resume=True)
    assert_same(snapshot(c.model), snapshot(a.model))
    d = mk(seed=6)
    assert_same(plain_rows(d.evolve(4, 1, lr=1e-2, resume=True)), plain_rows(log))  # nothing left to train
    assert_same(snapshot(d.model), snapshot(a.model))


# 5. what is refused, before anything changes ---------------------------------------------------------------------------------

def refused(learn, match, error=ValueError, path=None, raw=False, **kw):
    "An error, and a Learner, a network and files as they were"
    state, feet, cbs, rng = snapshot(learn.model), footprint(learn.model), list(learn.cbs), rng_state(learn.dls)
    files = {p: p.read_bytes() for p in Path(learn.path).rglob('*') if p.is_file()}
    kw = {**dict(generations=2, epochs=1), **kw}
    with pytest.raises(error, match=match): learn.evolve(**(kw if raw else evolve_settings(**kw)))
    assert_same(snapshot(learn.model), state)
    assert footprint(learn.model) == feet and list(learn.cbs) == cbs
    assert {p: p.read_bytes() for p in Path(learn.path).rglob('*') if p.is_file()} == files
    assert_same(rng_state(learn.dls), rng)


OTHERS = dict(split_rate=dict(split_rate=.25), policy=dict(policy='wels'), reinit=dict(reinit='zero'),
    seed=dict(seed=1), epochs=dict(epochs=2), lr=dict(lr=1e-3),
              fit_method=dict(fit_method='fit'), distill=dict(distill=.5), pin=dict(pin=['0.0']), eval_slim=dict(eval_slim=False))

def test_other_plans_are_not_resumed(mk):
    kw = dict(epochs=1, lr=1e-2)
    mk().evolve(2, **kw)
    learn = mk(seed=5)
    for name, more in OTHERS.items():
        refused(learn, rf"(?s)other settings.*{name if name != 'pin' else 'KELS'}.*resume=False", generations=4, resume=True, **{**kw, **more})
    wide = mk(model=lambda: nn.Sequential(small_net()[0], nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.Linear(20, 10))))
    refused(wide, 'other settings', generations=4, resume=True, **kw)
    frozen = mk(splitter=two_groups)
    frozen.freeze()
    refused(frozen, 'other settings.*trained', generations=4, resume=True, **kw)
    data = mk(dls=lambda: tiny_dls(n=48, n_valid=32, bs=16))
    refused(data, 'other settings.*data', generations=4, resume=True, **kw)
    assert len(learn.evolve(3, resume=True, **kw)) == 3


def test_missing_and_damaged_files(mk, tmp_path):
    learn = mk()
    refused(learn, 'no evolution was saved', FileNotFoundError, resume=True)
    refused(learn, 'file=', resume=True, file=None)
    learn.save('evolve')
    refused(learn, 'no file of `learn.evolve`', resume=True)
    (tmp_path/'models'/'evolve.pth').write_bytes(b'rubbish')
    refused(learn, 'damaged', resume=True)
    mk().evolve(1, 1)
    f = tmp_path/'models'/'evolve.pth'
    f.write_bytes(f.read_bytes()[:-500])
    refused(learn, 'damaged', resume=True)


def test_a_crash_while_writing_leaves_the_old_file(mk, tmp_path, monkeypatch):
    learn = mk()
    learn.evolve(1, 1)
    f = tmp_path/'models'/'evolve.pth'
    old = f.read_bytes()
    def crash(obj, file, **kw):
        Path(file).write_bytes(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', crash)
    with pytest.raises(OSError): learn.evolve(2, 1, resume=True)
    assert f.read_bytes() == old and os.listdir(f.parent) == ['evolve.pth']


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 10)
    def forward(self, x): return self.b(self.n(self.a(x.flatten(1))))


UNTRACED = "Policies 'wels', 'llf', 'head' and 'magnitude' need no trace"
BAD = [
    (dict(split_rate=0), 'split_rate=0'), (dict(split_rate=1.5), r'split_rate=1\.5'),
    (dict(split_rate=-.1), 'split_rate'), (dict(split_rate='half'), 'split_rate'), (dict(split_rate=float('nan')), 'split_rate'),
    (dict(split_rate={'0.0': 2.}), 'split_rate'), (dict(split_rate={'nowhere': .5}), 'nowhere'), (dict(policy='wels', split_rate={'nowhere': .5}), 'nowhere'),
    (dict(policy='elks'), "policy='elks'"), (dict(policy=3), 'policy=3'), (dict(reinit='orignal'), "reinit='orignal'"), (dict(reinit=3), 'reinit=3'),
    (dict(fit_method='fit_two_cycles'), 'fit_method'), (dict(generations=0), 'generations=0'),
    (dict(generations=2.5), 'generations'), (dict(epochs=0), 'epochs=0'), (dict(epochs=True), 'epochs'),
    (dict(keep_best='slimmest'), 'keep_best'), (dict(evaluation='slim'), 'give Evaluation'),
    (dict(long_run=1), 'long_run=1'),
    (dict(keep_best='slim', policy='wels'), 'keep_best'), (dict(keep_best='slim', eval_slim=False), 'keep_best'),
    (dict(distill=2), 'distill=2'), (dict(distill=True), 'distill'), 
    (dict(reinit='rewind', rewind_epoch=3), r'Rewind\(3\): a generation has 1'), (dict(rewind_epoch=0), r'Rewind\(0\)'),
    (dict(policy='llf', from_layer='nowhere'), 'nowhere'), (dict(pin=['nowhere']), 'nowhere'),
    (dict(policy=lambda m, s, g: {'x': torch.ones(2)}), 'x: the network has no such parameter'),
    (dict(policy=lambda m, s, g: {'1.2.bias': torch.ones(3, dtype=torch.bool)}), r'1\.2\.bias'),
    (dict(policy=lambda m, s, g: {}), 'masks'), (dict(policy=lambda m, s, g: {'1.2.bias': torch.ones(10)}), 'bool'),
]

@pytest.mark.parametrize('kw,match', BAD, ids=[str({k: v if not callable(v) else 'f' for k, v in b[0].items()}) for b in BAD])
def test_bad_settings(mk, kw, match): refused(mk(), match, **kw)


def takes_no_rate(learn, epochs, cbs=None): learn.fit(epochs, cbs=cbs)


def test_bad_arguments_of_the_fit(mk):
    refused(mk(), 'fit_one_cycle', TypeError, fit_method=partial(Learner.fit_one_cycle, wrong=3))
    refused(mk(), 'takes_no_rate', TypeError, fit_method=takes_no_rate, lr=1e-2)


def test_networks_that_cannot_be_cut(mk):
    refused(mk(model=Normed), f'(?s)LayerNorm.*{UNTRACED}')
    refused(mk(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), f'(?s){UNTRACED}')  # nothing between input and output
    computed = small_net()
    torch.nn.utils.parametrizations.weight_norm(computed[0][3])
    learn = mk(model=lambda: computed)
    refused(learn, f'(?s)0.3.*{UNTRACED}')
    refused(learn, '(?s)0.3.*(computed|parametri)', policy='wels')
    mk(model=Normed).evolve(2, 1, policy='wels')
    mk(model=Normed).evolve(2, 1, policy=LLF('b'))


def test_all_frozen_is_refused(mk):
    learn = mk(splitter=two_groups)
    for p in learn.model[1].parameters(): p.requires_grad_(False)
    refused(learn, 'frozen', policy='head')


@pytest.mark.parametrize('kw,match', [(dict(when='now'), 'when'), (dict(every=2), 'every'),
    (dict(when='every'), 'every'), (dict(when='every', every=0), 'every'), (dict(clear_state='some'), 'clear_state'),
                                      (dict(policy='lw'), 'generations'), (dict(split_rate=0), 'split_rate'),
                                      (dict(policy='nope'), 'policy'), (dict(reinit='nope'), 'reinit')])
def test_bad_settings_of_the_callback(kw, match):
    with pytest.raises(ValueError, match=match): KnowledgeEvolution(**evolve_settings(**kw))


def test_the_callback_refuses_what_it_cannot_cut(mk):
    learn = mk(model=Normed)
    state, feet, cbs = snapshot(learn.model), footprint(learn.model), list(learn.cbs)
    with pytest.raises(ValueError, match=UNTRACED): learn.add_cb(KnowledgeEvolution())
    with pytest.raises(ValueError, match=UNTRACED): learn.fit(1, cbs=KnowledgeEvolution())
    assert_same(snapshot(learn.model), state)
    assert footprint(learn.model) == feet and list(learn.cbs) == cbs


def test_evolve_under_the_callback_is_refused(mk):
    refused(mk(KnowledgeEvolution()), 'learn.release')


# 6. frozen layers and `fine_tune` ---------------------------------------------------------------------------------------------

def test_frozen_parameters_are_never_reset(mk):
    learn = mk(each := Each(), splitter=two_groups)
    learn.freeze()
    body = weights(learn.model[0])
    log = learn.evolve(3, 1, lr=1e-2)
    now = weights(learn.model[0])
    for n in body:
        if n.split('.')[0] in '03': assert torch.equal(now[n], body[n]), n  # fastai trains norms of frozen groups
    assert log[-1]['reset'] == int((~masks_of(learn)['1.2.weight']).sum()) and learn.opt.frozen_idx == 1
    for end, start in zip(each.ends, each.starts[1:]): assert not torch.equal(end['1.2.weight'], start['1.2.weight'])


@pytest.mark.parametrize('kw', [dict(), dict(when='fit_end'), dict(when='every', every=1)], ids=str)
def test_fine_tune_keeps_the_new_head(mk, kw):
    "Between its two halves nothing is reset: the head that the first one trained goes into the second"
    each = Each()
    learn = mk([KnowledgeEvolution(policy='head', **kw), each], splitter=two_groups)
    learn.fine_tune(1, freeze_epochs=1)
    assert_same({k: v for k, v in each.starts[1].items() if 'effect' not in k}, {k: v for k, v in each.ends[0].items() if 'effect' not in k})
    trained = each.ends[1]
    if kw.get('when') == 'fit_end': assert not torch.equal(learn.model[1][2].weight, trained['1.2.weight'])
    else: assert torch.equal(learn.model[1][2].weight, trained['1.2.weight'])
    learn.fine_tune(1, freeze_epochs=1)
    assert not torch.equal(each.starts[2]['1.2.weight'], trained['1.2.weight'])  # a generation later
    assert_same({k: v for k, v in each.starts[3].items() if 'effect' not in k}, {k: v for k, v in each.ends[2].items() if 'effect' not in k})
    assert learn.knowledge_evolution.effect.values['generation'] == (2 if kw.get('when') == 'fit_end' else 1)


def test_what_was_frozen_is_reset_when_it_is_trained_again(mk):
    "kels in a second `fine_tune`: the head when it starts, the body when it is unfrozen; each once"
    each = Each()
    learn = mk([KnowledgeEvolution(), each], splitter=two_groups)
    masks = masks_of(learn)
    learn.fine_tune(1, freeze_epochs=1)
    learn.fine_tune(1, freeze_epochs=1)
    end, head, mid, body = each.ends[1], each.starts[2], each.ends[2], each.starts[3]
    assert torch.equal(head['1.2.weight'] == end['1.2.weight'], masks['1.2.weight']) and torch.equal(head['0.3.weight'], end['0.3.weight'])
    assert torch.equal(body['0.3.weight'] == mid['0.3.weight'], masks['0.3.weight']) and torch.equal(body['1.2.weight'], mid['1.2.weight'])


def test_pretrained_bodies_are_warned_about(mk):
    learn = mk(splitter=two_groups)
    learn.pretrained = True
    with pytest.warns(UserWarning, match="(?s)pretrained.*'head' and 'llf'.*reinit='pretrained'"): learn.evolve(1, 1)
    for kw in (dict(policy='head'), dict(policy='llf'), dict(reinit='pretrained')):
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='.*pretrained body')
            learn.evolve(1, 1, **kw)


# 7. the callback beside those of others -----------------------------------------------------------------------------------------

def test_callback_and_evolve_are_the_same_run(mk):
    (a := mk()).evolve(3, 2, fit_method='fit', lr=1e-2)
    b = mk(KnowledgeEvolution())
    for _ in range(3): b.fit(2, 1e-2)
    c = mk()
    for _ in range(3): c.fit(2, 1e-2, cbs=KnowledgeEvolution())
    for o in (b, c): assert_same(weights(o.model), weights(a.model))


@pytest.mark.parametrize('when', ['fit_end', 'next_fit'])
def test_save_model_callback(mk, when):
    "The best epoch is reloaded first; then, or in the next fit, the generation begins"
    bad = lambda l: l.fit(2, cbs=[SaveModelCallback(fname='best'), Spoil()])
    class Spoil(Callback):
        order = 20
        def before_epoch(self): self.learn.opt.set_hyper('lr', [1e-2, 3.][self.learn.epoch])
    learn = mk([KnowledgeEvolution(when=when), each := Each()])
    bad(learn)
    best = torch.load(learn.path/'models'/'best.pth', weights_only=True)
    masks = masks_of(learn)
    if when == 'fit_end':
        for n, m in masks.items(): assert torch.equal(learn.model.get_parameter(n) == best[n], m)
        learn.restore_generation()
    assert_same(weights(learn.model), {n: best[n] for n in weights(learn.model)})
    learn.fit(1)
    for n, m in masks.items(): assert torch.equal(each.starts[1][n] == best[n], m), n  # the weights of the best epoch seed the next generation
    assert learn.knowledge_evolution.effect.values['generation'] == (2 if when == 'fit_end' else 1)


def test_trackers_within_evolve(mk):
    "Each generation ends with its best epoch, and the log says so"
    class Spoil(Callback):
        order = 20
        def before_epoch(self): self.learn.opt.set_hyper('lr', [1e-2, 3.][self.learn.epoch])
    learn = mk()
    log = learn.evolve(2, 2, fit_method='fit', cbs=[SaveModelCallback(fname='best'), Spoil()])
    assert log[-1]['valid_loss'] == pytest.approx(float(learn.validate()[0]), rel=1e-6)
    learn = mk()
    log = learn.evolve(2, 9, fit_method='fit', cbs=[EarlyStoppingCallback(patience=1, min_delta=9.)])
    assert len(log) == 2


@pytest.mark.parametrize('policy', ['kels', 'llf', 'magnitude', 'lw'])
def test_restore_generation(mk, policy):
    cb = KnowledgeEvolution(LLF(reset_norm=True) if policy == 'llf' else policy, when='fit_end', generations=3)
    learn = mk([cb, each := Each()])
    for i in range(2):
        learn.fit(1)
        for o in (learn, pickle.loads(pickle.dumps(learn)), deepcopy(learn)):
            if o is not learn: o.restore_generation()
            assert i or o is learn or same(weights(o.model), weights(learn.model))
        learn.restore_generation()
        assert_same({k: v for k, v in snapshot(learn.model).items() if 'effect' not in k}, {k: v for k, v in each.ends[i].items() if 'effect' not in k})
        with pytest.raises(ValueError, match='no generation to restore'): learn.restore_generation()
    with pytest.raises(ValueError, match='not under'): mk().restore_generation()


def test_lr_find_looks_at_the_network_that_comes(mk):
    "It sees the re-initialised weights, and the run goes on as if it had not been called"
    seen = []
    class First(Callback):
        order = 65
        def before_train(self): seen.append(weights(self.learn.model)) if 'lr_finder' in self.learn.__dict__ else None
    def run(look):
        learn = mk([KnowledgeEvolution(), each := Each(), First()])
        learn.fit(1)
        if look:
            facts = snapshot(learn.model), dict(learn.knowledge_evolution.effect.values)
            learn.lr_find(num_it=6, show_plot=False, stop_div=False)
            assert_same((snapshot(learn.model), dict(learn.knowledge_evolution.effect.values)), facts)
        seed_all(3); learn.dls.train.rng.seed(3)
        learn.fit(1)
        return snapshot(learn.model), each.starts[1]
    a, b = run(False), run(True)
    assert_same(a, b)
    assert_same(seen[0], {n: a[1][n] for n in seen[0]})


@pytest.mark.few(3)
@pytest.mark.parametrize('cb', [KnowledgeEvolution, partial(KnowledgeEvolution, when='fit_end'),
    partial(KnowledgeEvolution, 'snip'), partial(KnowledgeEvolution, 'lw', generations=3),
                                partial(KnowledgeEvolution, reinit='rewind')], ids=['kels', 'fit_end', 'snip', 'lw', 'rewind'])
def test_copies_and_pickles_go_on_alike(mk, cb):
    learn = mk(cb())
    learn.fit(1)
    got = []
    for o in (deepcopy(learn), pickle.loads(pickle.dumps(learn)), learn):
        seed_all(3); o.dls.train.rng.seed(3)
        quiet(o).fit(1)
        got.append(snapshot(o.model))
    assert_same(got[0], got[2])
    assert_same(got[1], got[2])


def test_exported_learner_needs_nothing_else(mk, tmp_path):
    learn = mk()
    learn.evolve(2, 1, lr=1e-2)
    learn.extract_slim()
    x, _ = learn.dls.valid.one_batch()
    want = learn.model.eval()(x)
    learn.export('slim.pkl')
    torch.save((x, want.detach()), tmp_path/'it.pt')
    code = '''
import torch
from fastai.basics import load_learner
learn = load_learner('slim.pkl')
x, want = torch.load('it.pt')
assert torch.equal(learn.model.eval()(x), want)
assert all('paramfx' not in type(m).__module__ for m in learn.model.modules())
'''
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent)])}
    r = run_fresh(code, env=env, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]


# 8. other effects, networks and data --------------------------------------------------------------------------------------------

def test_sparse_networks_evolve(mk):
    "What is dead stays dead through every reset, and the slim network has it burnt in"
    learn = mk(DynamicSparse(.5, method='static'))
    dead = {n: ~m for n, m in learn.dynamic_sparse.masks.items()}
    log = learn.evolve(3, 1, lr=1e-2)
    for n, m in dead.items(): assert not learn.model.get_parameter(n).detach()[m].any(), n
    assert len(log) == 3 and all('slim_accuracy' in r for r in log)
    (b := mk(DynamicSparse(.5, method='static', )) ).evolve(2, 1, policy='wels', lr=1e-2)
    for n, m in b.dynamic_sparse.masks.items(): assert not b.model.get_parameter(n).detach()[~m].any(), n


def test_evolution_beside_sparse_training(mk):
    learn = mk([DynamicSparse(.5, period=2), KnowledgeEvolution(when='every', every=1)])
    learn.fit(3)
    for n, m in learn.dynamic_sparse.masks.items(): assert not learn.model.get_parameter(n).detach()[~m].any(), n
    assert learn.knowledge_evolution.effect.values['generation'] == 2


def test_sliced_networks_evolve(mk):
    learn = mk(SliceTrain((1, .5)))
    log = learn.evolve(2, 1, lr=1e-2)
    assert len(log) == 2 and log[-1]['reset'] > 0
    mk(SliceTrain((1, .5))).evolve(2, 1, policy='wels', lr=1e-2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        self.core = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.)
    def forward(self, x): return self.head(self.core(self.up(x.view(len(x), 8, 8))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.core, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)
    def forward(self, x): return self.head(self.core(x.view(len(x), 8, 8))[0].mean(1))


def text_learner(path, model):
    "Pairs of words and the words that follow, with fastai's callbacks of language models"
    from fastai.callback.rnn import ModelResetter
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    seed_all()
    words = torch.randint(30, (16, 9), generator=torch.Generator().manual_seed(0))
    items = [(w[:-1], w[1:]) for w in words]
    return quiet(Learner(DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4)), model(),
        CrossEntropyLossFlat(), path=path, cbs=ModelResetter(), lr=1e-2))


def awd_lstm():
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder
    body = AWD_LSTM(30, 8, 12, 2)
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, LinearDecoder(30, 8, .1, tie_encoder=body.encoder)
        def forward(self, x): return self.head(self.body(x))[0]
        def reset(self): self.body.reset()
    return First()


def lstm_lm():
    from paramfx.zoo.networks import LSTMLM
    return LSTMLM(30, 8)


@pytest.mark.parametrize('model', [lstm_lm, awd_lstm])
@pytest.mark.parametrize('policy', ['wels', 'head', 'magnitude'])
def test_language_models(tmp_path, model, policy):
    "Their decoder is the embedding, which only who asks for it draws anew"
    learn = text_learner(tmp_path, model)
    if policy == 'head':
        with pytest.raises(ValueError, match='embeddings are left alone') as e: learn.evolve(2, 1, policy=policy)
        policy = LLF(re.search(r"policy=LLF\('(.*?)'\)", str(e.value))[1])
    log = learn.evolve(2, 1, policy=policy)
    assert log[-1]['reset'] > 0 and np.isfinite(log[-1]['valid_loss'])


@pytest.mark.parametrize('net', [Transformer, Recurrent])
def test_networks_that_are_not_traced(mk, net):
    if net is Transformer: refused(mk(model=net), UNTRACED)
    for policy in ('wels', 'llf', 'head', 'magnitude', 'snip'):
        log = mk(model=net).evolve(2, 1, policy=LLF('core') if policy == 'llf' else policy, lr=1e-2)
        assert log[-1]['reset'] > 0


def test_without_validation_set_or_metrics(mk):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    learn = mk(dls=DataLoaders(DataLoader(list(zip(*tiny_dls(n=64, bs=64).one_batch())), bs=16), DataLoader([], bs=16)))
    log = learn.evolve(2, 1, lr=1e-2)
    assert 'train_loss' in log[-1] and 'slim_valid_loss' not in log[-1]
    refused(learn, 'no validation set', keep_best='dense')
    learn = mk(metrics=None)
    log = learn.evolve(2, 1, lr=1e-2, evaluation=Evaluation(keep_best='slim'))
    assert set(log[-1]) >= {'train_loss', 'valid_loss', 'slim_valid_loss'}


def test_two_inputs(mk):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(16, 10)
        def forward(self, x, y): return self.head((self.a(x.flatten(1))+self.b(y.flatten(1))).relu())
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    x, y = tiny_dls(n=64, bs=64).one_batch()
    items = [(a, a.flip(-1), b) for a, b in zip(x, y)]
    dls = DataLoaders(DataLoader(items, bs=16, shuffle=True), DataLoader(items, bs=16))
    dls.n_inp = 2
    for policy in ('kels', 'snip'): assert mk(dls=dls, model=Two).evolve(2, 1, policy=policy, lr=1e-2)[-1]['reset'] > 0
    learn = mk(KnowledgeEvolution('snip'), dls=dls, model=Two)
    learn.fit(1); learn.fit(1)


def test_data_parallel(mk):
    a, b = mk(), mk()
    (a := mk()).evolve(2, 1, lr=1e-2)
    b = mk()
    b.model = nn.DataParallel(b.model)
    b.evolve(2, 1, lr=1e-2)
    assert_same(snapshot(b.model.module), snapshot(a.model))


def test_torch_optimizers(mk):
    "An optimizer of torch forgets as well"
    kw = dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    (a := mk(**kw)).evolve(2, 1, fit_method='fit', lr=1e-2)
    b = mk(KnowledgeEvolution(), **kw)
    for _ in range(2): b.fit(1, 1e-2)
    assert_same(weights(a.model), weights(b.model))


def test_two_evolutions_in_a_row(mk):
    "The second one is a new one: it begins with the network as it is, and its report takes the place of the first"
    learn = mk()
    learn.evolve(2, 1, lr=1e-2)
    log = learn.evolve(3, 1, policy='wels', lr=1e-2)
    assert len(log) == 3 and len(learn.paramfx['evolve']) == 3
    with pytest.raises(ValueError, match="policy 'kels'"): learn.extract_slim()


# 9. settings that are objects -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw,told', [
    (dict(split_rate=.4), 'policy=KELS(split_rate=0.4) instead of split_rate=0.4'),
    (dict(split_rate=.4, pin=['0.0']), "policy=KELS(split_rate=0.4, pin=['0.0']) instead of split_rate=0.4, pin=['0.0']"),
    (dict(policy='wels', split_rate=.4, resplit=True), 'policy=WELS(split_rate=0.4, resplit=True)'),
    (dict(policy='llf', from_layer='1', reset_norm=True), "policy=LLF(from_layer='1', reset_norm=True)"),
    (dict(from_layer='1'), "policy=LLF(from_layer='1')"),
    (dict(policy='snip', batches=2), 'policy=Snip(batches=2)'),
    (dict(policy='llf', split_rate=.4), "policy='llf' alone, which has no split_rate"),
    (dict(reinit='rewind', rewind_epoch=3), 'reinit=Rewind(3) instead of rewind_epoch=3')])
def test_settings_of_policies_that_have_moved(mk, kw, told):
    with pytest.raises(TypeError) as e: KnowledgeEvolution(**kw)
    assert str(e.value).startswith('KnowledgeEvolution: write ') and told in str(e.value)
    refused(mk(), re.escape(told), TypeError, **{k: v for k, v in kw.items()}, raw=True)
    new = told.partition(' instead of ')[0].partition(' alone')[0]
    cb = eval(f'KnowledgeEvolution({new})')
    held = {**vars(cb.policy), 'rewind_epoch': getattr(cb.reinit, 'epoch', None)}
    given = {k: v for k, v in kw.items() if k not in ('policy', 'reinit') and 'alone' not in told}
    assert {k: held[k] for k in given} == given


@pytest.mark.parametrize('kw,told', [
    (dict(eval_slim=False, long_run=True), 'evaluation=Evaluation(slim=False, long_run=True)'),
    (dict(keep_best='slim'), "evaluation=Evaluation(keep_best='slim')"),
    (dict(wd=.1), 'fit_method=partial(Learner.fit_one_cycle, wd=0.1)'), (dict(fit_method='fit', wd=.1), 'fit_method=partial(Learner.fit, wd=0.1)'),
    (dict(fit_method='cosine_warmup', warmup=1), 'fit_method=CosineWarmup(1)'), (dict(sample=3), 'nothing .the first batch is traced.')])
def test_settings_of_evolve_that_have_moved(mk, kw, told):
    refused(mk(), '^evolve: write ' + (told if 'nothing' in told else re.escape(told)), TypeError, raw=True, **kw)
    if 'nothing' not in told: assert len(eval(f'mk().evolve(1, 1, file=None, {told})')) == 1


def test_a_file_of_flat_settings_is_gone_on_with(mk, tmp_path):
    "What `evolve(fit_method='fit_one_cycle', pct_start=.5, policy='wels', resplit=True, reinit='rewind', rewind_epoch=1)` wrote before there were objects"
    from paramfx.core.runs import read_torch
    kw = dict(policy=WELS(.5, resplit=True), reinit=Rewind(1), lr=1e-2, fit_method=partial(Learner.fit_one_cycle, pct_start=.5),
        evaluation=Evaluation(keep_best='dense'))
    mk().evolve(2, 1, **kw)
    config = read_torch(tmp_path/'models'/'evolve.pth', 'cpu')['config']
    assert {k: config[k] for k in ('policy', 'reinit', 'rewind_epoch', 'fit_method', 'kwargs', 'eval_slim', 'keep_best')} == dict(
        policy='WELS(split_rate=0.5, seed=0, resplit=True)', reinit='rewind', rewind_epoch=1, fit_method='fit_one_cycle', kwargs=dict(pct_start=.5),
        eval_slim=False, keep_best='dense')
    assert len(mk(seed=3).evolve(3, 1, resume=True, **kw)) == 3


def test_equal_policies_continue_what_is_in_force(mk):
    learn = mk(KnowledgeEvolution(KELS(.5, pin=['0.0']), Rewind()))
    learn.fit(1)
    learn.fit(1, cbs=KnowledgeEvolution(KELS(.5, pin=['0.0']), 'rewind'))
    with pytest.raises(ValueError, match=r"policy\.pin=\['0\.0'\] -> None"): learn.add_cb(KnowledgeEvolution(KELS(.5), 'rewind'))
    with pytest.raises(ValueError, match='reinit.epoch=1 -> 2'): learn.add_cb(KnowledgeEvolution(KELS(.5, pin=['0.0']), Rewind(2)))
    with pytest.raises(ValueError, match='policy=.*WELS'): learn.add_cb(KnowledgeEvolution('wels', 'rewind'))


def test_policies_are_settings_without_a_state(mk):
    "What one notes while a network evolves does not stay in the object that was given"
    for name, cls in CLASSES.items():
        p = cls()
        before = dict(vars(p))
        mk().evolve(2, 1, policy=p, lr=1e-2)
        assert vars(p) == before and p == cls() and p != Policy(), name
        with pytest.raises(AttributeError): p.split_rate = .3
    assert Magnitude(.5) != Magnitude(.4)
    mk(KnowledgeEvolution(WELS(resplit=True), seed=3)).fit(1)


@pytest.mark.parametrize('policy', CLASSES)
def test_recipes_tell_policies_as_plain_data(mk, tmp_path, policy):
    from paramfx.export.materialize import load_recipe, save_recipe
    make = lambda: KnowledgeEvolution(CLASSES[policy](), Rewind(2), generations=3, seed=4)
    learn = mk(make())
    learn.fit(1)
    save_recipe(learn.model, tmp_path/'r')
    args, = [s['args'] for s in torch.load(tmp_path/'r', weights_only=True)['recipe']]
    assert args['settings']['policy']['name'] == CLASSES[policy].__name__ and args['settings']['reinit'] == dict(name='Rewind', epoch=2)
    other = mk(model=lambda: load_recipe(tmp_path/'r', small_net()))
    other.add_cb(make())
    with pytest.raises(ValueError, match='seed=4 -> 0'): other.add_cb(KnowledgeEvolution(CLASSES[policy](), Rewind(2), generations=3))


def test_remedies_of_the_cut_are_those_of_its_policy(mk):
    learn = mk(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10)))
    with pytest.raises(ValueError) as e: learn.evolve(2, 1)
    remedy = re.search(r'policy=KELS\(split_rate=.*?\)', str(e.value))[0]
    assert len(learn.evolve(2, 1, policy=eval(remedy[7:]), file=None)) == 2
