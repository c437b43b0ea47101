"""Dynamic sparse training against the published code (tests/golden/dynamic_sparse/README.md).

Each test calls the function that `DynamicSparse` calls, or trains with the callback itself."""
import json
from functools import partial
from math import prod

import numpy as np
import pytest
import torch
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper
from torch import nn

import paramfx.sparse.callback as callback
import paramfx.sparse.methods as rewire
from paramfx.core.clock import SchedSteps, read_steps
from paramfx.masks.store import Masked, density_erk, initial_counts
from paramfx.core.clock import SchedConst
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.moves import adapt_threshold, allocate_growth, drop_fraction, drop_threshold, unit_values, grow_top
from paramfx.sparse.prune import IterativePrune, prune_counts, prune_fractions
from paramfx.sparse.tied import TIED, tied_index
from paramfx.core.samples import generator
from paramfx.masks.units import unit_shape
from paramfx.sparse.methods import DSR, SET, SNFS, DeepR, RigL
from paramfx.sparse.penalties import L1, GroupLasso

GRANULARITY = {1: 'filter', 2: 'kernel', 3: 'row', 4: 'weight'}


@pytest.fixture(scope='module')
def folder(golden): return golden/'dynamic_sparse'


def load(folder, name): return json.loads((folder/f'{name}.json').read_text())
def arrays(folder, name): return dict(np.load(folder/f'{name}.npz'))
def as_mask(m, ndim): return torch.from_numpy(m).view(*m.shape, *[1]*(ndim-m.ndim))


def masked(w, mask):
    "A `Masked` weight with the recorded mask; the weight is set as recorded afterwards"
    layer = (nn.Linear if w.ndim == 2 else nn.Conv2d)(w.shape[1], w.shape[0], **({} if w.ndim == 2 else {'kernel_size': w.shape[2:]}))
    e = Masked('l', layer, 'weight', as_mask(mask, w.ndim))
    e.weight.data.copy_(torch.from_numpy(w)).mul_(e.float)
    return e


def drop(e, threshold):
    "Mask after the callback's own drop, in the recorded shape"
    gone = drop_threshold(unit_values(e), e.mask, threshold, e.live)
    return e.mask & ~e.picked(gone), len(gone)


# -- counts and densities
def test_initial_counts(folder):
    models = load(folder, 'initial_counts')
    for m in models:
        unit = 'kernel' if 'sub_kernel_granularity=2' in m['model'] else 'weight'
        for layer in m['sparse_layers']:
            shape = tuple(layer['shape'])
            got = initial_counts([shape], sparsity_of(m['model'], len(shape) == 2), unit)
            assert got == [layer['units']], (m['model'], layer['name'])
            assert got[0]*prod(shape)//prod(unit_shape(shape, unit)) == layer['nonzeros']
        assert sum(layer['nonzeros'] for layer in m['sparse_layers']) == m['sparse']
    assert sum(len(m['sparse_layers']) for m in models) > 300


def sparsity_of(name, fc):
    args = dict(a.split('=') for a in name.split('(')[1].rstrip(')').split(',') if '=' in a)
    if name.startswith('mnist_mlp'): return float(name.split('(')[1].split(',')[0].rstrip(')'))
    return float(args.get('initial_sparsity_fc' if fc else 'initial_sparsity_conv', 0))


def test_erk(folder):
    for case in load(folder, 'erk'):
        shapes = [tuple(o['shape_hwio_or_io']) for o in case['layers']]
        got = density_erk(shapes, case['sparsity'])
        for d, o in zip(got, case['layers']): assert abs((1-d)-o['sparsity']) < 1e-9, o['name']
        total = sum(d*prod(s) for d, s in zip(got, shapes))/sum(map(prod, shapes))
        assert abs(total-case['total_density']) < 1e-9


def test_schedule_lookup(folder):
    golden = load(folder, 'schedule_lookup')
    odd = golden.pop('first_key_not_zero')
    for file, knobs in golden.items():
        for knob, points in knobs.items():
            table = {}  # the change points of the recorded values
            for e, v in points:
                if not table or v != list(table.values())[-1]: table[e] = v
            text = f'{knob}:\n' + ''.join(f'  - {e}: {v!r}\n' for e, v in table.items())
            sched, = read_steps(text, n_epoch=400).values()
            for e, v in points: assert sched.at(e) == v == sched(e/400), (file, knob, e)
    table = {int(k): v for o in odd['schedule'] for k, v in o.items()}
    for e, v in odd['values']:  # before the first key ours holds the first value, the original its last one
        assert SchedSteps(table).at(e) == (v if e >= min(table) else table[min(table)])


