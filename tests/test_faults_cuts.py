"What a cut is compared with: also behind weights that are zero, and in branches that run in training only"
import warnings

import pytest
import torch
from torch import nn

from nets import check_exact, fill, numbers
from paramfx.splitnet import branches as split_branches
from paramfx.channels.ids import TraceError
from paramfx.all import at_rate, branches, check_same, extract_slim, kels_masks, masked_model, materialize, slice_model, split_model, split_plan, trace_channels
from paramfx.evolution.masks import fit_cut
from paramfx.splitnet.split import Splitting
from paramfx.core.forward import zero_weights, training_mode


class Block(nn.Module):
    "A residual block whose end may begin at zero; `width`: its code divides by the number of its channels"
    def __init__(self, end, width):
        super().__init__()
        self.width, self.conv1, self.conv2 = width, nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm, self.gate = nn.BatchNorm2d(6), nn.Parameter(torch.ones(()))
        with torch.no_grad():
            if end == 'norm': self.norm.weight.zero_()
            if end == 'layer': [p.zero_() for p in self.conv2.parameters()]
            if end == 'gate': self.gate.zero_()

    def forward(self, x):
        h = torch.relu(self.conv1(x))
        return x+self.gate*self.norm(self.conv2(h/h.shape[1] if self.width else h))


def net(end, width, n=2):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 6, 3), *[Block(end, width) for _ in range(n)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    with torch.no_grad():
        for b in m.modules():
            if isinstance(b, nn.BatchNorm2d): b.running_mean.uniform_(-.5, .5)
    return m.double().eval()


ENDS = ['norm', 'layer', 'gate']
PICTURE = numbers(2, 3, 8, 8)


@pytest.mark.parametrize('end', ENDS)
@pytest.mark.parametrize('verb', ['extract_slim', 'materialize', 'slice', 'cut'])
def test_a_width_behind_zero_weights_is_found(verb, end):
    "As it is where the weights are not zero; the model stays as it was, zeros included"
    do = {'extract_slim': lambda m: extract_slim(m, PICTURE), 'materialize': lambda m: materialize(m, PICTURE, split_rate=.5),
          'slice': lambda m: slice_model(m, PICTURE, (1, .5)), 'cut': lambda m: trace_channels(m, PICTURE).cut(.5).apply(m)}[verb]
    for kind in (None, end):
        m = net(kind, True)
        old = {k: v.clone() for k, v in m.state_dict().items()}
        with pytest.raises(ValueError, match='holds a width as a number') as e: do(m)
        assert all(torch.equal(v, old[k]) for k, v in m.state_dict().items()) and old.keys() == m.state_dict().keys()
    assert zero_weights(m)[0] in str(e.value) and 'all zero now' in str(e.value)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        do(net(end, False))


@pytest.mark.parametrize('end', ENDS)
def test_the_small_network_keeps_its_zeros_and_trains_like_the_masked_one(end):
    "What is compared with random numbers is not what is handed out"
    m = net(end, False)
    cut = fit_cut(m, PICTURE, .5)
    small, twin = cut.apply(m), cut.masked(m)
    assert zero_weights(small) == zero_weights(m) and check_same(small, twin, PICTURE) < 1e-12
    with torch.no_grad():
        for n in zero_weights(m): m.get_parameter(n).add_(.7)  # as some steps later
    assert check_same(cut.apply(m), cut.masked(m), numbers(2, 3, 8, 8, seed=5)) < 1e-12


def test_a_sample_of_zeros_hides_nothing():
    m = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), Divides(), nn.Linear(8, 3, bias=False)).double()
    for x in (numbers(2, 5), torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match='holds a width'): extract_slim(m, x)


class Divides(nn.Module):
    def forward(self, x): return x/x.shape[-1]


class Gated(nn.Module):
    "A split layer behind a gate that begins at zero"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.gate = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.zeros(()))

    def forward(self, x): return self.fc(torch.sigmoid(self.gate*self.b(torch.relu(self.a(x)))))


def test_a_split_is_compared_behind_zeros(monkeypatch):
    "Were the layer behind the gate split wrongly, that would be found, in the split network and in its branches"
    m, x = fill(Gated()), numbers(2, 5)
    with torch.no_grad(): m.gate.zero_()
    kw = dict(splits={'b': 2, 'fc': 2}, classes={0: 0, 1: 0, 2: 1, 3: 1})
    new = split_model(m, x, **kw)
    branches(new)

    def spoilt(f, pick):
        def g(*args):
            res = f(*args)
            with torch.no_grad():
                for p in pick(res).get_submodule('b').parameters(): p.mul_(2)
            return res
        return g
    with monkeypatch.context() as mp:
        mp.setattr(split_branches, '_narrow', spoilt(split_branches._narrow, lambda res: res[0]))
        with pytest.raises(ValueError, match='its branches'): branches(new)
    monkeypatch.setattr(Splitting, 'split', spoilt(Splitting.split, lambda res: res))
    with pytest.raises(ValueError, match='networks differ'): split_model(m, x, **kw)


