"""What goes wrong in the published code of dynamic sparse reparameterization and in its relatives does not go wrong here: a test for each.

The numbers are those of the list in the specification, M, T and D the files of the published code. Numbers that were drawn from that code,
faults included, are in `tests/golden/dynamic_sparse`; what has to hold at every step of every method is in `test_invariants.py`."""
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, Learner, OptimWrapper, SGD
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from torch import nn

from contracts import opt_state_of, quiet, seed_all
from paramfx.core.clock import SchedSteps, read_steps
import paramfx.sparse.load_masks # gives Learner load_masks  # noqa: F401
from paramfx.data.memory import tensor_dls
from paramfx.masks.store import Masked, MaskStore, density_erk
from paramfx.core.runs import RunState
import paramfx.sparse.prune # gives Learner prune  # noqa: F401
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.sparsify import sparsify
from paramfx.sparse.published import sparse_recipe
from paramfx.core.state import effects
from paramfx.sparse.tied import tie_weights
from paramfx.core.samples import generator
from paramfx.sparse.methods import DSR, SET, DeepR, GraNet
from paramfx.sparse.moves import allocate_growth, drop_fraction, drop_sign_change, drop_threshold, grow_random, grow_top
from paramfx.sparse.prune import prune_counts
from paramfx.sparse.tied import Tied
from paramfx.sparse.penalties import L1, GroupLasso
from settings import sparse_settings

pytestmark = pytest.mark.filterwarnings('ignore')  # such as a fit without a rewire
SGDM = partial(SGD, mom=.9)
MOVING = ['dsr', 'set', 'rigl', 'snfs', 'granet', 'deepr']


def data(n=32, bs=8):
    x = torch.randn(n, 20, generator=torch.Generator().manual_seed(0))
    return tensor_dls(x, torch.arange(n)%4, x[:8], torch.arange(8)%4, bs=bs, normalize=False, device='cpu')

def mlp(): return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
def conv():
    return nn.Sequential(nn.Unflatten(1, (5, 2, 2)), nn.Conv2d(5, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, padding=1), nn.LayerNorm((8, 2, 2)),
        nn.Flatten(), nn.Linear(32, 4))

def learner(model=mlp, opt=SGDM, lr=.05, cbs=None, **kw):
    seed_all()
    return quiet(Learner(data(), model() if callable(model) and not isinstance(model, nn.Module) else model, CrossEntropyLossFlat(), opt_func=opt,
        lr=lr, cbs=cbs, **kw))

def items(learn): return learn.dynamic_sparse.store.items
def dead_weights(model):
    return torch.cat([p[~model.state_dict()[f'{n}_mask'].expand_as(p)] for n, p in model.named_parameters() if f'{n}_mask' in model.state_dict()])

class Each(Callback):
    "Calls `f(learn)` at one event"
    run_valid = False
    def __init__(self, event, f, order=60):
        self.__dict__.update(order=order)
        setattr(self, event, lambda: f(self.learn))


# -- 1

def test_1_rescaled_gradients_of_tied_weights_reach_the_optimizer():
    "M:615 divides them after the step, which changes nothing"
    def moved(**kw):
        learn = learner(opt=SGD, wd=0.).tie(.8, **kw)
        assert isinstance(learn.model[0], Tied)
        before = learn.model[0].bank.detach().clone()
        learn.add_cb(Each('after_step', lambda o: o.dls and setattr(o, 'left', o.model[0].bank.detach()-before) if o.train_iter == 0 else None))
        learn.fit(1)
        return learn.left
    plain, scaled = moved(), moved(rescale_grad=True)
    assert plain.any() and torch.allclose(plain, 5*scaled, atol=1e-6), 'each entry serves five places'


# -- 2

