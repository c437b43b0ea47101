"""Channel maps and cuts as a whole: what they say, what they refuse, and that they leave the network as it was."""
import pickle
import random
import re
import warnings
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Learner
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_body, create_head
from fastai.vision.models.unet import DynamicUnet
from fastai.vision.models.xresnet import xresnet18, xresnet34
from fastai.layers import SimpleSelfAttention
from torch import nn
from torch.nn.modules import module as hooks
from torchvision.models import resnet18

from contracts import build, footprint, quiet, same, snapshot
from nets import KEEPS, Net, check_exact, fill, found, keep, numbers, run
from paramfx.channels.trace import ChannelMap, trace_channels
from paramfx.core.samples import rng_state
from paramfx.channels.cuts import Cut
from paramfx.sparse.sparsify import sparsify

conv, lin = (lambda i, o, k=1, **kw: nn.Conv2d(i, o, k, **kw)), nn.Linear
X = numbers(2, 3, 6, 6)
GLOBAL_HOOKS = [n for n in vars(hooks) if n.startswith('_global_') and isinstance(getattr(hooks, n), dict)]


def tensors(model): return [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()) if torch.is_tensor(t)]


@contextmanager
def untouched(model, *xs):
    "Weights, buffers, flags, hooks, attributes, the sample and every random state are what they were, and nothing is tagged"
    left = lambda: {n: sorted(vars(m)) for n, m in model.named_modules()} if any('jit' in type(m).__module__
        or 'quantized' in type(m).__module__ for m in model.modules()) else footprint(model)
    look = lambda: ({k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)},
        [m.training for m in model.modules()], left(), [id(t) for t in model.parameters()], [t.requires_grad for t in model.parameters()],
                    [list(map(id, m._forward_hooks.values())) for m in model.modules()],
                    {n: len(getattr(hooks, n)) for n in GLOBAL_HOOKS}, rng_state(), [x.clone() for x in xs])
    classes, before = [type(m) for m in model.modules()], look()
    try: yield
    finally:
        after = look()
        assert classes == [type(m) for m in model.modules()]
        assert not same(list(before), list((*after[:-1], list(xs))))
        assert not [t for t in (*tensors(model), *xs) if hasattr(t, '_channel_ids')], 'a tag is left'


# -- the map