class Aux(nn.Module):
    "A classifier with a second head, which runs in training only"
    def __init__(self, aux):
        super().__init__()
        self.a, self.n, self.b, self.fc, self.aux = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4), aux

    def forward(self, x):
        h = torch.relu(self.n(self.a(x)))
        y = self.fc(torch.dropout(torch.relu(self.b(h)).mean((2, 3)), .5, self.training))
        return dict(y=y, aux=self.aux(h)) if self.training else y


def head(*more): return nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), *more, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(24, 3))
def aux_net(*more): return fill(Aux(head(*more)))


def train_outputs(m, x):
    with training_mode(m): return m(x)


def same_in_training(small, twin, x):
    "Right in practice, too: with the statistics of the batch, and with gradients"
    assert check_same(small, twin, x, mode=training_mode) < 1e-12 and check_same(small, twin, x) < 1e-12
    for m in (small, twin):
        m.train()
        for o in m.modules():
            if isinstance(o, nn.Dropout): o.eval()
    outs = []
    for m in (small, twin):
        torch.manual_seed(0)
        outs.append(m(x)['aux'])
        outs[-1].sum().backward()
    assert (outs[0]-outs[1]).abs().max() < 1e-12 and small.a.weight.grad.any()


def test_heads_of_training_are_cut_with_the_rest():
    m, x = aux_net(), numbers(2, 3, 8, 8)
    cmap = trace_channels(m, x)
    assert cmap.late == ['aux'] and not cmap.unseen and 'Run in training only: aux' in repr(cmap)
    assert set(cmap['a'].readers) == {'b', 'aux.0'} and cmap['aux.5'].is_output and cmap['aux.0'].cuttable
    check_exact(m, (x,), cmap)
    cut = fit_cut(m, x, .5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = cut.apply(m)
    assert small.aux[0].weight.shape == (3, 4, 1, 1) and small.aux[5].weight.shape == (3, 12)
    same_in_training(small, cut.masked(m), x)
    masks = kels_masks(m, x, .5)
    assert masks['aux.0.weight'].sum() == 3*4 and masks['aux.5.weight'].sum() == 3*12


def test_a_batch_of_one_is_enough():
    "A learner's sample has one item, and norms of the training branch see one number per channel"
    m = fill(Aux(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))))
    small = extract_slim(m, numbers(1, 3, 8, 8))
    assert small.train()(numbers(2, 3, 8, 8))['aux'].shape == (2, 3)


def test_slices_run_in_training():
    m, x = aux_net(), numbers(2, 3, 8, 8)
    slice_model(m, x, (1, .5))
    m.train()
    for r in (1, .5):
        with at_rate(m, r): y = m(x)
        (y['y'].sum()+y['aux'].sum()).backward()
        small = materialize(m, x, rate=r)
        with at_rate(m, r): whole = train_outputs(m, x)
        narrow = train_outputs(small, x)
        assert small.aux[0].in_channels == 8*r and all((whole[k]-narrow[k]).abs().max() < 1e-12 for k in whole)


def test_a_split_keeps_the_head():
    m, x = aux_net(), numbers(2, 3, 8, 8)
    kw = dict(splits={'b': 2, 'fc': 2}, classes={0: 0, 1: 0, 2: 1, 3: 1})
    small, twin = split_model(m, x, **kw), masked_model(m, x, **kw)
    assert check_same(small, twin, x, mode=training_mode) < 1e-12
    branches(small)
    with pytest.raises(ValueError, match='aux.0.*did not run'): split_plan(m, x, {'aux.0': 2, 'aux.5': 2})


def test_dead_filters_that_training_reads():
    "Channels with zeros for weights go only if no head of training reads them"
    m, x = aux_net(), numbers(2, 3, 8, 8)
    with torch.no_grad():
        for layer in (m.a, m.b):
            layer.weight[:3] = 0
            layer.bias[:3] = -1.
        m.n.weight[:3] = 0
        m.n.bias[:3] = -1.
    with pytest.warns(UserWarning, match='aux.0 reads them in training only'): new = materialize(m, x)
    assert new.a.out_channels == 8 and new.b.out_channels == 5
    same_in_training(new, m, x)
    with torch.no_grad(): m.aux[0].weight[:, :3] = 0
    new = materialize(m, x)
    assert new.a.out_channels == new.b.out_channels == 5 == new.aux[0].in_channels
    same_in_training(new, m, x)