@pytest.mark.parametrize('noise', ['grad', 'weight'])
def test_2_the_first_step_of_deepr_spares_what_was_drawn_anew_after_masking(noise):
    "T:109 keeps signs of weights that are then drawn again: half of the live ones go"
    learn = learner(lr=1e-6).sparsify(.5, method=DeepR(noise=noise, temperature=0.))
    old = [e.weight.detach().clone() for e in items(learn)]
    for e in items(learn): e.weight.data.copy_(-e.weight.data)
    assert all((a*e.weight < 0).sum() == e.live for a, e in zip(old, items(learn))), 'every sign is another one now'
    before = learn.dynamic_sparse.masks
    learn.fit(1)
    gone = sum(int((m & ~learn.dynamic_sparse.masks[n]).sum()) for n, m in before.items())
    assert gone <= .02*sum(e.live for e in items(learn))


# -- 3

@pytest.mark.parametrize('method', [*MOVING, 'static'])
def test_3_masked_weights_are_0_from_the_start(method):
    learn = learner().sparsify(.6, method=method)
    dead = dead_weights(learn.model)
    assert len(dead) and not dead.any()


def test_3_initial_weights_under_a_copied_mask_are_0_where_it_is(tmp_path):
    "The published code relies on weights that were not zeroed"
    run, first = learner(path=tmp_path), deepcopy(mlp())
    run.sparsify(.6, method=DSR(threshold=.1)).fit(2)
    masks = run.dynamic_sparse.masks
    run.save('run')
    copy = learner(path=tmp_path).load_masks('run', initial=first.state_dict())
    for n, m in masks.items():
        assert torch.equal(copy.model.get_parameter(n), first.get_parameter(n)*m) and torch.equal(copy.dynamic_sparse.masks[n], m)


# -- 4

def test_4_growth_never_overshoots():
    "Seven equal layers share four units, of which the published code makes six; its own numbers are in `test_growth_allocation`"
    for pruned in ([4]+[0]*6, [0]*6+[4], [1, 1, 1, 1, 0, 0, 0]):
        grow = allocate_growth(pruned, [10]*7, [100]*7)
        assert sum(grow) == 4 and max(grow) == 1


@pytest.mark.parametrize('method', ['dsr', 'set', 'snfs', 'deepr'])
def test_4_nothing_fits_and_it_ends_all_the_same(method):
    "M:657 goes round for ever"
    assert allocate_growth([3, 2], [5, 5], [0, 0]) == [0, 0]
    learn = learner().sparsify(**sparse_settings(method, sparsity=0., period=1, stop=1., threshold=1e9) if method == 'dsr'
        else dict(sparsity=0., method=method, period=1, stop=1.))
    learn.fit(1)
    assert len(learn.dynamic_sparse.history) == (0 if method == 'snfs' else 4 if method == 'deepr' else 3) and all(m.all()
        for m in learn.dynamic_sparse.masks.values())


# -- 5

@pytest.mark.parametrize('method', MOVING)
def test_5_steps_are_counted_right_after_a_rewire(method):
    "M:631 takes the counter of the batches for the layers"
    learn = learner().sparsify(.6, method=GraNet(start_sparsity=.2) if method == 'granet' else method, period=3, stop=1.)
    seen = []
    learn.add_cb(Each('after_batch', lambda o: seen.append((o.dynamic_sparse.effect.clock.steps, o.train_iter))))
    learn.fit(3)
    assert seen == [(i, i) for i in range(1, 13)] or seen == [(i+1, i) for i in range(12)]
    steps = [h['step'] for h in learn.dynamic_sparse.history]
    assert [s for s in steps if s < 11] == [0]*(method == 'deepr')+[3, 6, 9] and len(learn.recorder.losses) == 12


# -- 6

@pytest.mark.parametrize('n,f,k', [(10, .25, 2), (10, .1, 1), (10, .09, 0), (400, .1, 40), (7, 1e-9, 0), (7, 0., 0), (7, .999, 6)])
def test_6_a_fraction_drops_its_whole_part_and_not_one_more(n, f, k):
    "T:170 drops one more, of nothing, too"
    w = torch.arange(1, n+1).float()
    assert drop_fraction(w, torch.ones(n, dtype=torch.bool), f).tolist() == list(range(k))