class Residual(nn.Module):
    "Two spaces that can be cut, one of them shared by two layers"
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.conv1, self.conv2, self.fc = conv(3, 8, 3), nn.BatchNorm2d(8), conv(8, 6, 3, padding=1), conv(6, 8, 3, padding=1), lin(8, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.fc((x+self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture
def model(): return fill(Residual())

@pytest.fixture
def cmap(model): return trace_channels(model, X)


def test_map_reads_as_a_table(cmap):
    assert found(cmap) == [('stem,conv2:8>conv1,fc', ''), ('conv1:6>conv2', '')]
    assert len(cmap) == 3 and [s.name for s in cmap.cuttable] == ['stem', 'conv1'] and [s.name for s in cmap] == ['stem', 'conv1', 'fc']
    for text in (repr(cmap), cmap._repr_markdown_()):
        assert '|space|size|producers|readers|' in text and '|stem|8|stem, conv2|conv1, fc||' in text and '2 of 3 spaces can be cut' in text
        assert 'they are the output of the model' in text


def test_spaces_are_found_by_name_position_and_producer(cmap):
    assert cmap['stem'] is cmap[0] is cmap[-3] is cmap['conv2'] is cmap[cmap[0]] is cmap[np.int64(0)]
    for key in ('conv9', 7, 1.5, None):
        with pytest.raises(ValueError, match='Choose one of: stem, conv1, fc'): cmap[key]


def test_coverage_counts_the_weights(model, cmap):
    "By hand: what stays when all units of a space are gone"
    n = lambda m: m.weight.numel()
    total = n(model.stem)+n(model.conv1)+n(model.conv2)+n(model.fc)
    assert cmap.coverage() == 1
    assert cmap.coverage(['conv1']) == (n(model.conv1)+n(model.conv2))/total
    assert cmap.coverage(['stem']) == 1 and cmap.coverage([]) == 0


def test_map_fits_models_of_the_same_shape_and_survives_a_pickle(model, cmap):
    again = pickle.loads(pickle.dumps(cmap))
    assert isinstance(again, ChannelMap) and repr(again) == repr(cmap)
    other = fill(Residual(), seed=5)
    cut = Cut(again, {'stem': [3, 1]})
    assert torch.equal(cut.apply(other).stem.weight, other.stem.weight[[3, 1]])
    assert repr(pickle.loads(pickle.dumps(cut))) == repr(cut) == 'Cut(stem: 2 of 8)'


def test_map_draws(cmap):
    import matplotlib.pyplot as plt
    assert cmap.plot() is not None
    plt.close('all')


def test_one_channel_of_a_big_network_is_followed_quickly():
    "The table of a network of two hundred layers takes no longer than its trace by orders of magnitude"
    from time import perf_counter
    net = nn.Sequential(*[l for _ in range(200) for l in (lin(8, 8), nn.BatchNorm1d(8))], lin(8, 2)).eval()
    start = perf_counter()
    big = trace_channels(net, torch.randn(2, 8))
    traced = perf_counter()-start
    repr(big); big.cut(.5).apply(net)
    assert len(big.cuttable) == 200 and perf_counter()-start < 20*traced+2


# -- ways to say what to keep

def test_rates_keep_prefixes_rounded_up(cmap):
    assert {n: k.tolist() for n, k in cmap.cut(.5).keep.items()} == {'stem': [0, 1, 2, 3], 'conv1': [0, 1, 2]}
    assert len(cmap.cut(.51).keep['conv1']) == 4 and len(cmap.cut(1e-9).keep['stem']) == 1 and len(cmap.cut(5/6).keep['conv1']) == 5
    assert list(cmap.cut(.5, only='conv1').keep) == list(cmap.cut(.5, exclude=['conv2']).keep) == ['conv1']


def test_rate_one_changes_nothing(model, cmap):
    small = cmap.cut(1).apply(model)
    assert not same(snapshot(small), snapshot(model)) and small is not model and small.stem.weight is not model.stem.weight


@pytest.mark.parametrize('idx', [[4, 2, 1], (4, 2, 1), np.array([4, 2, 1]), torch.tensor([4, 2, 1]), np.array([4, 2, 1], dtype=np.uint8)])
def test_ordered_units_in_any_type(model, cmap, idx):
    small = Cut(cmap, {'conv1': idx}).apply(model)
    assert torch.equal(small.conv1.weight, model.conv1.weight[[4, 2, 1]]) and torch.equal(small.conv2.weight, model.conv2.weight[:, [4, 2, 1]])
    assert torch.equal(small.conv1.bias, model.conv1.bias[[4, 2, 1]]) and torch.equal(small.stem.weight, model.stem.weight)


def test_masks_and_functions(model, cmap):
    mask = torch.tensor([True, False]*3)
    assert cmap.cut({'conv1': mask}).keep['conv1'].tolist() == [0, 2, 4]
    cut = cmap.cut(lambda s: range(s.size-1, 0, -2))
    assert {n: k.tolist() for n, k in cut.keep.items()} == {'stem': [7, 5, 3, 1], 'conv1': [5, 3, 1]}


def test_cuts_follow_each_other(model, cmap):
    "Twice half of the same units is a quarter of them"
    once = Cut(cmap, {'stem': [6, 1, 3, 0]}).apply(model)
    twice = Cut(trace_channels(once, X), {'stem': [2, 0]}).apply(once)
    assert not same(snapshot(twice), snapshot(Cut(cmap, {'stem': [3, 6]}).apply(model)))


def test_batch_statistics_in_training_mode(model, cmap):
    "Small = masked while batch norms use their batch, and the gradients of what stays are equal, too"
    cut = Cut(cmap, keep(cmap, 'shuffled'))
    a, b = cut.apply(model).train(), cut.masked(model).train()
    x = numbers(5, 3, 6, 6, seed=4)
    a(x).square().sum().backward(); b(x).square().sum().backward()
    torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=0)
    for (n, p), q in zip(a.named_parameters(), b.parameters()): torch.testing.assert_close(p.grad, cut.tensor(n, q.grad), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.bn.running_var, b.bn.running_var[cut.keep['stem']], rtol=1e-12, atol=0)


@pytest.mark.parametrize('size', [6, 7, 12, 31])
def test_other_sizes_than_that_of_the_sample(model, size):
    cmap = trace_channels(model, X[:1, :, :5, :4])
    cut = Cut(cmap, keep(cmap, 'shuffled'))
    x = numbers(3, 3, size, size+1)
    for a, b in zip(run(cut.apply(model), [x]), run(cut.masked(model), [x])): torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


WRONG = {
    'rate 0': (lambda c: c.cut(0), r'keep=0.*\(0, 1\]'),
    'rate above 1': (lambda c: c.cut(1.5), r'keep=1\.5.*\(0, 1\]'),
    'rate nan': (lambda c: c.cut(float('nan')), r'\(0, 1\]'),
    'unknown space': (lambda c: Cut(c, {'head': [0]}), 'head.*Choose one of: stem'),
    'unknown in only': (lambda c: c.cut(.5, only='head'), 'head.*Choose one of: stem'),
    'unknown in exclude': (lambda c: c.cut(.5, exclude='head'), 'head.*Choose one of: stem'),
    'named twice': (lambda c: Cut(c, {'stem': [0], 'conv2': [1]}), "stem: named twice, as 'conv2'"),
    'no units': (lambda c: Cut(c, {'stem': []}), 'stem.*0 to 7, at least one'),
    'unit twice': (lambda c: Cut(c, {'stem': [1, 1]}), 'stem.*distinct'),
    'unit too high': (lambda c: Cut(c, {'stem': [8]}), 'stem.*0 to 7'),
    'unit below 0': (lambda c: Cut(c, {'stem': [-1]}), 'stem.*0 to 7'),
    'fractions': (lambda c: Cut(c, {'stem': [.5]}), 'stem.*0 to 7'),
    'a number': (lambda c: Cut(c, {'stem': 3}), 'stem.*0 to 7'),
    'mask of another size': (lambda c: Cut(c, {'stem': [True]*7}), 'stem.*0 to 7'),
    'empty mask': (lambda c: Cut(c, {'stem': [False]*8}), 'stem.*at least one'),
    'output': (lambda c: Cut(c, {'fc': [0]}), 'fc.*must stay whole: they are the output'),
    'only the output': (lambda c: c.cut(.5, only='fc'), 'fc must stay whole: they are the output'),
    'whole': (lambda c: c.cut(.5, whole='skip'), "whole='skip'.*'raise'"),
    'all excluded': (lambda c: c.cut(.5, exclude=['stem', 'conv1']), 'Nothing to cut'),
}

@pytest.mark.parametrize('name', WRONG)
def test_wrong_cuts_are_refused(cmap, name):
    call, text = WRONG[name]
    with pytest.raises(ValueError, match='(?s)'+text): call(cmap)


def test_map_of_another_model_is_refused(model, cmap):
    wide = Residual()
    wide.conv1, wide.conv2 = conv(8, 7, 3, padding=1), conv(7, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r'conv1\.weight has shape \(7, 8, 3, 3\), \(6, 8, 3, 3\) when it was traced'): cmap.cut(.5).apply(wide)
    with pytest.raises(ValueError, match=r'stem\.weight: the model has no such tensor'): cmap.cut(.5).apply(nn.Sequential(conv(3, 8)))


# -- what cannot be followed or must stay whole: module, operator and remedy

def spectral(m): return nn.utils.spectral_norm(m)
def pruned(m):
    nn.utils.prune.l1_unstructured(m, 'weight', .5)
    return m

class Custom:
    def __init__(self, y): self.y = y

@torch.jit.script
def scripted(x): return x*torch.sigmoid(x)


def inner(f, **kw): return nn.Sequential(conv(3, 8), Net(f, kw), conv(8, 2))

# network and sample -> error, and what it has to name: module, operator or reason, remedy
UNTRACEABLE = {
    'unknown operator': (inner(lambda s, h: torch.fft.rfft2(h).abs().sum((2, 3), keepdim=True)*h),
    X, NotImplementedError, [r'^1 \(Net\)', "'fft_rfft2'", r"@channel_rule\('fft_rfft2'\)", r"pin=\['1'\]"]),
    'unknown operator in the model': (Net(lambda s, x: torch.fft.rfft2(s.a(x)).abs(), dict(a=conv(3, 8))),
    X, NotImplementedError, [r'the model itself \(Net\)', "'fft_rfft2'", 'module of its own']),
    'number taken out': (inner(lambda s, h: h*h[0, 0, 0, 0].item()), X, NotImplementedError, [r'^1 \(Net\)', "'item'", r"pin=\['1'\]"]),
    'list taken out': (inner(lambda s, h: h*h[0, 0, 0, :2].tolist()[0]), X, NotImplementedError, ["'tolist'", r"pin=\['1'\]"]),
    'array taken out': (inner(lambda s, h: h+torch.from_numpy(np.tanh(h.numpy()))), X, NotImplementedError, ["'numpy'", r"pin=\['1'\]"]),
    'float taken out': (inner(lambda s, h: h*float(h[0, 0, 0, 0])), X, NotImplementedError, ["'__float__'", r"pin=\['1'\]"]),
    'scripted function': (inner(lambda s, h: scripted(h)), X, NotImplementedError, [r'^1 \(Net\)', 'cannot be followed', 'scripted', r"pin=\['1'\]"]),
    'written into a tensor': (inner(lambda s, h: torch.add(h, 1, out=torch.empty(2, 8, 6, 6, dtype=h.dtype))),
    X, NotImplementedError, ["'add'", r'out=', r"pin=\['1'\]"]),
    'output in an object': (Net(lambda s, x: Custom(s.a(x)), dict(a=conv(3, 8))), X, NotImplementedError, ['^Net', 'Custom', 'Return tensors']),
    'scripted layer': (nn.Sequential(conv(3, 8), torch.jit.script(conv(8, 8)), conv(8, 2)), X, ValueError, ['^1 ', 'scripted', r"pin=\['1'\]"]),
    'traced layer': (nn.Sequential(conv(3, 8), torch.jit.trace(conv(8, 8), torch.randn(1, 8, 4, 4)),
    conv(8, 2)), X, ValueError, ['^1 ', 'scripted', r"pin=\['1'\]"]),
    'parametrized': (nn.Sequential(lin(3, 8), nn.utils.parametrizations.weight_norm(lin(8, 8)), lin(8, 2)),
    numbers(4, 3), ValueError, ['^1 ', 'weight is parametrized', 'remove_parametrizations', r"pin=\['1'\]"]),
    'orthogonal': (nn.Sequential(lin(3, 8), nn.utils.parametrizations.orthogonal(lin(8, 8)), lin(8, 2)),
    numbers(4, 3), ValueError, ['^1 ', 'parametrized', 'remove_parametrizations']),
    'spectral norm': (nn.Sequential(lin(3, 8), spectral(lin(8, 8)), lin(8, 2)), numbers(4, 3), ValueError,
    [r'^1 \(Linear\)', 'SpectralNorm', 'remove_spectral_norm', r"pin=\['1'\]"]),
    'pruned by torch': (nn.Sequential(lin(3, 8), pruned(lin(8, 8)), lin(8, 2)), numbers(4, 3), ValueError,
    [r'^1 \(Linear\)', 'torch.nn.utils.prune', 'prune.remove', r"pin=\['1'\]"]),
    'channels of the sample': (nn.Sequential(nn.Sequential(conv(3, 8)), conv(8, 2)), numbers(2, 4, 6, 6),
    ValueError, [r'^0\.0 \(Conv2d\)', r'\[2, 4, 6, 6\]', '4 channels']),
    'size of the sample': (nn.Sequential(conv(3, 8), nn.Flatten(), lin(8*36, 2)), numbers(2, 3, 5, 5),
    ValueError, [r'^2 \(Linear\)', r'\[2, 3, 5, 5\]', '200']),
    'type of the sample': (nn.Sequential(conv(3, 8)), X.float(), ValueError, [r'^0 \(Conv2d\)', 'float', 'double']),
    'no tensor': (nn.Sequential(conv(3, 8)), 'picture.png', ValueError, ["not 'picture.png'"]),
    'number of inputs': (nn.Sequential(conv(3, 8)), (X, X), ValueError, ['does not run', 'positional argument']),
    'no forward': (nn.Sequential(conv(3, 8), nn.ModuleList([conv(8, 8)])), X, ValueError, [r'1 \(ModuleList\)', 'forward']),
}

if hasattr(torch.ao, 'quantization'): # it is to leave torch
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        UNTRACEABLE['quantized'] = (torch.ao.quantization.quantize_dynamic(nn.Sequential(lin(3, 8), lin(8, 2)),
            {nn.Linear}), numbers(4, 3).float(), ValueError, [r'^0 \(Linear\)', 'quantized', 'before'])

@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', UNTRACEABLE)
def test_untraceable_networks_are_refused_and_left_alone(name, train):
    model, sample, kind, texts = UNTRACEABLE[name]
    if name != 'quantized': model = model.double()
    model.train(train)
    with untouched(model, *(x for x in (sample if isinstance(sample, tuple) else [sample]) if torch.is_tensor(x))):
        with pytest.raises(kind) as e: trace_channels(model, sample)
    for t in texts: assert re.search(t, str(e.value), re.S), f'{t}: {e.value}'


WHOLE = {
    'layer norm': (nn.Sequential(conv(3, 8), nn.LayerNorm([8, 6, 6]), conv(8, 2)), X, ['^0 must stay whole', r'1 \(LayerNorm\)', 'layer_norm']),
    'group norm over everything': (nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 2)), X, ['^0: |^Nothing', r'1 \(GroupNorm\)', 'over all channels']),
    'local response norm': (nn.Sequential(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 2)), X, ['^0 must', r'1 \(LocalResponseNorm\)', 'local_response_norm']),
    'attention': (Net(lambda s, x: s.o(s.m(*[s.a(x)]*3)[0]), dict(a=lin(3, 8), m=nn.MultiheadAttention(8, 2),
    o=lin(8, 2))), numbers(4, 5, 3), ['^a must', r'm \(MultiheadAttention\)', 'multi_head_attention_forward']),
    'attention by hand': (nn.Sequential(lin(3, 24),
    Net(lambda s, h: (lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(*h.view(4, 5, 3, 2, 4).permute(
    2, 0, 3, 1, 4)), {}), lin(4, 2)), numbers(4, 5, 3), ['^0 must', r'1 \(Net\)', 'matmul|takes channels apart|mixes']),
    'parameter per channel': (inner(lambda s, h: h*s.g, g=nn.Parameter(torch.ones(8, 1, 1))), X, ['^0 must', r'1 \(Net\)', 'raw parameter 1.g']),
    'computed weight': (nn.Sequential(conv(3, 8), Net(lambda s, h: F.conv2d(h, s.w/s.w.norm()),
    dict(w=nn.Parameter(torch.randn(8, 8, 1, 1)))), conv(8, 2)), X, ['^0 must', r'1 \(Net\)', 'computes its weight']),
    'recurrent': (Net(lambda s, x: s.o(s.m(s.a(x))[0]), dict(a=lin(3, 8), m=nn.LSTM(8, 6, proj_size=4),
    o=lin(4, 2))), numbers(4, 5, 3), ['^a must', r'm \(LSTM\)', 'proj_size']),
    'tied to an embedding': (get_language_model(AWD_LSTM, 30,
    {**awd_lstm_lm_config, 'emb_sz': 16, 'n_hid': 20}), torch.randint(0, 30, (2, 5)), [r'encoder', 'is an embedding']),
    'language model': (AWD_LSTM(30, 16, 20, 1), torch.randint(0, 30, (2, 5)), ['Nothing to cut']),
}