class Strange(nn.Module):
    def forward(self, x): return torch.linalg.qr(x.flatten(2))[0].mean(2)


def test_heads_that_cannot_be_cut_are_refused_by_name():
    m, x = fill(Aux(nn.Sequential(Strange(), nn.Linear(8, 3)))), numbers(2, 3, 8, 8)
    for verb in (trace_channels, extract_slim, kels_masks, slice_model):
        with pytest.raises((TraceError, ValueError), match=r"aux.0 \(Strange\).*qr.*training mode.*pin=\['aux'\].*aux_logits=False"): verb(m, x)
    cmap = trace_channels(m, x, pin=['aux'])
    assert not cmap['a'].cuttable and 'pinned' in cmap['a'].why
    small = extract_slim(m, x, {'b': .5}, pin=['aux'])
    assert small.train()(x)['aux'].shape == (2, 3)
    m.aux = None
    m.forward = lambda x: m.fc(torch.relu(m.b(torch.relu(m.n(m.a(x))))).mean((2, 3)))
    assert trace_channels(m, x)['a'].cuttable


class Fixed(nn.Module):
    def forward(self, x): return x*x.shape[1]


def test_widths_in_a_head_are_found_by_the_check():
    m, x = aux_net(Fixed()), numbers(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"pin=\['aux'\]: these run in training only"): extract_slim(m, x)
    extract_slim(m, x, pin=['aux']).train()(x)


def test_a_sample_too_small_for_the_head_is_refused():
    m, x = fill(Aux(nn.Sequential(nn.Conv2d(8, 6, 9), nn.Flatten(1), nn.Linear(6*4*4, 3)))), numbers(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r'aux \(Sequential\): it runs in training only.*\[1, 3, 8, 8\].*Give a sample as in training'): extract_slim(m, x)
    assert extract_slim(m, numbers(1, 3, 14, 14)).train()(numbers(2, 3, 14, 14))['aux'].shape == (2, 3)


class Targets(nn.Module):
    "Wants targets in training, so a pass in training mode cannot be made; a layer is never used"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x, y=None):
        if self.training and y is None: raise ValueError('targets should not be None')
        return self.b(torch.relu(self.a(x)))


def test_what_cannot_run_in_training_is_cut_as_before():
    with pytest.warns(UserWarning, match='unused did not run'): assert extract_slim(fill(Targets()), numbers(2, 5)).a.out_features == 4


class Noisy(Aux):
    "Random numbers in training, of which a smaller network draws fewer"
    def forward(self, x):
        h = torch.relu(self.n(self.a(x)))
        if self.training: h = h+torch.randn_like(h)
        y = self.fc(torch.relu(self.b(h)).mean((2, 3)))
        return (y, self.aux(h)) if self.training else y


def test_random_numbers_are_no_difference():
    assert len(extract_slim(fill(Noisy(head())), numbers(2, 3, 8, 8)).train()(numbers(2, 3, 8, 8))) == 2


def test_parameters_used_in_training_only():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(2, 8))
        def forward(self, x):
            h = torch.relu(self.a(x))
            return (self.b(h), nn.functional.linear(h, self.w)) if self.training else self.b(h)
    m, x = fill(Raw()), numbers(2, 5)
    small = extract_slim(m, x)
    assert small.w.shape == (2, 4) and small.train()(x)[1].shape == (2, 2)


def google(name, size):
    tv = pytest.importorskip('torchvision').models
    torch.manual_seed(0)
    return getattr(tv, name)(weights=None, init_weights=False, num_classes=5).double(), numbers(1, 3, size, size)


@pytest.mark.parametrize('name, size, late', [('googlenet', 64, ['aux1', 'aux2']), pytest.param('inception_v3', 299, ['AuxLogits'], marks=pytest.mark.slow)])
def test_networks_of_torchvision_with_auxiliary_heads(name, size, late):
    m, x = google(name, size)
    cut = fit_cut(m, x, .5)
    assert cut.cmap.late == late and not cut.cmap.unseen
    small, twin = cut.apply(m, check=False), cut.masked(m)
    assert check_same(small, twin, x, mode=training_mode) < 1e-10 and check_same(small, twin, x) < 1e-10
    outs = small.train()(torch.cat([x, x]))
    assert len(outs) == len(late)+1 and all(o.shape == (2, 5) for o in outs)
    sum(o.sum() for o in outs).backward()
    assert all(p.grad is not None for p in small.parameters())
