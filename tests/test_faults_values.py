"A validation set without items, networks without values (meta device), and complex weights: they work, or the layer is named before anything changes"
import re
from copy import deepcopy

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from torch import nn

from paramfx.all import (
    DynamicSparse, IterativePrune, KnowledgeEvolution, SliceTrain, SplitNet, check_same, cost, cut_dead, materialize,
    save_recipe, save_sparse, share_bases, slice_model, sparsify, split_model, tensor_dls, tie_weights,
    trace_channels)
from paramfx.sparse.sparsify import plan_masks
from paramfx.kernels.timing import sparse_infer
from paramfx.sparse.methods import SET
from paramfx.sparse.penalties import GroupLasso

X, Y = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def convs(device=None):
    kw = dict(device=device)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, **kw), nn.BatchNorm2d(8, **kw), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, **kw), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, **kw), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, **kw))


def learner(model=None, n_valid=8, **kw):
    return Learner(tensor_dls(X, Y, X[:n_valid], Y[:n_valid], bs=8, device='cpu'), model or convs(), loss_func=CrossEntropyLossFlat(), **kw)


def fit(learn, *cbs, n=2):
    with learn.no_logging(), learn.no_bar(): learn.fit(n, cbs=list(cbs))
    return learn


# -- loaders

@pytest.mark.parametrize('normalize', (True, False, (.5, 2.)))
@pytest.mark.parametrize('x', (X, (X*40).clamp(0, 255).byte()))
def test_a_validation_set_may_be_empty(x, normalize):
    if normalize == (.5, 2.): normalize = tuple(torch.full((3,), v) for v in normalize)
    dls = tensor_dls(x, Y, x[:0], Y[:0], bs=8, device='cpu', normalize=normalize)
    full = tensor_dls(x, Y, x[:4], Y[:4], bs=8, device='cpu', normalize=normalize)
    assert list(dls.vocab) == list(full.vocab) == [0, 1, 2, 3] and (len(dls.train), len(dls.valid)) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(dls.train.dataset[torch.arange(16)], full.train.dataset[torch.arange(16)]))
    assert list(tensor_dls(X, Y.clamp(max=2), X, Y, bs=8, device='cpu').vocab) == [0, 1, 2, 3]  # of both
    with pytest.raises(ValueError, match='no training item'): tensor_dls(x[:0], Y[:0], x, Y, bs=8, device='cpu')


@pytest.mark.parametrize('make', (lambda: DynamicSparse(.5, method='set', period=1), lambda: IterativePrune(.5),
    lambda: SliceTrain(), lambda: SplitNet({'9': 2}), lambda: KnowledgeEvolution()))
def test_methods_train_without_a_validation_set(make):
    learn = fit(learner(n_valid=0, metrics=accuracy), make())
    assert all(v[1] is None for v in learn.recorder.values) and learn.recorder.values[-1][0] is not None
    learn.materialize()


# -- no values

META = dict(sparsify=lambda m, x, f: sparsify(m, .5),
    magnitude=lambda m, x, f: sparsify(m, .5, init_mask='magnitude'), trace=lambda m, x, f: trace_channels(m, x), slice=lambda m, x, f: slice_model(m,
        x),
            split=lambda m, x, f: split_model(m, x, splits=[2], classes='random'),
            materialize=lambda m, x, f: materialize(m, x), infer=lambda m, x, f: sparse_infer(m, x), dead=lambda m, x, f: cut_dead(m, x),
            same=lambda m, x, f: check_same(m, m, x),
            save_sparse=lambda m, x, f: save_sparse(m, f/'a.safetensors'), save_recipe=lambda m, x, f: save_recipe(m, f/'a.pth'))
ON_LEARNER = dict(sparsify=lambda l: l.sparsify(.5), prune=lambda l: l.prune(.5), current=lambda l: l.prune(
    .5, init_mask='current'), slice=lambda l: l.slice(), evolve=lambda l: l.evolve(2, 1), wels=lambda l: l.evolve(2, 1, policy='wels'),
                  materialize=lambda l: l.materialize(), split=lambda l: l.split(splits=[2], classes='random'),
                  ke=lambda l: l.add_cb(KnowledgeEvolution('wels')), train=lambda l: l.add_cbs([SliceTrain()]),
                  net=lambda l: l.add_cb(SplitNet({'9': 2})))


@pytest.mark.parametrize('verb', META)
@pytest.mark.parametrize('whole', (True, False))
def test_a_network_without_values_is_named(verb, whole, tmp_path):
    model = convs('meta' if whole else None)
    if not whole: model[3] = nn.Conv2d(8, 8, 3, padding=1, device='meta')
    keys, vs = [*model.state_dict()], {n: [*vars(m)] for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"^{0 if whole else 3}.weight: it is on the meta device .*`model.to_empty\\(device='cpu'\\)`") as e:
        META[verb](model, X[:2], tmp_path)
    assert keys == [*model.state_dict()] and vs == {n: [*vars(m)] for n, m in model.named_modules()} and not [*tmp_path.iterdir()]
    exec(re.findall('`(.*?)`', str(e.value))[0], {'model': model})  # the remedy
    model.load_state_dict(convs().state_dict())
    META[verb](model, X[:2], tmp_path)