@pytest.mark.parametrize('name', WHOLE)
def test_what_must_stay_whole_is_named_when_it_is_cut(name):
    model, sample, texts = WHOLE[name]
    if sample.is_floating_point(): model = model.double()
    with untouched(model, sample):
        cmap = trace_channels(model, sample)
        with pytest.raises(ValueError) as e: cmap.cut(.5)
    for t in texts: assert re.search(t, str(e.value), re.S), f'{t}: {e.value}'


def test_lazy_layers_are_refused_and_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(8, 1), conv(8, 2))
    with pytest.raises(ValueError, match=r'^0 \(LazyConv2d\): it is lazy.*Run the model once'): trace_channels(model, X)
    assert type(model[0]) is nn.LazyConv2d and model[0].has_uninitialized_params() and not hooks._global_forward_hooks
    model.double()(X)
    trace_channels(model, X).cut(.5).apply(model)


def test_others_are_cut_beside_what_stays_whole():
    model = fill(nn.Sequential(conv(3, 8), nn.LayerNorm([8, 6, 6]), conv(8, 6), nn.ReLU(), conv(6, 2)))
    cmap = trace_channels(model, X)
    with pytest.raises(ValueError, match="0 must stay whole.*whole='keep'.*only="): cmap.cut(.5)
    assert list(cmap.cut(.5, whole='keep').keep) == list(cmap.cut(.5, only='2').keep) == ['2']
    check_exact(model, (X,), cmap)