def test_6_prunes_end_at_the_target_and_not_one_below():
    learn = learner().prune(.9, n_prunes=4)
    learn.fit(5)
    assert [int(m.sum()) for m in learn.iterative_prune.masks.values()] == [60, 12]
    assert prune_counts(1000, 0., 3) == [1000]*4, 'a fraction of 0 prunes nothing'


def test_6_a_dense_layer_keeps_its_weights_under_set():
    "400 became 359"
    learn = learner().sparsify({'0': 0., '2': .5}, method=SET(drop_frac=.3), period=1, stop=1.)
    learn.add_cb(Each('after_step', lambda o: [e.live for e in items(o)] == [600, 60] and items(o)[0].mask.all() or pytest.fail('units were lost')))
    learn.fit(3)
    assert sum(h['grown']['2.weight'] for h in learn.dynamic_sparse.history) > 0


# -- 7

BIG = 2**24+10

def test_7_positions_beyond_2_to_the_24_are_exact():
    "T:221 sends them through float32, which knows no odd number there"
    odd = torch.arange(BIG-9, BIG, 2)
    assert (odd % 2 == 1).all() and not torch.equal(odd.float().long(), odd), 'float32 would do'
    mask = torch.ones(BIG, dtype=torch.bool)
    mask[odd] = False
    assert torch.equal(grow_random(mask, len(odd), generator(0)).sort().values, odd)
    score = torch.zeros(BIG, dtype=torch.int8)
    score[odd] = torch.tensor([3, 1, 5, 2, 4], dtype=torch.int8)
    assert torch.equal(grow_top(score, mask, 2), odd[[2, 4]])
    live = ~mask
    assert torch.equal(drop_fraction(score, live, .5), odd[[1, 3]])
    assert torch.equal(drop_threshold(score, live, 3), odd[[1, 3]])
    assert torch.equal(drop_sign_change(-score, live.to(torch.int8), live), odd)


def test_7_and_so_is_where_they_are_written():
    m = nn.Module()
    m.weight = nn.Parameter(torch.ones(1, BIG, dtype=torch.float16), requires_grad=False)
    e = Masked('m', m, 'weight', torch.ones(1, BIG, dtype=torch.bool))
    odd = torch.arange(BIG-9, BIG, 2)
    MaskStore([e]).move_([odd], [odd[:0]])
    for t in (e.mask, e.weight, e.float): assert torch.equal((t.flatten() == 0).nonzero().flatten(), odd)
    MaskStore([e]).move_([odd[:0]], [odd[3:]])
    assert e.live == BIG-3 and torch.equal((~e.mask.flatten()).nonzero().flatten(), odd[:3])


# -- 8

@pytest.mark.parametrize('opt', [SGDM, Adam, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True))])
@pytest.mark.parametrize('kw', [dict(granularity='kernel'), dict(granularity='kernel', regularizer=GroupLasso(1e-2)), dict(method=SET(drop_frac=.4))])
@pytest.mark.parametrize('state', ['zero', 'keep'])
def test_8_dead_weights_neither_drift_nor_count_in_penalties(opt, kw, state):
    "Momentum is large when they die; in the published code they go on with it until the next prune"
    learn = learner(conv, opt)
    learn.fit(2)
    learn.sparsify(.5, period=2, stop=1., state=state, **dict(dict(method=DSR(threshold=.1), regularizer=L1(1e-2)), **kw))
    cb, checks = learn.dynamic_sparse, []
    def check(o):
        assert not dead_weights(o.model).any()
        want = 0.
        for n, m in cb.masks.items():
            w = o.model.get_parameter(n).detach().double()
            if isinstance(cb.regularizer, GroupLasso) and w.ndim > 2:
                want += sum(w[i, j].norm().item() for i in range(w.shape[0]) for j in range(w.shape[1]) if m[i, j].any())
            else: want += w[m].abs().sum().item()
        checks.append((cb.penalty().item(), 1e-2*want))
    learn.add_cb(Each('after_step', check))
    learn.fit(2)
    assert sum(sum(h['grown'].values()) for h in cb.history) > 0
    for a, b in checks: assert abs(a-b) < 1e-5


