"CSR layers, alone and under `DynamicSparse`: everything is compared with the masked dense layer"
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.basics import Adam, OptimWrapper, SGD, load_learner
import fastai.callback.schedule # gives Learner lr_find  # noqa: F401
from fastai.callback.training import GradientAccumulation
from torch import nn

import paramfx.report.plan # gives Learner plan  # noqa: F401
from contracts import build, footprint, opt_state_of, run_record, same, seed_all, snapshot, tiny_dls
from paramfx.kernels.csr import CSR, CSRLinear
from paramfx.sparse.compute import plan_csr
from paramfx.core.runs import RunState
from paramfx.export.materialize import load_recipe, materialize, save_recipe
from paramfx.report.cost import cost
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.plots import MaskRecorder
from paramfx.sparse.sparsify import plan_masks
from paramfx.sparse.methods import DSR, SET, GraNet

OPTS = {
    'sgd': dict(opt_func=partial(SGD, mom=.9), wd=.1),
    'adam': dict(opt_func=Adam),
    'torch sgd': dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=.1))),
    'torch adamw': dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
}
METHODS = {
    'static': dict(method='static'),
    'dsr': dict(method=DSR(threshold=.02, n_realloc=.2), period=2),
    'set': dict(method=SET(drop_frac=.2), period=2),
    'rigl': dict(method='rigl', period=2),
    'granet': dict(method=GraNet(drop_frac=.1), period=2),
}


def net(dtype=torch.float64):
    "A 3x3 convolution stays masked, a 1x1 one and two matrices become sparse; a bias before batch norm would train on rounding errors"
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 10)).to(dtype)


def learner(path, compute, method='dsr', opt='sgd', dtype=torch.float64, cbs=(), **kw):
    cb = DynamicSparse(.8, compute=compute, **{**METHODS[method], **kw})
    return build(path, [cb, *cbs], model=lambda: net(dtype), dls=lambda: tiny_dls(dtype=dtype), lr=.02, **OPTS[opt])


def layers(learn): return [m for m in learn.model.modules() if isinstance(m, CSR)]


# -- layers

def sparse_pair(layer, density=.3):
    layer = layer.double()
    layer.weight.data *= torch.rand(layer.weight.shape) < density
    return layer, CSRLinear.of(layer)


@pytest.mark.parametrize('make,shape', [
    (lambda: nn.Linear(7, 5), (4, 7)), (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)), (lambda: nn.Linear(7, 1), (7,)), (lambda: nn.Linear(1, 3), (4, 1)),
    (lambda: nn.Conv1d(4, 3, 1), (2, 4, 5)), (lambda: nn.Conv2d(4, 3, 1, bias=False), (2, 4, 3, 2)), (lambda: nn.Conv2d(4, 3, 1), (4, 3, 2)),
    (lambda: nn.Conv3d(4, 3, 1), (2, 4, 2, 1, 2))])
def test_layers_match_the_dense_one(make, shape):
    seed_all()
    dense, sp = sparse_pair(make())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, z = dense(x), sp(x)
    assert y.shape == z.shape and torch.allclose(y, z, atol=1e-12) and z.is_contiguous()
    g = torch.randn_like(y)
    a, b = torch.autograd.grad(y, [x, *dense.parameters()], g), torch.autograd.grad(z, [x, *sp.parameters()], g)
    assert torch.allclose(a[0], b[0], atol=1e-12) and torch.allclose(a[1].flatten()[sp.flat], b[1], atol=1e-12)
    assert all(torch.allclose(i, j, atol=1e-12) for i, j in zip(a[2:], b[2:]))
    def run(x, *ps): return torch.func.functional_call(sp, dict(zip(dict(sp.named_parameters()), ps)), (x,))
    assert torch.autograd.gradcheck(run, (x, *sp.parameters()))
    assert same(snapshot(sp.plain()), snapshot(dense)) == ''


def test_weight_passes_gradients_on():
    _, sp = sparse_pair(nn.Linear(6, 4))
    g, = torch.autograd.grad((sp.weight*torch.arange(24.).view(4, 6)).sum(), sp.values)
    assert torch.equal(g, sp.flat.double())


def test_an_empty_row_and_an_empty_layer():
    lin = nn.Linear(4, 3)
    for mask in (torch.zeros(3, 4).bool(), torch.zeros(3, 4).bool().index_fill_(0, torch.tensor([1]), True)):
        sp, x = CSRLinear.of(lin, mask), torch.randn(5, 4)
        assert torch.allclose(sp(x), x@(lin.weight*mask).t()+lin.bias, atol=1e-6)
        sp(x).sum().backward()