# -- the network is left as it was

class Nervous(nn.Module):
    "Everything that a forward may do to its module: attributes, buffers, random numbers, statistics"
    def __init__(self, fails=False):
        super().__init__()
        self.a, self.bn, self.o, self.fails, self.seen, self.last = conv(3, 8), nn.BatchNorm2d(8, momentum=None), conv(8, 2), fails, 0, None
        self.register_buffer('count', torch.zeros((), dtype=torch.long))
        self.register_buffer('mean', torch.zeros(8))

    def forward(self, x):
        self.seen += 1
        self.count += 1
        h = F.relu(self.bn(self.a(x)))
        self.last = h
        self.mean.lerp_(h.mean((0, 2, 3)).to(self.mean), .1)
        h = h*(1+torch.rand(())*np.random.rand()*random.random())
        return self.o(torch.fft.fft2(h).abs() if self.fails else h)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('fails', [False, True])
def test_a_trace_leaves_no_trace(train, fails):
    model = nn.Sequential(Nervous(fails), nn.Sequential(conv(2, 4), nn.Dropout(), nn.BatchNorm2d(4))).double().train(train)
    model[0].bn.eval()
    model[1][0].weight.requires_grad_(False)
    model[1][0].weight.tag = 'mine'
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    model[1].register_forward_pre_hook(lambda *a: None)
    x = X.clone()
    with untouched(model, x):
        if fails:
            with pytest.raises(NotImplementedError, match=r'0 \(Nervous\).*fft'): trace_channels(model, x)
        else:
            cmap = trace_channels(model, x)
            assert calls
            small = Cut(cmap, {'1.0': [2, 0]} if cmap['1.0'].cuttable else {}).apply(model)
            assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
            assert not small[1][0].weight.requires_grad and small[1][0].weight.tag == 'mine'
            assert len(small[0]._forward_hooks) == len(small[1]._forward_pre_hooks) == 1
    assert model[0].seen == 0 and model[0].last is None