# -- 9

@pytest.mark.parametrize('how', ['save', 'run state'])
def test_9_threshold_and_counters_are_in_the_file(how, tmp_path):
    "Random growth goes on where it was since it depends on the number of rewires alone: `test_resumed_is_uninterrupted` of `test_invariants.py`"
    learn = learner(path=tmp_path, cbs=[RunState()]).sparsify(.6, period=2, method=DSR(threshold=1e-6), stop=1.)
    learn.fit(3)
    v, c = dict(learn.dynamic_sparse.effect.values), learn.dynamic_sparse.effect.clock
    assert v['threshold'] > 1e-6 and v['rewires'] > 2
    learn.save('a')
    other = learner(path=tmp_path).sparsify(.6, period=2, method=DSR(threshold=1e-6), stop=1.)
    other.load('a') if how == 'save' else other.resume()
    w, d = other.dynamic_sparse.effect.values, other.dynamic_sparse.effect.clock
    assert all(w[k] == v[k] for k in ('threshold', 'rewires')) and d.steps == 12 and d.epoch == c.epoch
    if how == 'save':
        other.fit(1)
        steps = [h['step'] for h in other.dynamic_sparse.history]
        assert steps == [12, 14], 'steps are counted on'


# -- 10

def test_10_whole_kernels_are_tied_where_kernels_are_asked_for():
    "T:47 ties single weights, whatever is asked for"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 3))
    tie_weights(net, .8, granularity='kernel')
    kernels = net[1].weight.detach().view(40, 9)
    assert net[1].bank.shape == (8, 3, 3) and len(kernels.unique(dim=0)) == 8


def test_10_before_its_first_key_a_table_has_its_first_value():
    "M:778 looks up the last one"
    assert [SchedSteps({10: 1., 20: 2.})(e) for e in (0, 9.99)] == [1., 1.]
    t = read_steps('{lr: {10: .1, 20: .2}}', 1)['lr']
    assert [t.at(e) for e in (0, 9, 10, 19, 20, 99)] == [.1, .1, .1, .1, .2, .2]
    assert SchedSteps({10: 1., 20: 2.}).at(-1) == 1.


def test_10_numbers_of_the_validation_set_are_its_own():
    "M:537 logs those of the training set in their place"
    learn = learner().sparsify(.6)
    learn.fit(2)
    x, y = learn.dls.valid_ds.x, learn.dls.valid_ds.y
    want = nn.functional.cross_entropy(learn.model.eval()(x), y).item()
    train, valid = learn.recorder.values[-1][:2]
    assert abs(valid-want) < 1e-5 and abs(train-want) > 1e-4


def test_10_every_recipe_of_the_large_network_has_its_batch():
    "Four of the published jobs leave out the 256"
    for m in ('dense', 'static', 'thin', 'set', 'deepr', 'dsr', 'prune'):
        for s in (.8, .9): assert sparse_recipe('imagenet/resnet50', m, s).loader == dict(bs=256)


# -- its relatives

@pytest.mark.parametrize('method', ['dsr', 'set', 'deepr'])
def test_random_growth_is_exact(method):
    "A coin per position, as in sparse_learning, lets the budget drift"
    learn = learner().sparsify(.6, period=1, stop=1.,
        method=dict(dsr=DSR(threshold=.1), set=SET(drop_frac=.4), deepr=DeepR(temperature=.1, eta=.1, noise='weight'))[method])
    lives = []
    learn.add_cb(Each('after_step', lambda o: lives.append(sum(int(m.sum()) for m in o.dynamic_sparse.masks.values()))))
    learn.fit(5)
    assert set(lives) == {240+48} and sum(sum(h['grown'].values()) for h in learn.dynamic_sparse.history) > 100
    mask = torch.rand(1000, generator=generator(1)) < .7
    for seed in range(20):
        idx = grow_random(mask, 100, generator(seed))
        assert len(idx.unique()) == 100 and not mask[idx].any()