# -- pruning: how much, when, how many
def test_prune_schedules(folder):
    cases, prunes = load(folder, 'prune_schedules'), 0
    for c in cases:
        n, targets = c['iterations'], dict(fc=c['resolved_target_fc'], conv=c['target_conv'], special=c['resolved_target_special'])
        for kind, s in targets.items():
            got = {how: prune_fractions(s, n, how) for how in ('exponential', 'cubic')}
            assert np.abs(np.array(got['exponential'])-c['exponential'][kind]).max() < 1e-12
            assert np.abs(np.array(got['cubic'])-c['cubic'][kind]).max() < 1e-12
            for how, f in got.items():
                zeros = 1-np.cumprod(1-np.array(f))
                assert np.abs(zeros-c[f'{how}_sparsity'][kind]).max() < 1e-12
                for shape, of in zip(c['count_layers'], ('fc', 'conv', 'special')):
                    if of == kind: check_counts(c, how, kind, prod(shape), s, n, f)
        cb = IterativePrune(n_prunes=n, start=c['start_epoch'], every=c['frequency'], post=c['post_prune_epochs'])
        assert [e for e in range(c['n_epochs']) if cb.falls_on(e)][:n] == c['prune_at_end_of_epochs']
        assert cb.run_length == c['n_epochs']
        prunes += n
    assert prunes > 50


def check_counts(c, how, kind, units, s, n, fractions):
    "The original drops int(f*n)+1 of what is left, and lands below its target; ours is the density after k prunes, in whole units"
    left, ours, golden = units, prune_counts(units, s, n, how), [o[('fc', 'conv', 'special').index(kind)] for o in c[f'{how}_counts_original']]
    for f, expect in zip(fractions, golden):
        left -= int(f*left)+1
        assert left == expect, (c['args'], how, kind)
    assert ours[-1] == initial_counts([(units, 1)], s)[0]
    assert golden[-1] < ours[-1] or n == 1 and golden == ours[1:]
    assert all(a == max(1, int((1-z)*units+.1)) for a, z in zip(ours[1:], c[f'{how}_sparsity'][kind]))


# -- one rewire, piece by piece
def test_growth_allocation(folder):
    for c in load(folder, 'growth_allocation'):
        got = allocate_growth(c['pruned'], c['R'], c['free'])
        assert got == c['spec_G'], c['name']
        assert sum(got) == c['K']-c['spec_unplaced']


def test_dsr_trace(folder):
    z = arrays(folder, 'dsr_trace')
    n_p, tol, steps, layers = int(z['N_p']), float(z['tolerance']), int(z['steps']), int(z['n_layers'])
    unpack = lambda key, shape: np.unpackbits(z[key])[:prod(shape)].astype(bool).reshape(shape)
    seen = 0
    for t in range(steps):
        n = 0
        for l in range(layers):
            w = z[f'w_{t}_{l}']
            shape = w.shape[:int(z['granularity'][l])]
            e = masked(w, unpack(f'mask_before_{t}_{l}', shape))
            kept, k = drop(e, float(z['thresholds'][t]))
            expect = unpack(f'mask_pruned_{t}_{l}', shape)
            if k == e.live-1 and expect.sum() == 1: assert kept.sum() == 1  # the original keeps the first unit, ours the largest
            else: assert np.array_equal(kept.view(shape).numpy(), expect), (t, l)
            assert k == z['n_pruned'][t][l] and e.live-k == z['n_remaining'][t][l]
            n, seen = n+k, seen+1
        free = [prod(unpack_shape(z, t, l))-z['n_remaining'][t][l]-z['n_pruned'][t][l] for l in range(layers)]
        grow = allocate_growth(z['n_pruned'][t].tolist(), z['n_remaining'][t].tolist(), [int(f) for f in free])
        assert sum(grow) == z['n_grown'][t].sum() == n  # the original's shares differ by its random leftover only
        assert all(abs(g-n*r/sum(z['n_remaining'][t])) < 1 for g, r in zip(grow, z['n_remaining'][t]))
        assert adapt_threshold(float(z['thresholds'][t]), n, n_p, tol) == z['thresholds'][t+1], t
    assert seen == steps*layers and steps > 10
    assert len(set(z['nonzeros'].sum(1))) == 1