def test_frozen_parameters_and_their_attributes_go_along(model):
    model.stem.weight.requires_grad_(False)
    model.conv1.weight.lr_scale, model.fc.bias.lr_scale = 3, 4 # one that is cut, one that is not
    small = trace_channels(model, X).cut(.5).apply(model)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small.conv1.weight.lr_scale == 3 and small.fc.bias.lr_scale == 4 and all(isinstance(p, nn.Parameter) for p in small.parameters())


def test_parameters_handed_through_are_not_tagged():
    model = fill(Net(lambda s, x: (lambda h: s.o(h+s.p.type_as(h)+s.p.to(h)+s.b.copy_(h.mean((0, 2, 3), keepdim=True))))(s.a(x)),
                     dict(a=conv(3, 8), p=nn.Parameter(torch.ones(1, 8, 1, 1)), b=torch.zeros(1, 8, 1, 1), o=conv(8, 2))))
    with untouched(model): assert [found(trace_channels(model, X)) for _ in range(2)] == [[('a:8>o', cm)]
        for cm in ['the model itself (Net) combines them with the raw parameter p (add)']*2]


def test_the_sample_is_left_alone_even_by_a_network_that_writes_into_it():
    model = fill(nn.Sequential(nn.ReLU(inplace=True), conv(3, 8), nn.ReLU(inplace=True), conv(8, 2)))
    x = X.clone()
    with untouched(model, x):
        cut = trace_channels(model, x).cut(.5)
        cut.apply(model)
    x.zero_()
    cut.apply(model)
    assert cut.cmap.sample[0].any(), 'the map shares its sample with the caller'


def test_pinned_spectral_norm_is_not_advanced():
    for wrap in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        model = nn.Sequential(lin(3, 8), wrap(lin(8, 8)), lin(8, 6), lin(6, 2)).double().train()
        with untouched(model):
            cmap = trace_channels(model, numbers(4, 3), pin='1')
            assert found(cmap) == [('0:8>', '1 (ParametrizedLinear) is pinned'
                if 'parametrizations' in wrap.__module__ else '1 (Linear) is pinned'), ('2:6>3', '')] and not cmap.unseen
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                small = cmap.cut(.5, only='2').apply(model)
        assert small[2].weight.shape == (3, 8)