def test_set_drops_by_magnitude_on_both_sides():
    "The 'SET' of sparse_learning keeps only a few of the most negative weights"
    w = torch.tensor([-5., -.1, .1, 4., -3., .2, -.3, 2.])
    live = torch.ones(8, dtype=torch.bool)
    assert sorted(drop_fraction(w.abs(), live, .5).tolist()) == [1, 2, 5, 6]
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    with torch.no_grad(): model[0].weight.copy_(torch.stack([w, torch.zeros(8)]))
    cb = DynamicSparse(method=SET(two_ended=True, drop_frac=.5), init_mask={'0.weight': model[0].weight != 0})
    cb.__dict__['effect'] = cb.convert(model).attach(model)
    cb.rewire()
    assert (cb.masks['0.weight'][0]).tolist() == [True, False, False, True, True, False, False, True], 'two of each sign'


def test_norms_embeddings_and_biases_are_left_alone():
    "rigl-torch masks whatever has a weight"
    net = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GroupNorm(2, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    before = deepcopy(net.state_dict())
    sparsify(net, .5)
    assert [e.name for e in effects(net)['dynamic_sparse'].holder.items] == ['2.weight', '5.weight']
    for k, v in before.items(): assert torch.equal(net.state_dict()[k], v) != (k in ('2.weight', '5.weight')), k
    conv_net = conv()
    sparsify(conv_net, .5)
    assert [e.name for e in effects(conv_net)['dynamic_sparse'].holder.items] == ['3.weight', '6.weight'], 'the first convolution stays dense'


@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.Adam), partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('method', ['rigl', 'dsr'])
def test_all_of_adams_state_is_masked(opt, method):
    "rigl-torch knows momentum_buffer only"
    learn = learner(opt=opt)
    learn.fit(1)  # dense, so that there is state everywhere
    learn.sparsify(.6, method=DSR(threshold=.1) if method == 'dsr' else method, period=2, stop=1.)
    seen = []
    def check(o):
        for e in items(o):
            st = {k: t for k, t in opt_state_of(o.opt, e.weight).items() if torch.is_tensor(t) and t.shape == e.weight.shape}
            assert len(st) == 2, 'mean and mean square'
            for k, t in st.items(): assert not t[~e.mask].any(), k; seen.append(bool(t[e.mask].any()))
    learn.add_cb(Each('after_step', check))
    learn.fit(2)
    assert any(seen) and sum(sum(h['grown'].values()) for h in learn.dynamic_sparse.history) > 0


def test_layers_may_differ_in_density():
    "rigl-torch has the uniform distribution only"
    d = density_erk([(300, 784), (100, 300), (10, 100)], .9)
    assert d[0] < d[1] < d[2] <= 1.
    learn = learner().sparsify(.8, distribution='erk', method='rigl')
    dens = [e.live/e.units for e in items(learn)]
    assert dens[0] < dens[1]


def test_masks_are_where_the_weights_are():
    "sparse_learning puts them on cuda, whatever there is"
    net = mlp().to('meta')
    assert all(p.device.type == 'meta' for p in net.parameters())
    learn = learner().sparsify(.5)
    for e in items(learn): assert e.mask.device == e.float.device == e.weight.device == torch.device('cpu')


def test_a_rewire_by_gradients_costs_no_batch():
    "fastsparse cancels the batch, so its loss is not logged and the schedule of other callbacks misses a step"
    learn = learner().sparsify(.6, method='rigl', period=2, stop=1.)
    calls = []
    learn.add_cb(Each('after_step', lambda o: calls.append(o.iter)))
    learn.fit_one_cycle(3, .05)
    assert len(calls) == 12 == len(learn.recorder.losses) == len(learn.recorder.lrs) and len(learn.dynamic_sparse.history) >= 4
