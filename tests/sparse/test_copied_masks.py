"""Masks from files: every file a run can leave, by a second route; what must be refused; and a run in another process."""
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.basics import Adam, Learner, OptimWrapper, load_learner, set_seed
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from torch import nn
from torch.nn.utils import prune as torch_prune

from contracts import build, same, seed_all, small_net
from paramfx.sparse.load_masks import load_masks
from paramfx.data.memory import digits_dls
from paramfx.core.runs import RunState
from paramfx.export.materialize import load_recipe, save_recipe
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.methods import DSR, GraNet
from paramfx.core.state import effects
from paramfx.sparse.plots import MaskRecorder
from fresh import run_fresh

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning', 'ignore::FutureWarning')
CBS = {'dsr': partial(DynamicSparse, .8, period=2, method=DSR(threshold=.02)),
    'kernel': partial(DynamicSparse, .5, method='set', granularity='kernel', period=2),
       '2:4': partial(DynamicSparse, granularity='2:4', method='static'), 'prune': partial(IterativePrune, .8, n_prunes=2)}


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)

def fit(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kw)
    return learn

def truth(learn):
    "Masks straight from the buffers, by hand"
    return {n[:-5]: b.expand_as(learn.model.get_parameter(n[:-5])) for n, b in learn.model.named_buffers() if n.endswith('_mask')}

def weights(learn): return {n: p.detach().clone() for n, p in learn.model.named_parameters()}


@pytest.mark.parametrize('kind', CBS)
def test_every_file_of_a_run(mk, tmp_path, kind):
    learn = fit(mk(), 2, cbs=[CBS[kind](), RunState('run')])
    want, folder = truth(learn), learn.path/learn.model_dir
    learn.save('opt'); learn.save('bare', with_opt=False)
    save_recipe(learn.model, folder/'recipe.pth')
    torch.save(learn.model.state_dict(), folder/'sd.pt')
    torch.save({'state_dict': learn.model.state_dict(), 'epoch': 3}, folder/'other.ckpt')
    for f in ('opt.pth', 'bare.pth', 'recipe.pth', 'run.pth', 'sd.pt', 'other.ckpt'):
        got = load_masks(folder/f, learn.model)
        assert list(got) == [n for n, _ in learn.model.named_parameters() if n in want] and not same(got, want), f
        assert all(m.dtype == torch.bool and m.device.type == 'cpu' for m in got.values())
    assert not same(load_masks(learn.model), want) and not same(load_masks(learn.model.state_dict()), want)


@pytest.mark.parametrize('suffix', ['', '.safetensors'])
def test_zeros_of_plain_files(mk, suffix):
    learn = fit(mk(), 1, cbs=DynamicSparse(.8, method='static'))
    f = learn.save_plain(f'plain{suffix}')
    want = truth(learn)
    with pytest.raises(ValueError, match='zeros=True takes those for masks'): load_masks(f)
    got = load_masks(f, learn.model, zeros=True)
    assert set(got) == set(want)  # dense layers have no zeros
    for n, m in got.items(): assert torch.equal(m, learn.model.get_parameter(n).cpu() != 0) and not (m & ~want[n].cpu()).any()
    assert set(load_masks(f, zeros=True)) == set(want)


def test_torch_prune(mk):
    net = small_net()
    convs = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    torch_prune.global_unstructured([(m, 'weight') for m in convs], torch_prune.L1Unstructured, amount=.7)
    hooked = {n: m.weight_mask.bool() for n, m in net.named_modules() if hasattr(m, 'weight_mask')}
    learn = mk().load_masks(net.state_dict())
    assert not same(learn.dynamic_sparse.masks, {f'{n}.weight': m for n, m in hooked.items()})
    state = net.state_dict()
    key = next(k for k in state if k.endswith('_mask'))
    with pytest.raises(ValueError, match='numbers other than 0 and 1'): load_masks({**state, key: state[key]*.5})
    with pytest.raises(ValueError, match='a mask of shape'): load_masks({**state, key: state[key][:1, :1, :1].squeeze()})
    assert load_masks({**state, 'attn_mask': torch.ones(3, 3)}).keys() == load_masks(state).keys()  # no parameter of that name