def test_effects_in_force_are_refused(model):
    cmap = trace_channels(model, X)
    sparsify(model, .5)
    with untouched(model):
        assert repr(trace_channels(model, X)) == repr(cmap)  # looking is allowed: policies that choose anew need it
        with pytest.raises(ValueError, match='dynamic_sparse.*materialize'): cmap.cut(.5).apply(model)


def test_what_did_not_run_is_named(model):
    model.extra, model.slopes = conv(8, 5), nn.PReLU(8)
    cmap = trace_channels(model, X)
    assert cmap.unseen == ['extra', 'slopes'] and 'extra, slopes' in repr(cmap)
    with pytest.warns(UserWarning, match='extra, slopes did not run'): cmap.cut(.5).apply(model)


# -- kinds of models and samples

def test_precisions_and_memory_formats(model):
    cmap = trace_channels(model, X)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        m = deepcopy(model).to(dtype)
        assert found(trace_channels(m, X.to(dtype))) == found(cmap)
        small = cmap.cut(.5).apply(m) # the map of the float64 model
        assert {p.dtype for p in small.parameters()} == {dtype}
    m = deepcopy(model).to(memory_format=torch.channels_last)
    small = trace_channels(m, X.to(memory_format=torch.channels_last)).cut(.5).apply(m)
    assert small.conv1.weight.is_contiguous(memory_format=torch.channels_last) and not small.conv1.weight.is_contiguous()


def test_tensor_subclasses(model):
    x = X.clone().as_subclass(TensorImage)
    cmap = trace_channels(model, x)
    assert type(x) is TensorImage and not hasattr(x, '_channel_ids') and found(cmap) == found(trace_channels(model, X))
    cmap.cut(.5).apply(model)


def test_wrapped_models(model):
    cmap = trace_channels(model, X)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert found(trace_channels(wrapped, X)) == found(cmap)
        assert type(cmap.cut(.5).apply(wrapped)) is Residual and type(cmap.cut(.5).masked(wrapped)) is Residual


@pytest.mark.parametrize('pin', ['1', ['1'], '1*', nn.Sequential, lambda m: m[1], lambda m: [m[1][0], m[1][1]]])
def test_pins(pin):
    model = fill(nn.Sequential(conv(3, 8), nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)), conv(8, 6), conv(6, 2)))
    p = pin(model) if callable(pin) and not isinstance(pin, type) else pin
    cmap = trace_channels(model, X, pin=p) if p is not nn.Sequential else None
    if cmap is None: # the class fits the model itself: everything stays whole
        assert not trace_channels(model, X, pin=p).cuttable
        return
    assert [s.name for s in cmap.cuttable] == ['2'] and 'is pinned' in cmap['0'].why
    check_exact(model, (X,), cmap)


class Odd(nn.Module):
    "A list of layers, a layer that is called by keyword, and one of which another method is called"
    def __init__(self):
        super().__init__()
        self.body, self.kw, self.other, self.o = nn.ModuleList([lin(3, 8), lin(8, 8)]), Keyword(), Other(), lin(8, 2)

    def forward(self, x):
        for l in self.body: x = F.relu(l(x))
        return self.o(self.other.features(self.kw(h=x)))

class Keyword(nn.Module):
    def __init__(self): super().__init__(); self.l = lin(8, 8)
    def forward(self, *, h): return F.relu(self.l(h))

class Other(nn.Module):
    def __init__(self): super().__init__(); self.l = lin(8, 8)
    def features(self, x): return F.relu(self.l(x))

@pytest.mark.parametrize('pin,left', [('body', ['kw.l', 'other.l']), ('kw', ['body.0', 'other.l']),
    ('other', ['body.0', 'body.1']), (None, ['body.0', 'body.1', 'kw.l', 'other.l'])])
def test_pinned_modules_that_are_never_called_themselves(pin, left):
    model = fill(Odd())
    cmap = trace_channels(model, numbers(4, 3), pin=pin)
    assert [s.name for s in cmap.cuttable] == left
    check_exact(model, (numbers(4, 3),), cmap)


def test_unknown_pins_are_refused(model):
    for p in ('nope', 'stem.*', nn.LSTM, ''):
        with pytest.raises(ValueError, match='no module is called.*stem'): trace_channels(model, X, pin=p)


FASTAI = {
    'xresnet18': (lambda: xresnet18(n_out=4), (2, 3, 32, 32), None, 14),
    'xresnet34': (lambda: xresnet34(n_out=4), (2, 3, 32, 32), None, 22),
    'xresnet18 with attention': (lambda: xresnet18(n_out=4, sa=True), (2, 3, 32, 32), SimpleSelfAttention, 13),
    'body and head': (lambda: nn.Sequential(create_body(resnet18(weights=None), pretrained=False, cut=-2), create_head(512, 5)), (2, 3, 32, 32), None, 13),
    'unet': (lambda: DynamicUnet(create_body(resnet18(weights=None), pretrained=False, cut=-2), 2, (32, 32)), (1, 3, 32, 32), None, 28),
}