@pytest.mark.parametrize('verb', ON_LEARNER)
def test_a_learner_without_values_is_told_so(verb):
    learn = learner(convs('meta'))
    keys, cbs = [*learn.model.state_dict()], [type(c) for c in learn.cbs]
    with pytest.raises(ValueError, match=r"^0.weight: it is on the meta device .*`learn.model.to_empty"): ON_LEARNER[verb](learn)
    assert keys == [*learn.model.state_dict()] and cbs == [type(c) for c in learn.cbs]


def test_what_needs_no_values_does_without():
    "Plans and costs count; a network may be tied before it has values"
    a, b = convs('meta'), convs()
    assert [*plan_masks(a, .5)] == [*plan_masks(b, .5)]
    counted = [{k: v for k, v in cost(m, x).to_dict().items() if 'macs' in k or k == 'params'} for m, x in ((a, X[:2].to('meta')), (b, X[:2]))]
    assert counted[0] == counted[1] and len(counted[0]) > 1
    for m in (a, b): tie_weights(m, .5)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


# -- complex weights

class Parts(nn.Module):
    def forward(self, x): return torch.complex(x.real.relu(), x.imag.relu())


class To(nn.Module):
    def forward(self, x): return x.to(torch.complex64)


class Size(nn.Module):
    def forward(self, x): return x.abs()


def spectral(last=True):
    kw = dict(dtype=torch.complex64)
    return nn.Sequential(To(), nn.Conv2d(3, 8, 3, padding=1, **kw), Parts(),
        nn.Conv2d(8, 8, 3, padding=1, **kw), *([Size()] if last else []), nn.Flatten(), *([nn.Linear(512, 4)] if last else []))


@pytest.mark.parametrize('kw', (dict(method='deepr'), dict(method=SET(two_ended=True))))
def test_complex_weights_have_no_sign(kw):
    learn = learner(spectral())
    keys = [*learn.model.state_dict()]
    with pytest.raises(ValueError, match=r"^1\.weight: .* goes by the signs of weights, and these are complex.*exclude='1'"):
        learn.add_cb(DynamicSparse(.5, include='*', **kw))
    assert keys == [*learn.model.state_dict()]
    fit(learner(spectral()), DynamicSparse(.5, include='*', exclude=['1', '3'], **{'period': 1, **kw}))


@pytest.mark.parametrize('make',
    (lambda: DynamicSparse(.5, method='set', regularizer=GroupLasso(1e-4), period=1, include='*'), lambda: DynamicSparse(.5, method='rigl', period=1,
    include='*'), lambda: IterativePrune(.5, include='*')))
def test_masks_of_complex_weights(make):
    learn = fit(learner(spectral(), cbs=(cb := make())))
    for n, m in cb.masks.items():
        w = learn.model.get_parameter(n)
        assert not w[~m].any() and w[m].any()
    y = learn.model.eval()(X)
    assert torch.allclose(learn.materialize().model.eval()(X), y, atol=1e-5)


@pytest.mark.parametrize('policy', ('wels', 'llf', 'head', 'magnitude', 'snip'))
def test_generations_of_complex_weights(policy):
    learn = learner(spectral(), cbs=KnowledgeEvolution(policy))
    fit(fit(learn, n=1), n=1)
    assert learn.knowledge_evolution.effect.values['generation'] == 1


def test_complex_convolutions_share_no_basis():
    model = spectral()
    with pytest.raises(ValueError, match=r'1, 3 \(its weight is complex'): share_bases(model, X[:2])
    with pytest.raises(ValueError, match=r'1: its weight is complex.*Leave it out'): share_bases(model, X[:2], groups={'a': ['1', '3']})


def test_complex_outputs_are_compared_as_a_whole():
    "The imaginary part used to be left out"
    a = spectral(last=False)
    b = deepcopy(a)
    assert check_same(a, b, X[:2]) == 0
    with torch.no_grad(): b[3].weight[0].mul_(-1j), b[3].bias[0].mul_(-1j)
    with pytest.raises(ValueError, match='networks differ'): check_same(a, b, X[:2])

    class Imaginary(nn.Module):
        def __init__(self, net, f): super().__init__(); self.net, self.f = net, f
        def forward(self, x):
            y = self.net(x)
            return torch.complex(y.real, y.imag*self.f)
    with pytest.raises(ValueError, match='networks differ'): check_same(Imaginary(a, 1.), Imaginary(a, 2.), X[:2])