def test_bias_masks_are_refused_before_anything_changes(mk):
    net = small_net()
    last = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    torch_prune.random_unstructured(net.get_submodule(last), 'bias', .5)
    learn = mk()
    before = weights(learn)
    with pytest.raises(ValueError, match=f'{last}.bias: the file has a mask'): learn.load_masks(net.state_dict())
    assert not same(before, weights(learn)) and not effects(learn.model)


@pytest.mark.parametrize('kind', CBS)
@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)])
def test_ticket(mk, kind, opt):
    learn = mk(opt_func=opt)
    learn.save('init', with_opt=False)
    init = weights(learn)
    fit(learn, 2, cbs=CBS[kind]()).save('done')
    want = truth(learn)
    seed_all(5)
    ticket = mk(opt_func=opt)
    fit(ticket)  # an optimizer with state
    ticket.load_masks('done', initial='init')
    for n, p in ticket.model.named_parameters(): assert torch.equal(p, init[n]*want[n] if n in want else init[n]), n
    state = ticket.opt.state if not hasattr(ticket.opt, 'opt') else ticket.opt.opt.state
    assert not any(torch.is_tensor(t) and t.any() for o in state.values() for t in o.values())
    fit(ticket, 2)
    assert not same(ticket.dynamic_sparse.masks, want)
    for n, m in want.items(): assert not ticket.model.get_parameter(n)[~m].any()


def test_ticket_equals_masking_by_hand(mk):
    "The verb, and the same in three steps with a plain callback, train to the same weights"
    a, b = mk(), mk()
    a.save('init')
    fit(a, 2, cbs=IterativePrune(.8, n_prunes=2)).save('done')
    masks = truth(a)
    ticket = mk().load_masks('done', initial='init')
    b.load('init', with_opt=False)
    b.add_cb(DynamicSparse(method='static', init_mask=masks, include=list({n.rpartition('.')[0] for n in masks})))
    for learn in (ticket, b):
        seed_all(1)
        fit(learn, 2)
    assert not same(weights(ticket), weights(b))


def test_file_saved_after_the_callback_but_before_a_prune_is_dense(mk):
    learn = mk().prune(.8, n_prunes=2)
    init = weights(learn)
    learn.save('init')
    fit(learn, 2).save('done')
    ticket = mk().load_masks('done', initial='init')
    for n, m in truth(learn).items(): assert torch.equal(ticket.model.get_parameter(n), init[n]*m)


def test_survives_what_masks_survive(mk, tmp_path):
    learn = fit(mk().load_masks(fit(mk().sparsify(.8, period=2)).model))
    want = truth(learn)
    learn.save('copied')
    again = mk().load_masks('copied')
    again.load('copied')
    assert not same(truth(again), want) and not same(weights(again), weights(learn))
    save_recipe(learn.model, tmp_path/'r.pth')
    new = load_recipe(tmp_path/'r.pth', mk().model)
    assert not same(load_masks(new), want)
    learn.export('x.pkl')
    assert not same(load_masks(load_learner(learn.path/'x.pkl').model), want)
    fit(mk().load_masks('copied', method='dsr', period=2))


def test_selection_and_granularity(mk):
    src = mk().sparsify(.5, granularity='kernel', include='*', method='static')
    want = truth(src)
    names = list(want)
    learn = mk().load_masks(src.model, exclude=names[-1].rpartition('.')[0])
    assert not same(learn.dynamic_sparse.masks, {n: want[n] for n in names[:-1]})  # the first convolution, too
    by = mk().load_masks(src.model, granularity='kernel', method='set', period=2)
    assert not same(by.dynamic_sparse.masks, want) and any(e.size > 1 for e in by.dynamic_sparse.store.items)
    with pytest.raises(ValueError, match="cuts through units"): mk().load_masks(mk().sparsify(.5, method='static').model, granularity='filter')
    with pytest.raises(ValueError, match="leave none of the file's masks"): mk().load_masks(src.model, exclude='*')