@pytest.mark.few(2)
@pytest.mark.parametrize('name', FASTAI)
def test_fastai_networks(name):
    make, size, pin, n = FASTAI[name]
    model, x = make(), numbers(*size)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.weight.uniform_(.5, 1.5); m.running_var.uniform_(.5, 1.5) # fastai starts some at zero
    model.double().eval()
    cmap = trace_channels(model, x, pin)
    assert len(cmap.cuttable) == n
    check_exact(model, (x,), cmap, kinds=['prefix', 'shuffled'])


def test_attention_of_xresnet_asks_for_a_pin():
    with pytest.raises(ValueError, match=r"SpectralNorm.*remove_spectral_norm.*pin=\['"):
        trace_channels(xresnet18(n_out=4, sa=True), numbers(2, 3, 32, 32).float())


def test_unet_after_a_training_step():
    "Its hooks hold activations with a history, which `deepcopy` refuses"
    model = FASTAI['unet'][0]().double()
    cmap = trace_channels(model, numbers(1, 3, 32, 32))
    model.train()(numbers(2, 3, 32, 32)).sum().backward()
    assert cmap.cut(.5, whole='keep').apply(model).training


def test_tabular_embeddings_stay():
    model = fill(TabularModel([(5, 3), (7, 4)], 6, 2, [20, 10]))
    xs = (torch.tensor([[0, 1], [2, 3], [4, 6], [1, 1]]), numbers(4, 6))
    cmap = trace_channels(model, xs)
    assert [s.size for s in cmap.cuttable] == [20, 10] and not any('embeds' in p for s in cmap for p in s.producers)
    check_exact(model, xs, cmap)


# -- random networks

class Random(nn.Module):
    "A program of layers and operators, drawn at random, which also says on its own which channels belong together"
    def __init__(self, seed):
        super().__init__()
        self.rng, self.steps, self.parent, self.layers = np.random.default_rng(seed), [], [], nn.ModuleDict()
        self.nodes, self.rows = [['raw']*4], {} # the channels of each activation; the rows of each layer
        while len(self.steps) < 12:
            getattr(self, self.rng.choice(['conv', 'conv', 'norm', 'add', 'gate', 'cat', 'depthwise', 'grouped', 'pool', 'glu', 'again', 'group_norm']))()
        self.conv() # one space is free, whatever was joined before
        self.steps.append(('cat', [i for i in range(1, len(self.nodes)) if not any(i in s[1] for s in self.steps)], None))
        self.nodes.append([c for i in self.steps[-1][1] for c in self.nodes[i]])
        self.head = lin(4*len(self.nodes[-1]), 3)

    def fresh(self, n):
        self.parent += range(len(self.parent), len(self.parent)+n)
        return list(range(len(self.parent)-n, len(self.parent)))

    def root(self, c):
        while c != 'raw' and self.parent[c] != c: c = self.parent[c]
        return c

    def join(self, a, b):
        for x, y in zip(a, b): self.parent[self.root(x)] = self.root(y)

    def pick(self, fits=lambda ch: True):
        ok = [i for i, ch in enumerate(self.nodes) if i and 'raw' not in ch and fits(ch)]
        return int(self.rng.choice(ok)) if ok else None

    def put(self, op, ins, channels, layer=None, rows=None):
        name = f'l{len(self.steps)}'
        if layer is not None: self.layers[name] = layer
        if rows is not None: self.rows[name] = rows
        self.steps.append((op, ins, name if layer is not None else None))
        self.nodes.append(channels)

    def conv(self):
        i, n = int(self.rng.integers(len(self.nodes))), int(self.rng.choice([4, 6, 8]))
        ch = self.fresh(n)
        self.put('layer', [i], ch, nn.Conv2d(len(self.nodes[i]), n, int(self.rng.choice([1, 3])), padding='same', bias=bool(self.rng.integers(2))), ch)

    def again(self):
        "A layer once more, on another activation of its width"
        pool = [(n, i, j) for op, (i, *_), n in self.steps if op == 'layer' and n in self.rows and 'raw' not in self.nodes[i]
                for j in range(1, len(self.nodes)) if len(self.nodes[j]) == len(self.nodes[i]) and 'raw' not in self.nodes[j]]
        if not pool: return
        name, i, j = pool[int(self.rng.integers(len(pool)))]
        self.join(self.nodes[i], self.nodes[j])
        self.steps.append(('layer', [j], name)); self.nodes.append(self.rows[name])

    def norm(self):
        if (i := self.pick()) is not None: self.put('layer', [i], self.nodes[i], nn.BatchNorm2d(len(self.nodes[i]), affine=bool(self.rng.integers(2))))

    def group_norm(self):
        if (i := self.pick(lambda ch: len(ch)%2 == 0)) is None: return
        ch, g = self.nodes[i], len(self.nodes[i])//2
        for k in range(g): self.join(ch[2*k:2*k+1], ch[2*k+1:2*k+2])
        self.put('layer', [i], ch, nn.GroupNorm(g, len(ch)))

    def pool(self):
        if (i := self.pick()) is not None: self.put('pool', [i], self.nodes[i])

    def add(self, op='add'):
        if (i := self.pick()) is None or (j := self.pick(lambda ch: len(ch) == len(self.nodes[i]))) is None: return
        self.join(self.nodes[i], self.nodes[j])
        self.put(op, [i, j], self.nodes[i])

    def gate(self): self.add('mul')

    def cat(self):
        ins = [int(self.rng.integers(len(self.nodes))) for _ in range(2)]
        if sum(len(self.nodes[i]) for i in ins) < 25: self.put('cat', ins, [c for i in ins for c in self.nodes[i]])

    def depthwise(self):
        if (i := self.pick()) is not None:
            n = len(self.nodes[i])
            if n > 1: self.put('layer', [i], self.nodes[i], nn.Conv2d(n, n, 3, padding=1, groups=n))

    def grouped(self):
        if (i := self.pick(lambda ch: len(ch)%2 == 0 and len(ch) > 2)) is None: return
        ch, g = self.nodes[i], len(self.nodes[i])//2
        out = self.fresh(3*g)
        for k in range(g): self.join([ch[2*k+1], *out[3*k:3*k+3]], [ch[2*k]]*4)
        self.put('layer', [i], out, nn.Conv2d(len(ch), 3*g, 1, groups=g), out)

    def glu(self):
        if (i := self.pick(lambda ch: len(ch)%2 == 0)) is None: return
        half = len(self.nodes[i])//2
        self.join(self.nodes[i][:half], self.nodes[i][half:])
        self.put('glu', [i], self.nodes[i][:half])

    def forward(self, x):
        ops = dict(add=lambda a, b: a+b, mul=lambda a, b: a*b.sigmoid(), cat=lambda *t: torch.cat(t, 1),
            pool=lambda a: F.avg_pool2d(F.relu(a), 3, 1, 1), glu=lambda a: F.glu(a, 1))
        xs = [x]
        for op, ins, name in self.steps: xs.append((self.layers[name] if name else ops[op])(*(xs[i] for i in ins)))
        return self.head(F.adaptive_max_pool2d(xs[-1], 2).flatten(1))

    def sizes(self, live):
        "Shape of each parameter where only the channels `live` are left"
        n = lambda ch: sum(c == 'raw' or self.root(c) in live for c in ch)
        res = {'head.weight': (3, 4*n(self.nodes[-1])), 'head.bias': (3,)}
        for k, (op, ins, name) in enumerate(self.steps):
            if name is None: continue
            m, i, o = self.layers[name], n(self.nodes[ins[0]]), n(self.nodes[k+1])
            for t, p in m.named_parameters():
                if isinstance(m, nn.Conv2d) and t == 'weight': res[f'layers.{name}.{t}'] = (o, i if m.groups == 1 else m.weight.shape[1], *m.kernel_size)
                else: res[f'layers.{name}.{t}'] = (o,)
        return res


