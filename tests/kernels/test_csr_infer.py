"Sparse layers in a network that is only used"
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.basics import Learner, load_learner
from torch import nn

from contracts import seed_all
from paramfx.kernels import timing as csr_infer
from paramfx.kernels import inference as frozen_mod
from paramfx.kernels.csr import CSRConv2d, CSRLinear
from paramfx.kernels.timing import break_even, plan_infer, sparse_infer, time_infer
from paramfx.data.memory import digits_dls
from paramfx.kernels.inference import Frozen24, FrozenBSR, FrozenCSR, InferenceOnly, fit_block, freeze_layers, frozen, frozen_layers, is_24
from paramfx.export.materialize import Recipe, load_recipe, materialize, save_recipe
from paramfx.report.cost import cost
from paramfx.sparse.callback import DynamicSparse
from fresh import run_fresh


def net(density=.02):
    seed_all()
    m = nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 10))
    with torch.no_grad(): m[0].weight.mul_(torch.rand(500, 600) < density)
    return m


def blocked(n_out=64, n_in=96, block=16, density=.3, dtype=torch.float64, make=nn.Linear):
    seed_all()
    m = make(n_in, n_out, *(() if make is nn.Linear else (1,))).to(dtype)
    mask = (torch.rand(n_out//block, n_in//block) < density).repeat_interleave(block, 0).repeat_interleave(block, 1)
    with torch.no_grad(): m.weight.mul_(mask.view_as(m.weight))
    return m


@pytest.fixture
def fast(monkeypatch):
    "Trials that say what they are told, so that choices do not hang on the machine"
    told = {'csr': .5, 'bsr': .7}
    def ratios(layers, x, rounds=7): return [told[{FrozenCSR: 'csr', FrozenBSR: 'bsr', Frozen24: '2:4'}[type(m)]] for m in layers[1:]]
    monkeypatch.setattr(csr_infer, 'ratios', ratios)
    monkeypatch.setattr(csr_infer, 'break_even', lambda *a, **k: .25)
    return told


# layers

@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize('kind', ['csr', 'bsr 16x16', 'bsr 8x8'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(96,), (1, 96), (31, 96), (300, 96), (2, 40, 96), (1, 1, 96), (0, 96)])
def test_outputs(bias, shape, kind, dtype, tol):
    m = blocked(dtype=dtype)
    if not bias: m.bias = None
    x, new = torch.randn(shape, dtype=dtype), frozen(m, kind).eval()
    y = new(x)
    assert y.shape == m(x).shape and y.dtype == dtype and torch.allclose(y, m(x), atol=tol, rtol=tol) and not y.requires_grad
    assert torch.equal(new.plain().weight, m.weight) and type(new.plain()) is nn.Linear and (new.plain().bias is None) != bias
    assert all(p.requires_grad for p in new.plain().parameters())


@pytest.mark.parametrize('kind', ['csr', 'bsr 16x16'])
@pytest.mark.parametrize('make,shape', [(nn.Conv1d, (3, 96, 40)), (nn.Conv2d, (3, 96, 7, 5)),
    (nn.Conv2d, (2, 96, 40, 40)), (nn.Conv2d, (3, 96, 11, 10)), (nn.Conv2d, (96, 5, 5)),
                                        (nn.Conv2d, (2, 96, 1, 1)), (nn.Conv3d, (2, 96, 3, 4, 5)), (nn.Conv2d, (0, 96, 5, 5))])
def test_convolutions(make, shape, kind):
    m, x = blocked(make=make), torch.randn(shape, dtype=torch.float64)
    new = frozen(m, kind).eval()
    assert new(x).shape == m(x).shape and torch.allclose(new(x), m(x), atol=1e-10)
    assert type(new.plain()) is make and torch.equal(new.plain()(x), m(x))
    if x.ndim == 4 and x.shape[2] > 1 and len(x): # channels last, and a slice
        assert torch.allclose(new(x.contiguous(memory_format=torch.channels_last)), m(x), atol=1e-10)
        assert torch.allclose(new(x[:, :, 1:]), m(x[:, :, 1:]), atol=1e-10)


@pytest.mark.parametrize('kind', ['csr', 'bsr 16x16'])
@pytest.mark.parametrize('n_out', [16, 64])
@pytest.mark.parametrize('items', [1, 40])
def test_all_zero_and_one_row_of_blocks(kind, n_out, items):
    m, x = blocked(n_out, density=1.), torch.randn(items, 96, dtype=torch.float64)
    assert torch.allclose(frozen(m, kind).eval()(x), m(x), atol=1e-10)
    with torch.no_grad(): m.weight.zero_()
    new = frozen(m, kind).eval()
    assert new.values.numel() == 0 and torch.equal(new(x), m.bias.expand(items, -1))


def test_one_row():
    m = nn.Linear(50, 1)
    with torch.no_grad(): m.weight[0, ::2] = 0
    x = torch.randn(40, 50)
    assert torch.allclose(FrozenCSR(m).eval()(x), m(x), atol=1e-5)


def test_of_csr_layers_and_pickled():
    m, conv = net()[0], nn.Conv2d(20, 30, 1)
    with torch.no_grad(): conv.weight.mul_(torch.rand_like(conv.weight) < .2)
    for old, twin, x in ((m, CSRLinear.of(m), torch.randn(3, 600)), (conv, CSRConv2d.of(conv), torch.randn(2, 20, 4, 4))):
        new = FrozenCSR(twin).eval()
        assert torch.allclose(new(x), old(x), atol=1e-5)
        for other in (pickle.loads(pickle.dumps(new)), deepcopy(new)): assert torch.equal(other(x), new(x))


def test_autocast_computes_in_the_type_of_the_weight():
    m = FrozenCSR(net()[0]).eval()
    x = torch.randn(4, 600)
    with torch.autocast('cpu', torch.bfloat16): assert m(x).dtype == torch.float32 and torch.equal(m(x), m(x.float()))


def test_nothing_trains():
    m = freeze_layers(net(), {'0': 'csr'})
    x = torch.randn(4, 600)
    assert not m.training and not any(p.requires_grad for p in m[0].parameters()) and m(x.requires_grad_())[0].grad_fn is not None
    with pytest.raises(RuntimeError, match='for inference'): m.train()(x)
    with torch.no_grad(): assert torch.equal(m(x), m.eval()(x)) # as for batch norms that are measured anew


def test_blocks_are_found():
    assert [fit_block(blocked(block=b).weight) for b in (32, 16, 8, 4)] == [32, 16, 8, 4]
    m = blocked(block=16)
    with torch.no_grad(): m.weight.mul_(torch.rand_like(m.weight) < .85)
    assert fit_block(m.weight) == 16 # a sixth more is stored
    assert fit_block(net().double()[0].weight) == 0 and fit_block(torch.zeros(6, 6)) == 0
    with pytest.raises(ValueError, match="no block fits.*'csr'"): FrozenBSR(net()[0])
    with pytest.raises(ValueError, match='do not divide'): FrozenBSR(nn.Linear(90, 64), 16)


def test_blocks_count_what_they_store():
    m = nn.Sequential(blocked(dtype=torch.float32))
    with torch.no_grad(): m[0].weight.mul_(torch.rand_like(m[0].weight) < .9)
    new, x = freeze_layers(m, {'0': 'bsr 16x16'}), torch.randn(5, 96)
    c = cost(new, x, latency=False)
    stored = int(m[0].weight.view(4, 16, 6, 16).abs().amax((1, 3)).count_nonzero())*256
    assert c.macs_executed == 5*stored and c.macs == 5*64*96


def test_files_of_another_pattern():
    a, b = net(), net(.05)
    new, twin = freeze_layers(a, {'0': 'csr'}), freeze_layers(b, {'0': 'csr'})
    new.load_state_dict(twin.state_dict())
    x = torch.randn(3, 600)
    assert torch.equal(new(x), twin(x))
    for key, i, v in (('0.col', 0, 600), ('0.crow', -1, 7), ('0.col', 0, -1)):
        broken = {k: t.clone() for k, t in freeze_layers(a, {'0': 'csr'}).state_dict().items()}
        broken[key][i] = v
        with pytest.raises(RuntimeError, match='0.values: no sparse weight'): new.load_state_dict(broken)
        assert torch.equal(new[0].values, twin[0].values)
    with pytest.raises(RuntimeError, match='0.values'): new.load_state_dict(a.state_dict())
    eight = freeze_layers(nn.Sequential(blocked()), {'0': 'bsr 8x8'})
    with pytest.raises(RuntimeError, match='0.'): eight.load_state_dict(freeze_layers(nn.Sequential(blocked()), {'0': 'bsr 16x16'}).state_dict())


# two of four

def half(dtype=torch.float16, n_out=32, n_in=64):
    m = nn.Linear(n_in, n_out).to(dtype)
    with torch.no_grad(): m.weight.mul_(torch.tensor([1., 0., 0., 1.], dtype=dtype).repeat(n_in//4))
    return m


def test_two_of_four_without_a_gpu():
    m = half()
    assert is_24(m.weight) and not is_24(nn.Linear(8, 8).weight) and not is_24(torch.zeros(4, 6))
    new = pickle.loads(pickle.dumps(Frozen24(m).eval()))
    assert torch.equal(new.plain().weight, m.weight) and new.state_dict().keys() == m.state_dict().keys()
    with pytest.raises(RuntimeError, match='CUDA'): new(torch.randn(2, 64).half())
    for layer, why in ((m, 'CUDA'), (nn.Linear(64, 32).half(), 'no zeros'), (net()[0].half(), 'not 2:4')):
        with pytest.raises(ValueError, match=rf"fmt='2:4': no layer.*0: .*{why}.*granularity='2:4'"):
            sparse_infer(nn.Sequential(layer), torch.randn(2, layer.in_features).half(), '2:4')


def test_two_of_four_packs_once_for_a_weight(monkeypatch):
    packs = []
    monkeypatch.setattr(frozen_mod, 'pack_24', lambda w: packs.append(1) or w.detach().clone())
    for m, x in ((half(torch.float32), torch.randn(3, 5, 64)), (nn.Conv2d(64, 32, 1), torch.randn(2, 64, 4, 3))):
        with torch.no_grad(): m.weight.copy_(half(torch.float32).weight.view_as(m.weight))
        packs.clear()
        new = Frozen24(m).eval()
        assert torch.allclose(new(x), m(x), atol=1e-5) and torch.allclose(new(x), m(x), atol=1e-5) and len(packs) == 1
        new.load_state_dict({k: 2*v for k, v in m.state_dict().items()})
        assert torch.allclose(new(x), 2*m(x), atol=1e-5) and len(packs) == 2
        new.load_state_dict({k: torch.ones_like(v) for k, v in m.state_dict().items()})
        with pytest.raises(ValueError, match='more than two of four'): new(x)


def test_two_of_four_is_chosen_by_time(monkeypatch, fast):
    monkeypatch.setattr(csr_infer, 'pack_24', lambda w: w)
    monkeypatch.setattr(frozen_mod, 'pack_24', lambda w: w)
    m, x = nn.Sequential(half(torch.float16)), torch.randn(4, 64).half()
    fast['2:4'] = .6
    assert [(r['becomes'], r['time']) for r in plan_infer(m, x)] == [('2:4', .6)] and type(sparse_infer(m, x, '2:4')[0]) is Frozen24
    fast['2:4'] = 1.1
    assert [(r['becomes'], r['why']) for r in plan_infer(m, x)] == [('dense', '2:4 is slower')]


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_two_of_four_on_a_gpu(dtype):
    m, x = nn.Sequential(half(dtype, 256, 512), nn.ReLU(), nn.Linear(256, 10).to(dtype)).cuda(), torch.randn(64, 512).to(dtype).cuda()
    new = sparse_infer(m, x, '2:4')
    assert [type(o) for o in new] == [Frozen24, nn.ReLU, nn.Linear] and torch.allclose(new(x), m(x), atol=2e-2)
    with pytest.raises(ValueError, match='CPU only'): sparse_infer(m, x, 'csr')


# the verb

def test_the_verb():
    m, x = net(), torch.randn(32, 600)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    new = sparse_infer(m, x)
    assert [type(o) for o in new] == [FrozenCSR, nn.ReLU, nn.Linear] and all(torch.equal(v, m.state_dict()[k]) for k, v in before.items())
    assert torch.allclose(new(x), m(x), atol=1e-5)
    assert type(sparse_infer(net(.9), x, 'csr')[0]) is FrozenCSR
    with pytest.warns(UserWarning, match="'auto': every layer stays dense. 0: csr is slower; 2: no zeros"):
        assert type(sparse_infer(net(.9), x)[0]) is nn.Linear
    row, = plan_infer(m, x, include='0')
    assert row['density'] == before['0.weight'].count_nonzero()/300_000 and row['items'] == 32 and 0 < row[
        'time'] < 1 and row['time'] < 1 and 0 < row['break_even'] < 1


def test_the_fastest_wins(fast):
    m, x = nn.Sequential(blocked(dtype=torch.float32)), torch.randn(4, 96)
    def becomes(fmt='auto'): return plan_infer(m, x, fmt)[0]['becomes']
    assert becomes() == 'csr' and becomes('bsr').startswith('bsr')
    fast['bsr'] = .3
    assert becomes() in ('bsr 8x8', 'bsr 16x16') and becomes('csr') == 'csr' and type(sparse_infer(m, x)[0]) is FrozenBSR
    fast.update(csr=1.2, bsr=1.1)
    assert becomes() == 'dense' and becomes('csr') == 'csr' and plan_infer(m, x)[0]['why'].startswith('bsr')


def test_reasons(fast):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.point, self.full, self.low, self.unused, self.grouped = nn.Conv2d(
                4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8), nn.Conv2d(8, 8, 1, groups=2)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            for n, m in self.named_modules():
                if isinstance(m, (nn.Linear, nn.Conv2d)) and n != 'full':
                    with torch.no_grad(): m.weight.flatten()[::2] = 0
        def forward(self, x):
            x = self.full(self.grouped(self.point(self.conv(x))).mean((2, 3)))
            return self.block(self.low(x.bfloat16()).float()[:, None])
    m, x = Odd(), torch.randn(2, 4, 6, 6)
    whys = {r['layer']: (r['becomes'], r['why']) for r in plan_infer(m, x)}
    assert whys['point'] == ('csr', '')
    for n, why in dict(conv='kernel_size=(3, 3)', full='no zeros', low='bfloat16', unused='not called', grouped='groups=2').items():
        assert whys[n][0] == 'dense' and why in whys[n][1], n
    assert whys['block.linear1'] == ('dense', 'its block reads the weight itself')
    assert frozen_layers(sparse_infer(m, x)) == ['point']
    with pytest.raises(ValueError, match="fmt='csr': no layer can take it.*grouped: a convolution with groups=2.*Make the network sparse first"):
        sparse_infer(m, x, 'csr', include='grouped')


def test_a_layer_with_two_names(fast):
    m = nn.Sequential(lin := net()[0], nn.Linear(500, 600))
    m.add_module('again', lin)
    new = sparse_infer(m, torch.randn(8, 600))
    assert type(new[0]) is FrozenCSR and new.again is new[0]


def test_errors():
    m, x = net(), torch.randn(4, 600)
    with pytest.raises(ValueError, match="fmt='rows': choose one of 'csr'"): sparse_infer(m, x, 'rows')
    with pytest.raises(ValueError, match="fmt='rows'"): materialize(m, x, fmt='rows')
    with pytest.raises(ValueError, match="fmt='bsr': no layer can take it. 0: no square block fits its zeros; 2: no zeros"): materialize(m, x, fmt='bsr')
    with pytest.raises(ValueError, match="There is no linear layer"): sparse_infer(nn.ReLU(), x, 'csr')
    DynamicSparse(.5, 'static').convert(m).attach(m)
    with pytest.raises(ValueError, match='materialize'): sparse_infer(m, x)


def test_trials_leave_the_random_state():
    seed_all(5)
    want = torch.rand(1)
    seed_all(5)
    time_infer(64, 64, 100, 3)
    plan_infer(net(.9), torch.randn(2, 600, generator=torch.Generator()))
    seed_all(5)
    break_even(32, 32, 2, rounds=1)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_break_even_lies_between_faster_and_slower(dtype):
    even = break_even(800, 800, 32, dtype=dtype)
    assert .03 < even < .97 and time_infer(800, 800, 800*8, 32, dtype=dtype) < 1 < time_infer(800, 800, 640_000, 32, dtype=dtype)
    assert 0 < break_even(256, 256, 16, kind='bsr 8x8', rounds=1) < 1 and 0 < break_even(64, 64, 2, pixels=(7, 7), rounds=1) < 1


# materialize

def test_materialize_of_masks_and_back(fast):
    m, x = net(1.), torch.randn(32, 600)
    DynamicSparse(.98, 'static', include='0').convert(m).attach(m)
    want = m.eval()(x)
    new = materialize(m, x, fmt='auto')
    assert type(new[0]) is FrozenCSR and not new.training and torch.allclose(new(x), want, atol=1e-5)
    back = materialize(new, x)
    assert [type(o) for o in back] == [nn.Linear, nn.ReLU, nn.Linear] and torch.allclose(back(x), want, atol=1e-5)
    again = load_recipe(Recipe.of(back), nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 10)))
    assert type(again[0]) is nn.Linear and [s['verb'] for s in Recipe.of(again)] == [s['verb'] for s in Recipe.of(back)]
    back.train()(x).sum().backward() # trains again
    assert back[0].weight.grad is not None


def test_auto_without_a_gain_says_so(fast):
    fast.update(csr=2., bsr=2.)
    m, x = net(), torch.randn(8, 600)
    with pytest.warns(UserWarning, match="fmt='auto'.*every layer stays dense. 0: csr is slower"): new = materialize(m, x, fmt='auto')
    assert type(new[0]) is nn.Linear and not Recipe.of(new)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fast.update(csr=.2)
        materialize(m, x, fmt='auto')


FRESH = '''
import sys, torch
from torch import nn
from paramfx.export.materialize import Recipe, load_recipe
file, io = sys.argv[1:]
torch.manual_seed(9)
m = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.Flatten(), nn.Linear(32*16, 64))
x, y = torch.load(io)
new = load_recipe(file, m)
assert [type(o).__name__ for o in new] == ['Conv2d', 'ReLU', 'FrozenCSR', 'Flatten', 'FrozenBSR'], new
assert torch.equal(new.eval()(x), y)
assert Recipe.of(new)[-1]['args'] == {'kinds': {'2': 'csr', '4': 'bsr 16x16'}}
'''


def test_recipe_in_a_fresh_process(tmp_path):
    seed_all()
    m, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.Flatten(), nn.Linear(32*16, 64)), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        m[2].weight.mul_(torch.rand_like(m[2].weight) < .1)
        m[4].load_state_dict(blocked(64, 512, dtype=torch.float32).state_dict())
    new = freeze_layers(m, {'2': 'csr', '4': 'bsr 16x16'})
    file = save_recipe(new, tmp_path/'new.pth')
    torch.save((x, new(x)), tmp_path/'io.pth')
    run_fresh(FRESH, file, tmp_path/'io.pth', check=True)
    other = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.Flatten(), nn.Linear(32*4, 64))
    with pytest.raises(ValueError, match='freeze.*does not fit.*2: Conv2d'): load_recipe(file, other)