def test_refusals(mk, tmp_path):
    learn, src = mk(), mk().sparsify(.8, method='static')
    src.save('src')
    before = weights(learn)
    (tmp_path/'bad.pth').write_bytes(b'no file of torch')
    whole = (src.path/src.model_dir/'src.pth').read_bytes()
    (tmp_path/'half.pth').write_bytes(whole[:len(whole)//2])
    torch.save([1, 2], tmp_path/'list.pth')
    torch.save(src.model, tmp_path/'pickled.pth')
    src.export(tmp_path/'export.pkl')
    for f, err, text in ((tmp_path/'bad.pth', ValueError, 'damaged'),
        (tmp_path/'half.pth', ValueError, 'damaged'), (tmp_path/'list.pth', ValueError, 'no weights in it'),
                         (tmp_path/'pickled.pth', ValueError, 'not plain data'), (tmp_path/'export.pkl', ValueError, 'exported Learner'),
                         (tmp_path, IsADirectoryError, 'Name one of its files'), ('nowhere', FileNotFoundError, 'nowhere.pth'),
                         (learn.model, ValueError, 'no masks among'), ({}, ValueError, 'no weights in it')):
        with pytest.raises(err, match=text): learn.load_masks(f)
    for kw, text in ((dict(initial='src'), 'is masked there'),
        (dict(initial=nn.Linear(3, 2)), 'not in this model|missing there'), (dict(method='x'), 'choose one of'),
                     (dict(method=DSR(n_realloc=10**9)), 'n_realloc')):
        with pytest.raises(ValueError, match=text): learn.load_masks('src', **kw)
    state = small_net().state_dict()
    k = next(k for k, v in state.items() if v.ndim > 1)
    with pytest.raises(ValueError, match=f'{k} has shape'): learn.load_masks('src', initial={**state, k: state[k][:1]})
    wide = {n: torch.zeros(7, 7) for n in truth(src)}
    with pytest.raises(ValueError, match='this parameter'): learn.load_masks({**wide, **{f'{n}_mask': torch.ones(7, 7) for n in wide}})
    for made in (src, mk().prune(.5)):
        with pytest.raises(ValueError, match='masked already'): made.load_masks('src')
    assert not same(before, weights(learn)) and not effects(learn.model) and not hasattr(learn, 'dynamic_sparse')


CHILD = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from contracts import build
from paramfx.all import *
learn = build(sys.argv[2]).load_masks('done', initial='init')
start = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
torch.save([start, learn.dynamic_sparse.masks], 'out.pt')
'''

def test_in_another_process(mk, tmp_path):
    learn = mk()
    learn.save('init')
    init = weights(learn)
    fit(learn, 2, cbs=IterativePrune(.8, n_prunes=2)).save('done')
    here = Path(__file__).parent.parent
    env = {**os.environ, 'PYTHONPATH': str(here.parent), 'OMP_NUM_THREADS': '1'}
    r = run_fresh(CHILD, str(here), str(tmp_path), env=env, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    start, masks = torch.load(tmp_path/'out.pt', weights_only=True)
    want = truth(learn)
    assert not same(masks, want)
    for n, p in start.items(): assert torch.equal(p, init[n]*want[n] if n in want else init[n])


def test_masks_of_blocks_and_of_a_followed_run(tmp_path):
    "Blocks are written out to single weights; what was ever live is no weight"
    from paramfx.masks.units import expand_units
    set_seed(0)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12))
    new = lambda: Learner(digits_dls(bs=256, device='cpu'), net(), nn.CrossEntropyLoss(), path=tmp_path)
    learn = new().add_cb(MaskRecorder(follow=True)).sparsify(.75, method='set', granularity='4x4', period=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    learn.save('blocks')
    masks = load_masks(tmp_path/'models/blocks.pth', net())
    for e in learn.dynamic_sparse.store.items:
        assert torch.equal(masks[e.name], expand_units(e.mask, e.weight.shape)) and masks[e.name].shape == e.weight.shape
    copy = new().load_masks('blocks')
    assert all(torch.equal(copy.dynamic_sparse.masks[n], m) for n, m in masks.items())
    full = new().add_cb(MaskRecorder(follow=True)).sparsify(0., method='static')
    full.save('full')
    ticket = new().load_masks('blocks', initial='full')
    w = dict(full.model.named_parameters())
    assert all(torch.equal(dict(ticket.model.named_parameters())[n], w[n]*m) for n, m in masks.items())


# -- CSR layers: values, crow and col in place of weight and mask

CSR_CBS = {'dsr': partial(DynamicSparse, .8, period=2, method=DSR(threshold=.02), compute='csr'),
    'granet': partial(DynamicSparse, .8, method=GraNet(drop_frac=.1), period=2, compute='csr')}

def pixel_net():
    "A masked 3x3 convolution, and a 1x1 one and a matrix that are sparse"
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))

def csr_truth(learn):
    "Masks row by row, by hand"
    want = {n: m.clone() for n, m in truth(learn).items()}
    for n, m in learn.model.named_modules():
        if not hasattr(m, 'crow'): continue
        mask = torch.zeros(m.shape[:2], dtype=torch.bool)
        for i in range(m.shape[0]): mask[i, m.col[m.crow[i]:m.crow[i+1]].long()] = True
        want[f'{n}.weight'] = mask.view(m.shape)
    return want


@pytest.mark.parametrize('kind', CSR_CBS)
def test_every_file_of_a_run_with_csr_layers(tmp_path, kind):
    mk = partial(build, tmp_path, model=pixel_net)
    learn = fit(mk(), 2, cbs=[CSR_CBS[kind](), RunState('run')])
    want, folder = csr_truth(learn), learn.path/learn.model_dir
    assert {n: m.shape for n, m in want.items()} == {'2.weight': (12, 8, 3, 3), '4.weight': (20, 12, 1, 1),
        '8.weight': (10, 20)} and not same(learn.dynamic_sparse.masks, want)
    learn.save('opt'); learn.save('bare', with_opt=False)
    save_recipe(learn.model, folder/'recipe.pth')
    torch.save({'state_dict': learn.model.state_dict(), 'epoch': 3}, folder/'other.ckpt')
    for f in ('opt.pth', 'bare.pth', 'recipe.pth', 'run.pth', 'other.ckpt'):
        for net in (pixel_net(), learn.model):
            got = load_masks(folder/f, net)
            assert list(got) == ['2.weight', '4.weight', '8.weight'] and not same(got, want), f
            assert all(m.dtype == torch.bool for m in got.values())
    assert not same(load_masks(learn.model), want)  # a network tells its shapes itself
    with pytest.raises(ValueError, match=r'4.weight: this layer is sparse .* `load_masks\(file, model\)`'): load_masks(folder/'opt.pth')
    for how, masked in (('dense', [True, True, True]), ('csr', [True, False, False]), (['8'], [True, True, False])):
        copy = fit(mk(seed=1).load_masks('opt', compute=how))
        assert not same(copy.dynamic_sparse.masks, want) and [e.masks for e in copy.dynamic_sparse.store.items] == masked


def test_a_ticket_of_csr_layers(tmp_path):
    mk = partial(build, tmp_path, model=pixel_net)
    learn = mk()
    learn.save('init', with_opt=False)
    init = weights(learn)
    fit(learn, 2, cbs=CSR_CBS['dsr']()).save('done')
    want, ticket = csr_truth(learn), mk(seed=3)
    before = weights(ticket)
    with pytest.raises(ValueError, match='[248].weight is masked there'): ticket.load_masks('done', initial='done')
    assert not same(weights(ticket), before) and not effects(ticket.model)
    ticket.load_masks('done', initial='init', compute='csr')
    for e in ticket.dynamic_sparse.store.items: assert torch.equal(e.mask, want[e.name]) and torch.equal(e.weight, init[e.name]*want[e.name]), e.name
    plain = learn.save_plain('plain')
    with_zeros = load_masks(plain, learn.model, zeros=True)
    assert all(torch.equal(with_zeros[e.name], e.weight != 0) for e in learn.dynamic_sparse.store.items)


@pytest.mark.parametrize('change', [
    dict(crow=lambda t: t[:-1]), dict(crow=lambda t: t+1), dict(crow=lambda t: t.flip(0)), dict(crow=lambda t: t[None]), dict(
        crow=lambda t: t.index_fill(0, torch.tensor([3]), 2**30)),
    dict(col=lambda t: t[:-1]), dict(col=lambda t: t+2**20), dict(col=lambda t: -t-1), dict(values=lambda t: t[:-1]),
    dict(values=lambda t: t.view(-1, 1)), dict(crow=lambda t: t[:0])])
def test_damaged_csr_layers(tmp_path, change):
    learn = build(tmp_path, CSR_CBS['dsr']())
    state = learn.model.state_dict()
    state |= {f'1.2.{k}': f(state[f'1.2.{k}']) for k, f in change.items()}
    with pytest.raises(ValueError, match=r'1.2.weight: the sparse layer of the file is none of shape \(10, 192\)'): load_masks(state, small_net())
    other = build(tmp_path)
    before = weights(other)
    with pytest.raises(ValueError, match='1.2.weight'): other.load_masks(state)
    assert not same(weights(other), before) and not effects(other.model)