@pytest.mark.parametrize('seed', range(40))
def test_random_networks(seed):
    model = fill(Random(seed), seed)
    x = numbers(2, 4, 4, 4)
    cmap = trace_channels(model, x)
    # the same partition: units and channels that the program has joined, one to one
    pairs = {(int(u), model.root(c)) for name, rows in model.rows.items() for u, c in zip(cmap.bindings[f'layers.{name}', 'weight', 0][1], rows)}
    assert len(pairs) == len({u for u, _ in pairs}) == len({c for _, c in pairs}) == sum(s.size for s in cmap)-3
    assert {u for s, u in zip(cmap, cmap.units) if not s.why for u in u.tolist()} <= {u for u, _ in pairs}
    rng = np.random.default_rng(seed)
    for kind in KEEPS:
        cut = Cut(cmap, {s.name: KEEPS[kind](s.size, int(rng.integers(1, s.size)), rng) for s in cmap.cuttable})
        small = cut.apply(model, check=False)
        assert {k: tuple(p.shape) for k, p in small.named_parameters()} == model.sizes({c for u, c in pairs if cut.live[u]})
        (a,), (b,) = run(small, [x]), run(cut.masked(model), [x])
        assert (a-b).abs().max() <= 1e-12*b.abs().max(), kind
    assert cmap.cuttable and (run(model, [x])[0]-b).abs().max() > 1e-9


def test_learners_go_on_with_the_small_network(tmp_path):
    "A cut network trains, in place of the big one"
    learn = build(tmp_path)
    cmap = trace_channels(learn.model, learn.dls.one_batch()[:1])
    small = Learner(learn.dls, cmap.cut(.5).apply(learn.model), loss_func=learn.loss_func, path=tmp_path)
    quiet(small).fit(1)
    assert small.model[1][2].weight.shape[1]*2 == learn.model[1][2].weight.shape[1]


def test_units_stand_in_the_order_that_was_asked_for():
    "Equal outputs do not show it: rows, norms, columns and flattened blocks must all follow"
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*9, 2)).double()
    small = Cut(trace_channels(model, torch.randn(2, 3, 3, 3).double()), {'0': [3, 0, 2]}).apply(model)
    assert torch.equal(small[0].weight, model[0].weight[[3, 0, 2]]) and torch.equal(small[1].weight, model[1].weight[[3, 0, 2]])
    blocks = model[3].weight.view(2, 4, 9)[:, [3, 0, 2]]
    assert torch.equal(small[3].weight, blocks.reshape(2, 27))