def unpack_shape(z, t, l): return z[f'w_{t}_{l}'].shape[:int(z['granularity'][l])]


@pytest.mark.parametrize('g', [1, 2, 3, 4])
def test_subkernel(folder, g):
    facts = next(o for o in load(folder, 'subkernel') if o['granularity'] == g)
    z = arrays(folder, 'subkernel')
    w, mask0 = z[f'w_{g}'], z[f'mask0_{g}']
    assert unit_shape(w.shape, GRANULARITY[g])[:g] == mask0.shape
    e = masked(w, mask0)
    assert e.live == facts['units0']
    kept, _ = drop(e, facts['threshold'])
    assert np.array_equal(kept.view(mask0.shape).numpy(), z[f'mask_thr_{g}'])
    assert np.array_equal((torch.from_numpy(w)*kept).numpy(), z[f'eff_thr_{g}'])
    # fraction prune of the original: the int(f*n)+1 smallest scores go
    gone = drop_fraction(unit_values(e).abs(), e.mask, (int(facts['fraction']*e.live)+1+1e-9)/e.live)
    assert np.array_equal((e.mask & ~e.picked(gone)).view(mask0.shape).numpy(), z[f'mask_frac_{g}'])


def test_keep_one(folder):
    z = arrays(folder, 'subkernel')
    w, mask0 = z['keepone_w'], z['keepone_mask0']
    e = masked(w, mask0)
    kept, _ = drop(e, 1e9)
    assert kept.sum() == z['keepone_mask1'].sum() == 1
    assert kept.flatten()[(torch.from_numpy(w).abs()*e.mask).flatten().argmax()]


@pytest.mark.parametrize('case', range(4))
def test_tied(folder, case):
    facts, z = load(folder, 'tied')[case], arrays(folder, 'tied')
    alloc, bank, expanded, upstream, grad = (torch.from_numpy(z[f'{k}_{case}']) for k in ('alloc', 'bank', 'expanded', 'upstream', 'bank_grad'))
    n, b, shape = len(alloc), facts['num_weights'], tuple(facts['shape'])
    assert round((1-facts['sparsity'])*n) == b == len(bank)
    for idx in (alloc, tied_index(n, b, generator(0))):  # theirs, and ours
        counts = idx.bincount(minlength=b)
        assert (int(counts.min()), int(counts.max())) == (facts['multiplicity_min'], facts['multiplicity_max']) == (n//b, -(-n//b))
        assert int((counts == counts.max()).sum()) == facts['n_max']
    layer = (nn.Linear if len(shape) == 2 else nn.Conv2d)(shape[1], shape[0], **({} if len(shape) == 2 else {'kernel_size': shape[2:]}))
    for rescale in (False, True):
        t = TIED[type(layer)].of(layer, b, n, 'l', rescale_grad=rescale)
        assert t.bank.shape == bank.shape
        t.bank.data.copy_(bank)
        t.idx.copy_(alloc)
        assert torch.equal(t.weight, expanded)
        t.weight.backward(upstream)
        expect = grad/facts['grad_scale_rescale_flag'] if rescale else grad
        assert torch.allclose(t.bank.grad, expect, rtol=1e-6, atol=1e-6)
    if len(shape) == 2: assert facts['bank_first_is_zero'] and TIED[nn.Linear].of(layer, b, n, 'l').bank[0] == 0


# -- whole trainings, replayed
class Net(nn.Module):
    "conv -> ReLU -> spatial mean, if there is a convolution; linear layers with ReLU between them"
    def __init__(self, dims, conv=None):
        super().__init__()
        if conv: self.c = nn.Conv2d(conv[0], conv[1], 3, padding=1)
        self.l = nn.ModuleList([nn.Linear(a, b) for a, b in zip(dims, dims[1:])])
    def forward(self, x):
        if hasattr(self, 'c'): x = self.c(x).relu().mean((2, 3))
        for i, l in enumerate(self.l): x = l(x) if i == len(self.l)-1 else l(x).relu()
        return x


class Losses(Callback):
    "Task loss and loss with penalty of each step"
    order = 6  # after the penalty, at order 5
    name = 'step_losses'  # `losses` is a method of the Learner's
    def __init__(self): self.rows = []
    def after_loss(self):
        if self.training: self.rows.append((self.loss.item(), self.loss_grad.item()))


def replay(folder, name, monkeypatch, **kw):
    "Train with the callback on the recorded batches, from the recorded weights and masks"
    spec, z = load(folder, name), arrays(folder, name)
    net = Net(spec['dims'], spec['conv'])
    tensors = (['c.weight'] if spec['conv'] else []) + [f'l.{i}.weight' for i in range(len(spec['dims'])-1)]
    params, masks = dict(net.named_parameters()), {}
    for i, n in enumerate(tensors):
        params[n].data.copy_(torch.from_numpy(z[f'w0_{i}']))
        masks[n] = as_mask(z[f'mask0_{i}'], params[n].ndim)
    for k in z:
        if k.startswith('b0_'): params[k[3:]].data.copy_(torch.from_numpy(z[k]))
    recorded_growth(monkeypatch, z, tensors)
    batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(z['x'], z['y'])]
    opt = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=spec['momentum'], nesterov=spec['nesterov'],
                                            weight_decay=spec['weight_decay_l2_all_params']))
    learn = Learner(DataLoaders(batches, batches, device='cpu'), net, loss_func=nn.CrossEntropyLoss(), opt_func=opt)
    granularity = GRANULARITY[z['mask0_0'].ndim] if spec['conv'] else 'weight'
    cb = DynamicSparse(spec['sparsity'], init_mask=masks, include='*', granularity=granularity, period=spec['period'], stop=1.,
                       regularizer=GroupLasso(spec['l1']) if spec['l1'] else None, **{'state': 'keep', **kw}, method=method_of(spec, monkeypatch))
    losses = Losses()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, spec['lr'], cbs=[cb, losses])
    return spec, z, learn, tensors, losses.rows


