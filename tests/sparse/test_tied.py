"Tied weights: the table, the layers, the verb, and everything fastai does to a Learner"
import os
import pickle
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, SGD, load_learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
import fastai.callback.schedule # gives Learner lr_find  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations, prune

import paramfx.report.plan # gives Learner plan  # noqa: F401
from contracts import OPTIMIZERS, Stop, build, quiet, run_record, same, seed_all, small_net, snapshot, tiny_dls, two_groups
from paramfx.core.samples import rng_state
from paramfx.core.runs import RunState
from paramfx.export.materialize import Recipe, load_recipe, materialize, save_recipe
from paramfx.report.cost import cost, file_bytes, n_params
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.sparsify import sparsify
from paramfx.core.state import effects
from paramfx.sparse.tied import TIED, Tied, TiedConv2d, TiedLinear, plan_tied, read_bank, tie_weights, tied_index
from paramfx.core.samples import generator
from fresh import run_fresh

TESTS = Path(__file__).resolve().parent.parent


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
def tied_layers(model): return {n: m for n, m in model.named_modules() if isinstance(m, Tied)}


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


@pytest.fixture
def tied(mk):
    "A Learner whose small network is tied, `sparsity` and settings free"
    def f(sparsity=.8, kw={}, **kwargs): return mk(**kwargs).tie(sparsity, **kw)
    return f