def test_copies_and_pickles():
    _, sp = sparse_pair(nn.Linear(6, 4))
    x = torch.randn(2, 6, dtype=torch.float64)
    y = sp(x)
    for twin in (deepcopy(sp), pickle.loads(pickle.dumps(sp))):
        assert torch.equal(twin(x), y) and twin.values.data_ptr() != sp.values.data_ptr() and '_index' not in sp.__getstate__()
    assert sp.float()(x.float()).dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16): assert sp(x.bfloat16()).dtype == torch.float32


def test_macs():
    dense, sp = sparse_pair(nn.Linear(6, 4))
    c = cost(sp.float(), torch.randn(5, 6), latency=False)
    n = len(sp.values)
    assert (c.macs, c.macs_executed, c.macs_nonzero) == (5*24, 5*n, 5*n) and c.params == n+4


def test_files_of_other_layers():
    dense, sp = sparse_pair(nn.Linear(6, 4))
    other = CSRLinear.of(nn.Linear(6, 4).double(), torch.rand(4, 6) < .7)
    p = sp.values
    sp.load_state_dict(other.state_dict())
    assert sp.values is p and torch.equal(sp.weight, other.weight)
    masked = nn.Linear(6, 4).double()
    masked.register_buffer('weight_mask', torch.rand(4, 6) < .4)
    sp.load_state_dict(masked.state_dict())
    assert torch.equal(sp.weight, masked.weight*masked.weight_mask)
    with pytest.raises(RuntimeError, match='size mismatch'): sp.load_state_dict(nn.Linear(5, 4).state_dict())


def test_a_layer_that_grows_while_its_old_graph_lives():
    sp = CSRLinear.of(nn.Linear(6, 4), torch.rand(4, 6) < .5)
    held = sp(torch.randn(2, 6)).sum()
    held.backward()
    sp.place_(torch.arange(24), torch.randn(24))
    sp(torch.randn(2, 6)).sum().backward()
    assert sp.values.grad.shape == (24,)


# -- training

def records(learn):
    "Losses, dense weights and dense optimizer state of every parameter"
    res = {}
    names = {id(e.param): e for e in learn.dynamic_sparse.store.items}
    for n, p in learn.model.named_parameters():
        e = names.get(id(p))
        spread = (lambda t: t) if e is None or e.masks else (lambda t: t.new_zeros(e.units).index_copy(0, e.module.flat, t).view(e.module.shape))
        state = {k: spread(t) if torch.is_tensor(t) and t.shape == p.shape else t for k, t in opt_state_of(learn.opt, p).items()}
        res[n.replace('values', 'weight')] = dict(weight=spread(p.detach()), **state)
    return res


def close(a, b):
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].keys() == b[n].keys()
        for k, t in a[n].items(): assert torch.allclose(torch.as_tensor(t).double(), torch.as_tensor(b[n][k]).double(), rtol=1e-10, atol=1e-10), f'{n} {k}'


@pytest.mark.few(3)
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('method', METHODS)
def test_trains_as_the_masked_layers_do(method, opt, tmp_path):
    a, b = (learner(tmp_path, c, method, opt) for c in ('dense', 'csr'))
    before = [len(m.values) for m in layers(b)]
    for l in (a, b): l.fit(2)
    assert len(layers(b)) == 3 and all(e.masks != isinstance(e.module, CSR) for e in b.dynamic_sparse.store.items)
    assert same(a.dynamic_sparse.masks, b.dynamic_sparse.masks) == '' and a.dynamic_sparse.history == b.dynamic_sparse.history
    if method != 'static': assert len(b.dynamic_sparse.history) >= 3 and sum(o['grown']['8.weight'] for o in b.dynamic_sparse.history)
    if method in ('dsr', 'granet'): assert before != [len(m.values) for m in layers(b)], 'no layer has changed its size'
    close(records(a), records(b))
    assert torch.allclose(torch.stack(a.recorder.losses).double(), torch.stack(b.recorder.losses).double(), rtol=1e-9)


@pytest.mark.parametrize('opt', OPTS)
def test_state_is_of_live_values_only(opt, tmp_path):
    learn = learner(tmp_path, 'csr', opt=opt)
    learn.fit(1)
    for e in learn.dynamic_sparse.store.sparse:
        sizes = {t.numel() for t in opt_state_of(learn.opt, e.param).values() if torch.is_tensor(t) and t.ndim}
        assert sizes == {e.live} and len(e.param) == e.live