def method_of(spec, monkeypatch):
    "The method of a recorded run; SET with the original's rule, which drops one unit more than the fraction says"
    if '--rewire-fraction' not in spec['extra']: return DSR(n_realloc=8, threshold=spec['threshold0']) if '--rewire' in spec['extra'] else 'static'
    one_more = lambda score, mask, fraction: drop_fraction(score, mask, (int(fraction*int(mask.sum()))+1+1e-9)/int(mask.sum()))
    monkeypatch.setattr(rewire, 'drop_fraction', one_more)
    return SET(drop_frac=float(spec['extra'].split('--rewire-fraction ')[1].split()[0]))


def recorded_growth(monkeypatch, z, tensors):
    "Let the callback draw what the original drew: its random choices are in the file"
    steps = sorted({int(k.split('_')[1]) for k in z if k.startswith('grown_')})
    calls = {'n': 0}
    def allocate(pruned, remaining, free):
        t = steps[calls['n']//len(tensors)]
        if remaining is free: return allocate_growth(pruned, remaining, free)  # units readmitted, not grown
        return [len(z[f'grown_{t}_{i}']) for i in range(len(tensors))]
    def draw(mask, n, generator, exclude=None):
        t, i = steps[calls['n']//len(tensors)], calls['n'] % len(tensors)
        calls['n'] += 1
        idx = torch.from_numpy(z[f'grown_{t}_{i}'].astype(np.int64))
        assert not mask.flatten()[idx].any() and len(idx) == n, 'grown where a unit was live, or another number'
        return idx
    monkeypatch.setattr(rewire, 'allocate_growth', allocate)
    for module in (rewire, callback): monkeypatch.setattr(module, 'grow_random', draw)


@pytest.mark.parametrize('name', ['dsr_mlp', 'dsr_mlp_nesterov', 'set_conv', 'static_l1_wd', 'static_group_lasso'])
def test_replay(folder, monkeypatch, name):
    spec, z, learn, tensors, losses = replay(folder, f'replay_{name}', monkeypatch)
    sp, params = learn.dynamic_sparse, dict(learn.model.named_parameters())
    # Bits of a convolution depend on the CPU: with another instruction set for the same kernels the last bit moves. Matrix
    # products of this size do not, so the networks without a convolution must agree to the bit.
    same = (lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-7)) if spec['conv'] else torch.equal
    for i, n in enumerate(tensors):
        mask = as_mask(z[f'mask_end_{i}'], params[n].ndim).expand_as(params[n])
        assert torch.equal(sp.masks[n], mask), n
        assert same(params[n].data, torch.from_numpy(z[f'w_end_{i}'])*mask), n
        assert sp.store.items[i].live == int(z[f'mask_end_{i}'].sum())
    for k in z:
        if k.startswith('b_end_'): assert same(params[k[6:]].data, torch.from_numpy(z[k])), k
    np.testing.assert_allclose(np.array(losses), z['losses'], rtol=1e-6)
    for h in sp.history:
        t = h['step']
        assert [h['dropped'][n] for n in tensors] == [len(z[f'pruned_{t}_{i}']) for i in range(len(tensors))]
        if 'threshold' in h: assert h['threshold'] == z['thresholds'][t]
    assert sorted(h['step'] for h in sp.history) == sorted({int(k.split('_')[1]) for k in z if k.startswith('grown_')})


def test_replay_can_fail(folder, monkeypatch):
    "Our own default, state zeroed at moved units, must not reproduce the original: else the replay proves nothing"
    _, z, learn, tensors, _ = replay(folder, 'replay_dsr_mlp', monkeypatch, state='zero')
    params = dict(learn.model.named_parameters())
    assert not all(torch.equal(params[n].data, torch.from_numpy(z[f'w_end_{i}'])*as_mask(z[f'mask_end_{i}'], 2)) for i, n in enumerate(tensors))


def test_rigl(folder):
    "Every recorded update, through the callback's own rewire: masks and weights"
    z, updates = arrays(folder, 'rigl'), load(folder, 'rigl')['updates']
    assert len(updates) == int(z['n_updates'])
    for t, o in enumerate(updates):
        w, before, dense, after, w_after = ([torch.from_numpy(z[f'{k}_{t}_{l}']) for l in (1, 2)]
            for k in ('w', 'mask_before', 'dense_grad', 'mask_after', 'w_after'))
        net = nn.Sequential(*(nn.Linear(x.shape[1], x.shape[0], bias=False) for x in w))
        for m, x in zip(net, w): m.weight.data.copy_(x)
        data = [(torch.zeros(2, w[0].shape[1]), torch.zeros(2, dtype=torch.long))]
        learn = Learner(DataLoaders(data, data, device='cpu'), net, loss_func=nn.CrossEntropyLoss(), lr=.1)
        cb = DynamicSparse(.7, method=RigL(drop_frac=SchedConst(o['drop_fraction'])), include='*',
            init_mask={f'{i}.weight': m for i, m in enumerate(before)})
        learn.add_cb(cb)
        for e, x in zip(cb.store.items, w): assert torch.equal(e.weight, x*e.mask)
        cb.__dict__['dense'] = {e: g.abs() for e, g in zip(cb.store.items, dense)}
        cb.rewire()
        for e, mask, x in zip(cb.store.items, after, w_after): assert torch.equal(e.mask, mask) and torch.equal(e.weight, x), t


class Snapshots(Callback):
    "Weights after every optimizer step, and after the rewire that follows it"
    order = 60
    name = 'snapshots'
    def __init__(self): self.end, self.after_opt = [], []
    def after_step(self): self.end.append([e.weight.data.clone() for e in self.learn.dynamic_sparse.store.items])


def test_deepr_replay(folder, monkeypatch, sign='first_step'):
    "Every step of the original, bit for bit, where its random choices are drawn again"
    z = arrays(folder, 'deepr_replay')
    n_layers = sum(k.startswith('w0_') for k in z)
    net = nn.Sequential(*(m for i in range(n_layers) for m in (nn.Linear(z[f'w0_{i}'].shape[1], z[f'w0_{i}'].shape[0], bias=False), nn.Tanh())))[:-1]
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for i, m in enumerate(layers): m.weight.data.copy_(torch.from_numpy(z[f'w0_{i}']))
    batch = (torch.from_numpy(z['x']), torch.from_numpy(z['y']))
    dls = DataLoaders([batch]*int(z['steps']), [batch], device='cpu')
    learn = Learner(dls, net, nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=float(z['momentum']))),
        wd=0.)
    cb = DynamicSparse(.5, DeepR(temperature=0., sign=sign), include='*',
        init_mask={f'{2*i}.weight': torch.from_numpy(z[f'mask0_{i}']) for i in range(n_layers)},
                       regularizer=L1(float(z['l1'])), state='keep', stop=2.)
    seen, dropped = Snapshots(), []
    def draw(mask, n, generator, exclude=None):
        t, i = len(seen.end), next(i for i, e in enumerate(cb.store.items) if e.mask is mask)
        idx = torch.from_numpy(z[f'grown_{t}_{i}'].astype(np.int64))
        assert len(idx) == n and not mask.flatten()[idx].any()
        return idx
    def changed(weight, sign, mask):
        seen.after_opt.append(weight.clone())
        dropped.append(rewire_drop(weight, sign, mask))
        return dropped[-1]
    rewire_drop = rewire.drop_sign_change
    monkeypatch.setattr(rewire, 'grow_random', draw)
    monkeypatch.setattr(rewire, 'drop_sign_change', changed)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, float(z['lr']), cbs=[cb, seen])
    steps = range(int(z['steps']))
    differs = [(t, i) for t in steps for i in range(n_layers) if not torch.equal(seen.end[t][i], torch.from_numpy(z[f'w_end_{t}_{i}']))]
    assert not differs
    assert [len(d) for d in dropped] == [len(z[f'pruned_{t}_{i}']) for t in steps for i in range(n_layers)] and sum(map(len, dropped)) > 3
    assert [[int(m.sum()) for m in cb.masks.values()]] == [[int(z[f'nnz_{len(steps)-1}_{i}']) for i in range(n_layers)]]