# -- the table
@pytest.mark.parametrize('n,bank', [(1, 1), (10, 3), (10, 10), (10, 9), (4096, 410), (235200, 4704)])
@pytest.mark.parametrize('sign', [False, True])
def test_each_entry_serves_floor_or_ceil(n, bank, sign):
    idx = tied_index(n, bank, generator(0), sign)
    counts = (idx % bank).bincount(minlength=bank)
    assert counts.min() == n//bank and counts.max() == -(-n//bank) and counts.sum() == n
    assert int((counts == -(-n//bank)).sum()) == (n % bank or bank)
    assert 0 <= idx.min() and idx.max() < bank*(1+sign)
    if sign and n > 1000: assert abs((idx >= bank).float().mean()-.5) < 5*.5/n**.5


def test_table_depends_on_seed_and_name_only():
    make = lambda key='a', seed=0: TiedLinear.of(nn.Linear(16, 16), 26, 256, key, seed).idx
    seed_all(0)
    before = rng_state()
    assert torch.equal(make(), make()) and not same(rng_state()['numpy'], before['numpy'])
    assert not torch.equal(make(), make('b')) and not torch.equal(make(), make(seed=1))


# -- the layer
LAYERS = [(lambda **k: nn.Linear(12, 10, **k), (5, 12)), (lambda **k: nn.Conv1d(4, 6, 3, padding=1, **k), (2, 4, 9)),
          (lambda **k: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode='reflect', **k), (2, 4, 8, 8)),
          (lambda **k: nn.Conv3d(2, 4, 3, dilation=1, **k), (2, 2, 5, 5, 5))]


def dense_forward(layer, x, w):
    "Forward of an ordinary layer with a weight that is part of a graph"
    return torch.func.functional_call(layer, {'weight': w}, (x,))


@pytest.mark.parametrize('make,shape', LAYERS)
@pytest.mark.parametrize('granularity', ['weight', 'kernel'])
@pytest.mark.parametrize('sign', [False, True])
@pytest.mark.parametrize('rescale', [False, True])
def test_forward_and_gradient_by_a_second_route(make, shape, granularity, sign, rescale):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    net = nn.Sequential(layer)
    row, = tie_weights(net, .75, granularity, sign, rescale, include='0')
    t = net[0]
    assert type(t) is TIED[type(layer)] and t.bias is layer.bias and repr(t) != repr(layer)
    kernel = granularity == 'kernel' and layer.weight.ndim > 2
    units = layer.weight.shape[:2].numel() if kernel else layer.weight.numel()
    assert (row['units'], row['bank']) == (units, round(.25*units)) == (t.n_places, len(t.bank))
    # the weight, place by place
    idx, b = t.idx % len(t.bank), len(t.bank)
    s = (1-2*(t.idx >= b).float()).view(-1, *[1]*(t.bank.ndim-1))
    w = (t.bank.detach()[idx]*s).view_as(layer.weight)
    assert torch.equal(t.weight, w) and (t.idx >= b).any() == sign
    # each entry begins as a weight of its own; a matrix's first one at 0
    old = (layer.weight.detach().view(units, -1)*s.view(units, -1)).view(units, -1)
    for j in range(int(isinstance(layer, nn.Linear)), b):
        assert any(torch.equal(t.bank[j].detach().flatten(), old[p]) for p in (idx == j).nonzero().flatten()), j
    if isinstance(layer, nn.Linear): assert t.bank[0] == 0
    # outputs and gradient: sums over places of the dense gradient
    w.requires_grad_()
    out = dense_forward(layer, x, w)
    assert torch.equal(t(x), out)
    up = torch.randn_like(out)
    g, = torch.autograd.grad(out, w, up)
    t(x).backward(up)
    g = (g.reshape(units, -1)*s.view(units, -1))
    expect = torch.stack([g[idx == j].double().sum(0) for j in range(b)]).view_as(t.bank)
    if rescale: expect = expect*b/units
    assert torch.allclose(t.bank.grad.double(), expect, rtol=1e-5, atol=1e-5)
    # the ordinary layer again
    plain = t.plain()
    assert type(plain) is type(layer) and torch.equal(plain(x), t(x)) and list(plain.state_dict()) == list(layer.state_dict())
    assert vars(plain).keys() == vars(layer).keys() and plain.weight.requires_grad
    mats = cost(net, x, latency=False), cost(nn.Sequential(layer), x, latency=False)
    assert mats[0].macs == mats[0].macs_executed == mats[1].macs > 0
    assert mats[0].macs_nonzero == round(mats[1].macs*int(w.count_nonzero())/w.numel())


def test_double_backward():
    bank = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for sign in (False, True):
        idx = tied_index(10, 4, generator(0), sign)
        g, = torch.autograd.grad(read_bank(bank, idx, (2, 5), sign).pow(3).sum(), bank, create_graph=True)
        h, = torch.autograd.grad(g.sum(), bank)
        plain = (bank[idx % 4]*torch.where(idx < 4, 1., -1.)).pow(3).sum()
        g2, = torch.autograd.grad(plain, bank, create_graph=True)
        h2, = torch.autograd.grad(g2.sum(), bank)
        assert torch.allclose(g, g2) and torch.allclose(h, h2)
    torch.autograd.gradcheck(lambda b: read_bank(b, idx, (2, 5), True), (bank,))


def test_gradients_per_item():
    "What `torch.func` asks of an operation"
    from torch.func import functional_call, grad, vmap
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 3)).double()
    tie_weights(net, .5, 'kernel', True, include='*')
    p, x = dict(net.named_parameters()), torch.randn(4, 2, 8, dtype=torch.float64)
    got = vmap(grad(lambda p, x: functional_call(net, p, (x[None],)).pow(2).sum()), (None, 0))(p, x)
    net(x).pow(2).sum().backward()
    for n, q in net.named_parameters(): assert torch.allclose(got[n].sum(0), q.grad), n


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('sign', [False, True])
def test_sparsity_0_is_the_plain_run(mk, opt, sign):
    a, b = mk(**OPTIMIZERS[opt]), mk(**OPTIMIZERS[opt]).tie(0., sign_hash=sign)
    for learn in (a, b): learn.fit(2)
    assert len(tied_layers(b.model)) == 2
    close = partial(torch.allclose, rtol=1e-5, atol=1e-6)  # a norm over a layer adds up in another order
    assert all(close(p, q) for p, q in zip(snapshot(materialize(b.model, torch.randn(2, 1, 8, 8), dead=False)).values(), snapshot(a.model).values()))
    if opt == 'adam': assert [float(o) for o in a.recorder.losses] == [float(o) for o in b.recorder.losses]


def test_writing_into_weight_fails_and_resetting_works():
    net = nn.Sequential(nn.Linear(8, 8))
    tie_weights(net, .5, include='0')
    for w in (nn.Parameter(torch.zeros(8, 8)), torch.zeros(8, 8)):
        with pytest.raises(TypeError, match='^0: its weight is calculated'): net[0].weight = w
    before = net[0].bank.detach().clone()
    net[0].reset_parameters()
    assert not torch.equal(before, net[0].bank) and net[0].bank.abs().max() <= 8**-.5 and net[0].bank[0] == 0