def test_accumulated_gradients_of_rigl(tmp_path):
    a, b = (learner(tmp_path, c, 'rigl', cbs=[GradientAccumulation(64)]) for c in ('dense', 'csr'))
    for l in (a, b): l.fit(2)
    assert b.dynamic_sparse.history and same(a.dynamic_sparse.masks, b.dynamic_sparse.masks) == ''
    close(records(a), records(b))
    assert all(m.tapped is None for m in layers(b))


def test_an_optimizer_that_is_there_goes_on(tmp_path):
    a, b = (build(tmp_path, model=net, dls=lambda: tiny_dls(dtype=torch.float64), **OPTS['sgd']) for _ in range(2))
    for l, c in ((a, 'dense'), (b, 'csr')):
        l.fit(1)
        opt = l.opt
        l.add_cb(DynamicSparse(.8, compute=c, **METHODS['set']))
        l.fit(1)
        assert l.opt is opt
    close(records(a), records(b))


# -- files and materialize

def go_on(*learns):
    "Another epoch, with the same batches"
    for l in learns:
        seed_all(3)
        l.dls = tiny_dls(dtype=next(l.model.parameters()).dtype)
        l.fit(1)


def test_files(tmp_path):
    a, b = learner(tmp_path, 'csr', dtype=torch.float32), learner(tmp_path, 'csr', dtype=torch.float32)
    a.fit(2)
    a.save('run')
    assert [len(m.values) for m in layers(a)] != [len(m.values) for m in layers(b)]
    b.create_opt()
    b.load('run', with_opt=True)
    assert same(snapshot(a.model), snapshot(b.model)) == ''
    go_on(a, b)
    assert same(run_record(a)['model'], run_record(b)['model']) == ''


def test_weights_alone_of_another_size(tmp_path):
    a, b = learner(tmp_path, 'csr'), learner(tmp_path, 'csr')
    a.fit(2); b.fit(1)
    a.save('run', with_opt=False)
    b.load('run', with_opt=False).fit(1)


def test_a_masked_run_goes_on_sparse(tmp_path):
    a, b = learner(tmp_path, 'dense'), learner(tmp_path, 'csr')
    a.fit(1)
    a.save('run')
    b.create_opt()
    b.load('run', with_opt=True)
    go_on(a, b)
    close(records(a), records(b))
    b.save('sparse')
    with pytest.raises(ValueError, match="compute='csr'"): a.load('sparse')


def test_resumed_is_uninterrupted(tmp_path):
    whole = learner(tmp_path, 'csr', 'dsr', dtype=torch.float32, cbs=[RunState('whole')])
    whole.fit(3)
    class Stop(Exception): pass
    cut = learner(tmp_path, 'csr', 'dsr', dtype=torch.float32, cbs=[RunState('cut')])
    step, n = cut.dynamic_sparse.on_epoch, []
    def on_epoch():
        n.append(1)
        if len(n) == 3: raise Stop('here')
        step()
    cut.dynamic_sparse.__dict__['on_epoch'] = on_epoch
    with pytest.raises(Stop): cut.fit(3)
    again = learner(tmp_path, 'csr', 'dsr', dtype=torch.float32, cbs=[RunState('cut')])
    again.resume('cut').fit(3)
    assert same(snapshot(again.model), snapshot(whole.model)) == ''
    assert same(run_record(again)['opt'], run_record(whole)['opt']) == ''


def test_the_way_out(tmp_path):
    learn = learner(tmp_path, 'csr')
    learn.fit(1)
    x = tiny_dls(dtype=torch.float64).one_batch()[0][:4]
    y, masks = learn.model.eval()(x), learn.dynamic_sparse.masks
    plain = materialize(learn.model, x, dead=False)
    assert type(plain[8]) is nn.Linear and type(plain[4]) is nn.Conv2d and torch.allclose(plain.eval()(x), y)
    loaded = net()
    loaded.load_state_dict(torch.load(learn.save_plain('plain'), weights_only=True))
    assert same(snapshot(loaded), snapshot(plain)) == ''
    again = load_recipe(save_recipe(learn.model, tmp_path/'recipe'), net())
    assert [type(m) for m in again.modules()] == [type(m) for m in learn.model.modules()] and torch.equal(again.eval()(x), y)
    state = records(learn)
    learn.release()
    assert footprint(learn.model) == footprint(net()) and same(snapshot(learn.model), snapshot(plain)) == ''
    assert all(torch.equal(state[n]['grad_avg'], learn.opt.state[p]['grad_avg']) for n, p in learn.model.named_parameters())
    before = learn.model[8].weight.detach().clone()
    learn.fit(1)
    assert (learn.model[8].weight != before)[~masks['8.weight']].any(), 'what was dead does not train'