# Learner

def learner(*layers, **kw):
    seed_all()
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), *layers, nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad(): m[1].weight.mul_(torch.rand_like(m[1].weight) < .05)
    return Learner(digits_dls(device='cpu'), m, loss_func=nn.CrossEntropyLoss(), **kw)


def test_learner_predicts_and_refuses_to_fit(fast, tmp_path):
    learn = learner(nn.BatchNorm1d(200), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        with torch.no_grad(): learn.model[1].weight.mul_(torch.rand_like(learn.model[1].weight) < .05)
        want, preds = learn.validate(), learn.get_preds()[0]
        assert learn.materialize(fmt='csr') is learn and frozen_layers(learn.model) == ['1']
        assert torch.allclose(torch.tensor(learn.validate()), torch.tensor(want), atol=1e-5) and torch.allclose(learn.get_preds()[0], preds, atol=1e-4)
        rows = {r['what']: r for r in learn.paramfx['materialize']}
        assert rows['1']['how'] == 'csr' and rows['1']['break_even'] == .25 and rows['1'][
            'time'] == .5 and rows['1']['density'] < .06 and rows['4']['how'] == 'dense: no zeros'
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        for fit in (lambda: learn.fit(1), lambda: learn.fit_one_cycle(1), lambda: learn.lr_find(show_plot=False)):
            with pytest.raises(ValueError, match=r'1: frozen for inference.*learn.materialize\(\)'): fit()
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
        learn.save('fast'); learn.load('fast')
        learn.materialize()
        assert not frozen_layers(learn.model) and torch.allclose(torch.tensor(learn.validate()), torch.tensor(want), atol=1e-5)
        learn.fit(1, 1e-3) # again an ordinary network
        assert sum(isinstance(c, InferenceOnly) for c in learn.cbs) == 1
        assert not torch.equal(learn.model[4].weight, before['4.weight'])


def test_learner_of_frozen_layers_only(fast, tmp_path):
    learn = learner(path=tmp_path)
    with torch.no_grad(): learn.model[3].weight.mul_(torch.rand(10, 200) < .5)
    with learn.no_bar(), learn.no_logging():
        want = learn.get_preds()[0]
        learn.materialize(fmt='csr')
        assert torch.allclose(learn.get_preds()[0], want, atol=1e-5)
        with pytest.raises(ValueError, match='1, 3: frozen for inference'): learn.fit(1)
        learn.save('all'); learn.load('all')
        learn.export('all.pkl')
        other = load_learner(tmp_path/'all.pkl')
        assert frozen_layers(other.model) == ['1', '3']
        other.dls = learn.dls
        with pytest.raises(ValueError, match='1, 3: frozen for inference'): other.fit(1)
        assert torch.allclose(learn.get_preds()[0], want, atol=1e-5)


def test_learner_that_gains_nothing(fast):
    fast.update(csr=2., bsr=2.)
    learn = learner()
    learn.materialize(fmt='auto')
    assert any('every layer stays dense' in r['how'] for r in learn.paramfx['materialize']) and not any(isinstance(c, InferenceOnly) for c in learn.cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