def test_hooks_and_attributes_go_along():
    net = nn.Sequential(nn.Linear(4, 4))
    seen = []
    net[0].register_forward_hook(lambda *args: seen.append(1))
    net[0].tag = 'mine'
    net.eval()
    tie_weights(net, .5, include='0')
    net(torch.randn(1, 4))
    assert seen and net[0].tag == 'mine' and not net[0].training


# -- copies and files
def test_copies_draw_the_same_table():
    net = small_net()
    tie_weights(net, .8, 'kernel', True, include='*')
    for twin in (deepcopy(net), pickle.loads(pickle.dumps(net))):
        for (n, a), b in zip(tied_layers(net).items(), tied_layers(twin).values()):
            assert torch.equal(a.idx, b.idx) and torch.equal(a.weight, b.weight) and a.bank is not b.bank, n
        assert same(list(net.state_dict()), list(twin.state_dict())) == ''
    assert not any('idx' in k for k in net.state_dict())


def test_file_holds_the_bank_and_no_table():
    big = lambda: nn.Sequential(nn.Linear(512, 512))
    net = big()
    tie_weights(net, .98, include='0')
    dense = file_bytes(big())
    assert n_params(net)[0] == round(.02*512**2)+512
    assert file_bytes(net) < n_params(net)[0]*4+3000 and len(pickle.dumps(net)) < n_params(net)[0]*4+6000 < dense/10


def test_another_torch_version_is_noticed(monkeypatch):
    net = nn.Sequential(nn.Linear(8, 8))
    tie_weights(net, .5, include='0')
    data = pickle.dumps(net)
    monkeypatch.setattr('paramfx.sparse.tied.tied_index', lambda n, bank, gen, sign: (torch.arange(n) % bank))
    with pytest.raises(ValueError, match='0: this version of torch draws another table'): pickle.loads(data)


@pytest.mark.parametrize('kw', [dict(seed=1), dict(sign_hash=True)])
def test_file_tied_otherwise_is_refused(tied, kw):
    learn = tied()
    learn.create_opt()
    learn.save('a')
    other = tied(kw=kw, seed=3)
    before = snapshot(other.model[1][2])
    with pytest.raises(RuntimeError, match='1.2: the file was tied in another way'): other.load('a')
    assert same(snapshot(other.model[1][2]), before) == ''


def test_dense_file_is_refused_and_says_what_to_do(mk, tied):
    learn = mk()
    learn.create_opt()
    learn.save('dense')
    with pytest.raises(RuntimeError, match='1.2: the file holds the weight of an ordinary layer'): tied().load('dense', with_opt=False)


def test_device_and_dtype():
    net = mlp()
    tie_weights(net, .5)
    net.double()
    assert net[1].weight.dtype == torch.float64 and net[1].idx.dtype == torch.int64
    net.bfloat16()(torch.randn(2, 64).bfloat16()).sum().backward()
    meta = deepcopy(deepcopy(net).to('meta'))
    assert meta[1].weight.device.type == meta[1].idx.device.type == 'meta'


# -- the verb on a model
def test_plan_is_what_happens_and_changes_nothing():
    net = small_net()
    before, keys = pickle.dumps(net.state_dict()), vars(net).keys()
    kw = dict(sparsity={'conv': np.float32(.5), 'fc': .9}, granularity='kernel', include='*', seed=np.int64(3))
    plan = tie_weights.plan(net, **kw)
    assert pickle.dumps(net.state_dict()) == before and vars(net).keys() == keys
    table = tie_weights(net, **kw)
    assert list(table) == list(plan) and Recipe.of(net)[0]['args']['include'] == ['0.0', '0.3', '1.2']
    assert [(r['layer'], r['units'], r['bank']) for r in table] == [('0.0', 8, 4), ('0.3', 96, 48), ('1.2', 1920, 192)]
    assert net[0][3].bank.shape == (48, 3, 3) and type(net[0][0]) is TiedConv2d


def test_dict_leaves_out_what_it_does_not_name():
    net = small_net()
    table = tie_weights(net, {'1.2': .9})
    assert list(tied_layers(net)) == ['1.2'] and dict(layer='0.3.weight', shape='12x8x3x3', note='no sparsity given for it') in table


class Own(nn.Linear):
    "A layer with a forward of its own"
    def forward(self, x): return super().forward(x)*2