def test_materialize_a_learner(tmp_path):
    learn = learner(tmp_path, 'csr', dtype=torch.float32)
    learn.fit(1)
    learn.materialize(dead=False)
    assert type(learn.model[8]) is nn.Linear
    learn.fit(1)


def test_export_and_lr_find(tmp_path):
    learn = learner(tmp_path, 'csr', 'rigl', dtype=torch.float32)
    learn.fit(1)
    before = snapshot(learn.model)
    learn.lr_find(num_it=6, show_plot=False)
    assert same(before, snapshot(learn.model)) == '' and all(m.tapped is None for m in layers(learn))
    learn.fit(1)
    learn.export('it.pkl')
    again = load_learner(tmp_path/'it.pkl')
    assert same(snapshot(again.model), snapshot(learn.model)) == ''


def test_frozen_layers_do_not_move(tmp_path):
    learn = learner(tmp_path, 'csr', 'set')
    learn.model[8].values.requires_grad_(False)
    before = learn.model[8].weight.detach()
    learn.fit(1)
    assert torch.equal(before, learn.model[8].weight)


# -- what is said, and refused

def test_the_plan(tmp_path):
    learn = build(tmp_path, model=net, dls=lambda: tiny_dls(dtype=torch.float64))
    table = learn.plan(DynamicSparse(.8, compute='csr'))
    assert [(r['layer'], r.get('compute')) for r in table if 'live' in r] == [('2.weight', 'dense'),
        ('4.weight', 'csr'), ('8.weight', 'csr'), ('10.weight', 'csr')]
    assert 'kernel_size' in table[0]['note'] and table.after.macs_executed < table.before.macs_executed
    assert not layers(learn)
    learn.add_cb(DynamicSparse(.8, compute='csr'))
    assert list(learn.plan(DynamicSparse(.8, compute='csr'))) == list(table)


def test_auto_times_and_tells(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    learn = build(tmp_path, DynamicSparse({'1': .5, '3': .99, '5': .5}, 'static', compute='auto'), model=model)
    rows = {r['layer']: r for r in learn.paramfx['dynamic_sparse']}
    assert rows['3.weight']['compute'] == 'csr' and rows['3.weight']['csr_time'] < 1
    assert all((r['compute'] == 'csr') == (r['csr_time'] < 1) for r in rows.values())
    learn.fit(1)


def test_a_gpu_stays_dense():
    class Dls: device = torch.device('cuda')
    class Learn: dls = Dls
    table = plan_csr(net(), plan_masks(net(), .8), 'csr', Learn)
    assert {r.get('compute') for r in table} == {'dense', None} and 'cuda' in table[1]['note']


@pytest.mark.parametrize('kw,match', [
    (dict(granularity='row'), "granularity='row'"), (dict(granularity='2:4'), "granularity='2:4'"), (dict(state='keep'), "state='keep'"),
    (dict(method='snfs'), "method='snfs'"), (dict(method='deepr'), "method='deepr'"), (dict(compute='fast'), "compute='fast'")])
def test_settings_that_need_what_is_dead(kw, match):
    with pytest.raises(ValueError, match=match): DynamicSparse(.8, **dict(compute='csr') | kw)


def test_what_was_ever_live_is_not_followed(tmp_path):
    learn = build(tmp_path, DynamicSparse(.8, compute='csr'), model=net, dls=lambda: tiny_dls(dtype=torch.float64))
    with pytest.raises(ValueError, match="a recorder that follows .*compute='dense'"): learn.fit(1, cbs=MaskRecorder(follow=True))


@pytest.mark.parametrize('kw,match', [
    (dict(compute='csr', include='2'), '2.weight'), (dict(compute=['2']), '2.weight'),
    (dict(compute=['8'], exclude='8'), '8 is not masked'), (dict(compute=['nope']), 'nope')])
def test_layers_that_cannot_be_sparse(kw, match, tmp_path):
    learn = build(tmp_path, model=net, dls=lambda: tiny_dls(dtype=torch.float64))
    before = footprint(learn.model)
    with pytest.raises(ValueError, match=match): learn.add_cb(DynamicSparse(.8, **kw))
    assert footprint(learn.model) == before and not learn.paramfx


def test_a_shared_weight_stays_dense():
    m = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    m[1].weight = m[0].weight
    table = plan_csr(m, plan_masks(m, .5), 'csr')
    assert [r.get('compute') for r in table] == ['dense', 'csr', None] and 'shared with 1.weight' in table[0]['note']