def test_deepr_replay_can_fail(folder, monkeypatch):
    "With signs drawn beforehand, a connection that wakes on the wrong side goes at once: another run"
    with pytest.raises(AssertionError): test_deepr_replay(folder, monkeypatch, 'random')


def test_deepr_replay_fails_with_a_stub(folder, monkeypatch):
    "The function of the vectors is the one that trains: without it the run is another one"
    monkeypatch.setattr(rewire, 'drop_sign_change', lambda weight, sign, mask: torch.empty(0, dtype=torch.long))
    with pytest.raises(AssertionError): test_deepr_replay(folder, monkeypatch)


def test_snfs(folder):
    "Shares of the layers, what goes and what is grown, through the callback's own methods; the budget, unlike the original's, to the unit"
    z = arrays(folder, 'snfs')
    ws, before, moms, pruned, after = ([torch.from_numpy(z[f'{k}_{i}']) for i in range(3)]
        for k in ('w', 'mask_before', 'momentum', 'mask_pruned', 'mask_after'))
    net = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in ws))
    for m, w in zip(net, ws): m.weight.data.copy_(w)
    data = [(torch.zeros(2, ws[0].shape[1]), torch.zeros(2, dtype=torch.long))]
    learn = Learner(DataLoaders(data, data, device='cpu'), net, nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)))
    ceil = lambda pos: float(z['prune_rate_now'])
    cb = DynamicSparse(.7, SNFS(drop_frac=ceil), include='*', init_mask={f'{i}.weight': m for i, m in enumerate(before)})
    learn.add_cb(cb)
    learn.create_opt()
    for m, v in zip(net, moms): learn.opt.opt.state[m.weight]['momentum_buffer'] = v.clone()
    how, items = cb.method, cb.store.items
    how.start(cb, items, cb.store.live)
    np.testing.assert_allclose(how.shares(cb, items), z['layer_share'], atol=1e-5)
    for e, keep, p, m, n in zip(items, before, pruned, moms, z['removed']):
        gone = drop_fraction(unit_values(e).abs(), e.mask, float(n)/int(keep.sum()) + 1e-9)  # the original rounds up
        assert torch.equal(e.mask & ~e.picked(gone), p)
    for p, a, m in zip(pruned, after, moms):  # the original lets what was just pruned return
        grown = grow_top(m.abs(), p, int(a.sum()-p.sum()))
        assert torch.equal(p.flatten().scatter(0, grown, True).view_as(a), a)
    live = cb.store.live
    dropped = how.drop(cb, items)
    counts = how.allocate(cb, items, dropped)
    assert [len(d) for d in dropped] == [int(float(z['prune_rate_now'])*int(b.sum())) for b in before] and sum(counts) == sum(map(len, dropped))
    assert all(abs(c-s*sum(counts)) < 1 for c, s in zip(counts, z['layer_share']))
    cb.rewire(learn.opt)
    assert cb.store.live == live and [e.live-int(b.sum()) for e, b in zip(items, before)] == [c-len(d) for c, d in zip(counts, dropped)]