class Shares(nn.Module):
    "An embedding and a decoder, and two layers, that share their weights"
    def __init__(self):
        super().__init__()
        self.emb, self.dec, self.a, self.b, self.ok = nn.Embedding(7, 6), nn.Linear(6, 7), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.dec.weight, self.b.weight = self.emb.weight, self.a.weight
    def forward(self, x): return self.dec(self.ok(self.b(self.a(self.emb(x)))))


def test_shared_weights_stay_shared():
    net = Shares()
    notes = {r['layer']: r.get('note') for r in tie_weights(net, .5)}
    assert list(tied_layers(net)) == ['ok']
    assert notes['a'] == 'shared with b.weight' and notes['b.weight'] == 'shared with a.weight' and 'emb' in notes['dec.weight']
    assert net.b.weight is net.a.weight and net.dec.weight is net.emb.weight


def test_a_layer_used_twice_is_tied_once():
    l = nn.Linear(6, 6)
    net = nn.Sequential(l, nn.ReLU(), l)
    tie_weights(net, .5, include='0')
    assert net[0] is net[2] and isinstance(net[0], TiedLinear)


@pytest.mark.parametrize('make,why', [
    (lambda: nn.LSTM(4, 4), 'not LSTM'), (lambda: nn.MultiheadAttention(4, 2), 'MultiheadAttention'),
    (lambda: nn.ConvTranspose2d(3, 3, 3), 'not ConvTranspose2d'),
    (lambda: Own(4, 4), 'not Own'), (lambda: nn.LazyLinear(4), 'lazy: run one batch'), (lambda: nn.Bilinear(2, 2, 2), 'not Bilinear'),
    (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), 'parametrized'),
    (lambda: prune.l1_unstructured(nn.Linear(4, 4), 'weight', .5), 'no weight of its own')])
def test_what_is_left_alone_and_why(make, why):
    net = nn.Sequential(make(), nn.Linear(4, 4))
    kept = net[0]
    table = tie_weights(net, .5, include='*')
    assert list(tied_layers(net)) == ['1'] and net[0] is kept
    assert any(why in r.get('note', '') for r in table), table
    with pytest.raises(ValueError, match=f'Nothing to tie: .*{why}'): tie_weights(nn.Sequential(make()), .5, include='*')


def test_first_convolution_masked_and_tied_layers():
    net = small_net()
    assert '0.0: first conv' in str([f"{r['layer']}: {r['note']}" for r in plan_tied(net) if 'note' in r])
    sparsify(net, .5, include='0.3')
    assert [r for r in tie_weights(net, .5) if r['layer'] == '0.3'][0]['note'].startswith('masked')
    assert list(tied_layers(net)) == ['1.2']
    with pytest.raises(ValueError, match='tied already'): tie_weights(net, .5, include='1.2')


@pytest.mark.parametrize('kw,text', [
    (dict(sparsity=1), 'sparsity=1: give the share'), (dict(sparsity='.9'), "sparsity='.9'"), (dict(sparsity={'1': 2}), '1=2: give'),
    (dict(granularity='row'), "granularity='row': choose"), (dict(sign_hash=1), 'sign_hash=1: give True or False'),
    (dict(seed=.5), 'seed=0.5: give a whole number'), (dict(include='nope'), "No layer is called 'nope'"),
    (dict(sparsity=.9999), '1.weight: sparsity 0.9999 leaves 0.2'), (dict(exclude='*'), 'Nothing to tie')])
def test_errors_come_before_anything_changes(mk, kw, text):
    learn = mk(model=mlp)
    learn.create_opt()
    before, mods = snapshot(learn.model), [id(m) for m in learn.model.modules()]
    for f in (lambda: tie_weights(learn.model, **kw), lambda: learn.tie(**kw), lambda: learn.plan('tie', **kw)):
        with pytest.raises(ValueError) as e: f()
        assert text in str(e.value) and '\n' not in str(e.value)
    assert same(snapshot(learn.model), before) == '' and mods == [id(m) for m in learn.model.modules()]
    assert '_recipe' not in vars(learn.model) and not learn.paramfx


