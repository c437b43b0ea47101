"""Nothing is lost without a word: fits without a method's callback, cuts of what is not ready, names and evolutions that cannot work."""
import re
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import Learner, accuracy, set_seed
from fastai.callback.schedule import *  # noqa: F403  fit_one_cycle, fine_tune, lr_find
from torch import nn

from paramfx.all import (DynamicSparse, IterativePrune, KnowledgeEvolution, OrthoReg, SliceTrain, SplitNet, effects, slice_model,
                         tensor_dls)
from paramfx.core import sample_batch


def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def net(w=8): return nn.Sequential(conv(1, w), conv(w, w), conv(w, w, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 4))


def few_dls(n=96, valid=32):
    "Stripes along one of two axes, of one of two widths, and some noise"
    x, y = torch.randn(n+valid, 1, 8, 8, generator=torch.Generator().manual_seed(0))*.5, torch.arange(n+valid)%4
    wave = torch.sin(torch.arange(8)*1.5)*2
    for i, k in enumerate(y): x[i, 0] += (wave if k < 2 else wave.sign()*(torch.arange(8) % 4 < 2))[None if k%2 else slice(None), None if not k%2 else slice(None)]
    return tensor_dls(x[:n], y[:n], x[n:], y[n:], bs=32)


def learner(model=None, dls=None, **kw):
    set_seed(0)
    learn = Learner(few_dls() if dls is None else dls, net() if model is None else model, metrics=accuracy, **kw)
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    learn.logger = lambda *args: None
    return learn


def told(f, *args, **kw):
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(*args, **kw)
    return [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


# -- fits without a method's callback

def masks(name): return lambda learn: effects(learn.model)[name].holder.masks
def bases(learn): return sum(p.numel() for p in learn.model.parameters())
def share(learn): return learn.share_bases(shared_rank=4, groups={'all': ['1.0', '2.0']}, basis_norm=False)


# method -> (before the first fit, its callback, what must not change in an ordinary fit, who warns in it)
WITHOUT = {
    'DynamicSparse': (None, partial(DynamicSparse, .8), masks('dynamic_sparse'), None),
    'DynamicSparse, granet': (None, partial(DynamicSparse, .8, method='granet', span='total', epochs=9), masks('dynamic_sparse'), 'DynamicSparse'),
    'IterativePrune': (None, partial(IterativePrune, .8), masks('iterative_prune'), None),
    'IterativePrune, on its way': (None, partial(IterativePrune, .8, n_prunes=3, span='total', epochs=9), masks('iterative_prune'), 'IterativePrune'),
    'KnowledgeEvolution': (None, KnowledgeEvolution, lambda learn: effects(learn.model)['knowledge_evolution'].values['generation'], None),
    'tie': (lambda learn: learn.tie(.8), None, bases, None),
    'share_bases': (share, None, bases, None),
    'OrthoReg': (share, OrthoReg, bases, 'OrthoReg'),
    'SplitNet': (None, partial(SplitNet, {'2': 2, '5': 2}), lambda learn: learn.split_net.groups(), 'SplitNet'),
    'SliceTrain': (None, partial(SliceTrain, (1, .5)), lambda learn: None, 'SliceTrain'),
    'slice': (lambda learn: learn.slice(rates=(1, .5)), None, lambda learn: None, 'SliceTrain'),
}


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize('name', WITHOUT)
def test_an_ordinary_fit_keeps_the_method_or_tells_once(name):
    before, make, kept, who = WITHOUT[name]
    learn = learner()
    if before is not None: before(learn)
    if make is not None: learn.fit(1, cbs=make())
    old = kept(learn)
    first, second = told(learn.fit_one_cycle, 1), told(learn.fit, 1)
    assert same(kept(learn), old)
    assert second == [] and [w.split(':')[0] for w in first] == ([who] if who else [])
    if who is None: return
    again = re.search(r'cbs=([\w.]+\w(\(\))?)', first[0])[1]
    assert told(learn.fit, 1, cbs=eval(again, globals(), dict(learn=learn))) == []  # the remedy, as it is printed
    assert [w.split(':')[0] for w in told(learn.fit, 1)] == [who]  # lost once more, told once more


def test_a_fit_of_one_width_names_both_and_looking_says_nothing():
    learn = learner()
    learn.slice(rates=(1, .5, .25))
    assert told(learn.lr_find, num_it=3, show_plot=False) == told(learn.validate) == told(learn.fit, 0) == []
    seen = told(learn.fine_tune, 1)
    assert len(seen) == 1 and 'one width of the sliced model, 1,' in seen[0] and '0.5, 0.25' in seen[0] and 'SliceTrain()' in seen[0]
    assert told(learner(learn.model, cbs=SliceTrain()).fit, 1) == []


def test_slices_that_cannot_change_are_not_lost():
    model = net()
    slice_model(model[:3], torch.rand(1, 1, 8, 8), rates=(1, .5), exclude='2.0')
    for p in model[:3].parameters(): p.requires_grad_(False)
    assert told(learner(model, splitter=lambda m: [[*m[5].parameters()]]).fit, 1) == []