# -- materialize, recipes
@pytest.mark.parametrize('kw', [dict(), dict(granularity='kernel', sign_hash=True), dict(rescale_grad=True, seed=5, include='*')])
def test_materialize_unties(mk, kw):
    learn = mk().tie(.8, **kw)
    learn.fit(1)
    x = torch.randn(4, 1, 8, 8)
    learn.model.eval()
    before, val = learn.model(x), learn.validate()
    plain = materialize(learn.model, x, dead=False)
    assert not tied_layers(plain) and torch.equal(plain(x), before) and list(plain.state_dict()) == list(small_net().state_dict())
    assert torch.equal(learn.model(x), before) and tied_layers(learn.model)
    assert learn.materialize(dead=False) is learn and not tied_layers(learn.model) and learn.validate() == val
    learn.fit(1)  # and it trains on, every parameter
    assert not any(torch.equal(p, q) for p, q in zip(learn.model.parameters(), plain.parameters()))


SCRIPT = '''
import sys, torch
from contracts import small_net
from paramfx.export.materialize import load_recipe
net = load_recipe(sys.argv[1], small_net()).eval()
x, y = torch.load(sys.argv[2])
assert torch.equal(net(x), y), (net(x)-y).abs().max()
'''


@pytest.mark.parametrize('untied', [False, True])
def test_recipe_in_a_fresh_process(mk, tmp_path, untied):
    learn = mk().tie({'conv': .5, 'fc': .9}, granularity='kernel', sign_hash=True, seed=3, include='*')
    learn.fit(1)
    net = materialize(learn.model, torch.randn(1, 1, 8, 8)) if untied else learn.model
    x = torch.randn(4, 1, 8, 8)
    torch.save((x, net.eval()(x).detach()), tmp_path/'xy.pt')
    save_recipe(net, tmp_path/'r.pth')
    assert [s['verb'] for s in Recipe.of(net)][0] == 'tie'
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    res = run_fresh(SCRIPT, str(tmp_path/'r.pth'), str(tmp_path/'xy.pt'), env=env)
    assert res.returncode == 0, res.stderr


def test_masks_beside_ties_and_both_in_a_recipe(mk, tmp_path):
    learn = mk(cbs=DynamicSparse(.5, include='0.3', period=2)).tie(.8, include='1.2')
    learn.fit(1)
    again = load_recipe(save_recipe(learn.model, tmp_path/'r.pth'), small_net())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), learn.model.eval()(x)) and 'dynamic_sparse' in effects(again)


def test_tracing_a_tied_network():
    net = mlp()
    tie_weights(net, .5)
    assert torch.equal(materialize(net, torch.randn(2, 64)).eval()(torch.ones(2, 64)), net.eval()(torch.ones(2, 64)))


# -- the verb on a Learner
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_an_existing_optimizer_follows(mk, opt):
    learn = mk(splitter=two_groups, **OPTIMIZERS[opt])
    learn.fit(1)
    learn.opt.set_hyper('lr', [1e-3, 1e-2])
    groups = [len(g) for g in learn.opt.param_lists]
    opt_was = learn.opt
    assert learn.tie(.8) is learn and learn.opt is opt_was and [len(g) for g in learn.opt.param_lists] == groups
    assert {id(p) for g in learn.opt.param_lists for p in g} == {id(p) for p in learn.model.parameters()}
    before = {n: m.bank.detach().clone() for n, m in tied_layers(learn.model).items()}
    x, y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    learn.opt.step(); learn.opt.zero_grad()
    for n, m in tied_layers(learn.model).items(): assert not torch.equal(m.bank, before[n]), n
    learn.save('x'); learn.load('x')  # the optimizer's state fits, too
    learn.fit(1)


def test_plan_on_a_learner(mk):
    learn = mk()
    before = snapshot(learn.model)
    plan = learn.plan('tie', sparsity=.9, include='*')
    assert same(snapshot(learn.model), before) == '' and not tied_layers(learn.model)
    learn.tie(.9, include='*')
    assert list(learn.paramfx['tie']) == list(plan)
    now = learn.cost(latency=False)
    assert plan.after.to_dict() == now.to_dict() and plan.before.params > now.params and plan.before.macs == now.macs


# -- what fastai does
KW = [dict(), dict(granularity='kernel', sign_hash=True, rescale_grad=True)]


@pytest.fixture(params=KW, ids=['weight', 'kernel'])
def kw(request): return request.param


def test_lr_find_changes_nothing(tied, kw):
    learn = tied(kw=kw)
    before = snapshot(learn.model)
    learn.lr_find(num_it=6, show_plot=False)
    assert same(snapshot(learn.model), before) == ''


def test_fine_tune_freezes_the_bank(tied, kw):
    learn = tied(kw=kw, splitter=two_groups)
    learn.freeze()
    assert not learn.model[0][3].bank.requires_grad and learn.model[1][2].bank.requires_grad
    body, head = learn.model[0][3].bank.detach().clone(), learn.model[1][2].bank.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model[0][3].bank, body) and not torch.equal(learn.model[1][2].bank, head)
    learn.unfreeze()
    learn.fit(1)
    assert not torch.equal(learn.model[0][3].bank, body)
    learn.fine_tune(1)


def test_tying_a_frozen_learner(mk):
    learn = mk(splitter=two_groups)
    learn.freeze()
    learn.tie(.8)
    assert not learn.model[0][3].bank.requires_grad
    assert [p.requires_grad for p in materialize(learn.model, torch.randn(2, 1, 8, 8),
        dead=False).parameters()] == [p.requires_grad for p in learn.model.parameters()]
    body = learn.model[0][3].bank.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model[0][3].bank, body)
    learn.unfreeze(); learn.fit(1)
    assert not torch.equal(learn.model[0][3].bank, body)


def test_save_and_load(tied, kw):
    a = tied(kw=kw)
    a.fit(1)
    a.save('a')
    b = tied(kw=kw, seed=5).load('a')
    assert same(snapshot(b.model), snapshot(a.model)) == '' and b.validate() == a.validate()
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    for learn in (a, b):  # momentum came along, too
        learn.loss_func(learn.model.train()(x), y).backward()
        learn.opt.step()
    assert same(snapshot(b.model), snapshot(a.model)) == ''


def test_export_and_deepcopy(tied, kw, tmp_path):
    learn = tied(kw=kw)
    learn.fit(1)
    x = torch.randn(3, 1, 8, 8)
    y = learn.model.eval()(x)
    twin = deepcopy(learn.model)
    learn.export('e.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'e.pkl')
    assert torch.equal(back.model.eval()(x), y) and torch.equal(twin(x), y) and list(back.paramfx['tie'])
    with torch.no_grad(): tied_layers(twin)['1.2'].bank.zero_()
    assert torch.equal(learn.model(x), y)


@pytest.mark.parametrize('at', [11, 20])
def test_resumed_run_is_the_uninterrupted_one(mk, kw, at):
    def run(seed=0): return mk(cbs=RunState(), seed=seed, model=partial(small_net, dropout=.2)).tie(.8, **kw)
    whole = run()
    whole.fit_one_cycle(3, 1e-2)
    a = run()
    a.add_cb(Stop(at))
    with pytest.raises(KeyboardInterrupt): a.fit_one_cycle(3, 1e-2)
    b = run(seed=17)
    seed_all(23)
    b.resume().fit_one_cycle(3, 1e-2)
    assert same(run_record(b)['model'], run_record(whole)['model']) == '' and same(run_record(b)['opt'], run_record(whole)['opt']) == ''


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradient_accumulation_is_a_bigger_batch(mk, kw, dtype, tol):
    dls = lambda bs: tiny_dls(n=128, bs=bs, dtype=dtype, shuffle=(False, False), drop_last=(False, False))
    net = lambda: small_net(norm=False).to(dtype)
    big, acc = (mk(dls=dls(bs), model=net, opt_func=SGD, lr=.1).tie(.8, **kw) for bs in (32, 8))
    big.fit(2)
    acc.fit(2, cbs=GradientAccumulation(32))
    for n, p in acc.model.named_parameters(): assert torch.allclose(p, big.model.get_parameter(n), rtol=0, atol=tol), n


class Norm(Callback):
    "Norm of the bank's gradients after clipping"
    order, run_valid = 11.5, False
    def __init__(self): self.__dict__['seen'] = []
    def before_step(self): self.seen.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters()]).norm().item())


def test_gradient_clip_and_mixup(tied, kw):
    norm = Norm()
    tied(kw=kw).fit(1, cbs=[GradientClip(.01), norm])
    assert len(norm.seen) == 8 and max(norm.seen) < .0101
    learn = tied(kw=kw)
    learn.fit(1, cbs=MixUp(.4))
    assert all(p.isfinite().all() for p in learn.model.parameters())


class CPUPrecision(MixedPrecision):
    "fastai's own asks for a GPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)


def test_autocast_keeps_the_bank_in_full_precision(tied, kw):
    learn = tied(kw=kw)
    before = learn.model[1][2].bank.detach().clone()
    learn.fit(1, cbs=CPUPrecision('bf16'))
    m = learn.model[1][2]
    assert m.bank.dtype == m.bank.grad.dtype == torch.float32 if m.bank.grad is not None else m.bank.dtype == torch.float32
    assert not torch.equal(before, m.bank)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert learn.model.eval()(torch.randn(2, 1, 8, 8)).dtype == torch.bfloat16


def test_interrupt_leaves_a_sound_learner(tied, kw):
    learn = tied(kw=kw)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop(5))
    learn.fit(1)
    learn.validate()
    assert len(tied_layers(learn.model)) == 2


def test_compiled_model(tied):
    from torch._dynamo.testing import CompileCounterWithBackend
    learn = tied()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    x = torch.randn(4, 1, 8, 8)
    y = learn.model.eval()(x)
    net = torch.compile(learn.model, backend=counter)
    assert torch.allclose(net(x), y, atol=1e-6)
    with torch.no_grad(): learn.model[1][2].bank.add_(1.)
    assert torch.allclose(net(x), learn.model(x), atol=1e-5) and counter.frame_count == 1


def test_vision_learner(tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    seed_all()
    dls = tiny_dls(n=16, n_valid=16, bs=16, chans=3, scale=4)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, normalize=False, n_out=10, path=tmp_path, metrics=[]))
    n = n_params(learn.model)[0]
    learn.tie(.9)
    assert n_params(learn.model)[0] < .13*n and not isinstance(learn.model[0][0], Tied)
    learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
    assert list(learn.materialize(dead=False).model.state_dict())[0] == '0.0.weight'


def test_timm_on_one_channel(tmp_path):
    from fastai.vision.learner import vision_learner
    seed_all()
    learn = quiet(vision_learner(tiny_dls(n=16, n_valid=16, bs=16, scale=4), 'resnet10t', pretrained=False,
        normalize=False, n_in=1, n_out=10, path=tmp_path, metrics=[]))
    learn.tie(.9, granularity='kernel').fit(1)
    assert tied_layers(learn.model)


def test_tabular(tmp_path):
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    seed_all()
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=r.normal(size=128), b=r.normal(size=128), c=r.choice(list('xyz'), 128)))
    df['y'] = ((df.a+df.b > 0) ^ (df.c == 'x')).astype(str)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'],
        y_names='y', y_block=CategoryBlock, bs=32, num_workers=0)
    learn = quiet(tabular_learner(dls, layers=[32, 16], n_out=2, path=tmp_path)).tie(.5)
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_one_cycle(2, 1e-2)
    assert len(tied_layers(learn.model)) == 3


RANK = '''
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
from contracts import small_net
from paramfx.sparse.tied import tie_weights
rank = int(os.environ['RANK'])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}/meet', rank=rank, world_size=2)  # no port to race for
torch.manual_seed(rank)  # other weights on each rank: DDP takes those of rank 0
net = small_net(norm=False); tie_weights(net, .8, sign_hash=True, include='*')
ddp = DDP(net)
opt = torch.optim.SGD(ddp.parameters(), .1)
torch.manual_seed(9)
x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
for _ in range(3):
    opt.zero_grad(); torch.nn.functional.cross_entropy(ddp(x[rank::2]), y[rank::2]).backward(); opt.step()
torch.save(dict(state=net.state_dict(), idx=[m.idx for m in net.modules() if hasattr(m, 'idx')],
                sent=[n for n, _ in ddp.module.named_buffers() if n not in ddp.parameters_to_ignore]), sys.argv[1]+f'/{rank}.pt')
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # what was computed is in the file; gloo's threads may end noisily after it
'''


def test_two_ranks_are_one_big_batch(tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]), OMP_NUM_THREADS='1')
    run_fresh(RANK, tmp_path, env=env, check=True, ranks=2)
    a, b = (torch.load(tmp_path/f'{r}.pt') for r in range(2))
    assert same(a['state'], b['state']) == '' and same(a['idx'], b['idx']) == '' and not any('idx' in n for n in a['sent'])
    torch.manual_seed(0)
    net = small_net(norm=False)
    tie_weights(net, .8, sign_hash=True, include='*')
    torch.manual_seed(9)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(3): opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    for k, v in net.state_dict().items(): assert torch.allclose(v, a['state'][k], atol=1e-6), k
