"""Training steps and schedules of the original model slicing, against what `SliceTrain` does in fastai's own loop."""
import json
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, Learner, OptimWrapper
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

from contracts import quiet
from paramfx.slicing.rates import RATE_SCHEDULES
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.rates import rate_schedule
from paramfx.slicing.slice import Slicing


def small_flatten_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1, bias=False),
                         nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def fill(model, seed):
    "Weights by the recipe of the golden folder"
    for k, (n, p) in enumerate(model.named_parameters()):
        v = np.random.RandomState(seed*10000+k).standard_normal(tuple(p.shape))
        if p.ndim >= 2: v = v*np.sqrt(2/np.prod(p.shape[1:]))
        else: v = 1+.1*v if n.endswith('weight') else .1*v
        p.data = torch.tensor(v.astype(np.float32)).double()
    return model.double()


class Seen(Callback):
    "Loss of every pass, and the gradients of the first step"
    order, run_valid = 10.7, False
    def __init__(self): self.__dict__.update(losses=[], grads=None)
    def after_batch(self): self.losses.append(self.learn.loss.item())
    def before_step(self):
        if self.grads is None: self.__dict__['grads'] = {n: p.grad.clone() for n, p in self.learn.model.named_parameters()}


class Noted:
    "Cross-entropy that writes down what it gives"
    def __init__(self): self.seen = []
    def __call__(self, pred, y):
        loss = nn.functional.cross_entropy(pred, y)
        if torch.is_grad_enabled(): self.seen.append(loss.item())
        return loss


class Given:
    "The rates of each step, as the recorded run had them"
    def __init__(self, steps): self.steps = steps
    def at(self, step): return self.steps[step]


def golden_run(golden, path):
    d = json.loads((golden/'model_slicing'/'train_steps.json').read_text())
    z = np.load(golden/'model_slicing'/'train_steps.npz')
    s, steps = d['fill_seed'], [o for o in d['log'] if 'step' in o]
    x = [torch.tensor(np.random.RandomState(s+100+t).standard_normal((8, 3, 8, 8)).astype(np.float32)).double() for t in range(len(steps))]
    y = [torch.tensor(np.random.RandomState(s+200+t).randint(0, 10, 8)) for t in range(len(steps))]
    dl = DataLoader(list(zip(torch.cat(x), torch.cat(y))), bs=8, num_workers=0)
    sgd = partial(torch.optim.SGD, momentum=d['momentum'], weight_decay=d['weight_decay'], nesterov=d['nesterov'])
    loss = Noted()
    cb, seen = SliceTrain(d['rates'], distill=False, slicing=Slicing(groups=d['num_groups'], norm='gn')), Seen()
    learn = quiet(Learner(DataLoaders(dl, dl), fill(small_flatten_net(), s), loss, partial(OptimWrapper, opt=sgd), lr=d['lr'], path=path, cbs=[cb, seen]))
    cb.__dict__['_schedule'] = lambda rates: Given([[d['rates'][i] for i in o['rate_idx']] for o in steps])
    learn.remove_cb(learn.recorder)  # its mean of losses is of single precision only
    learn.fit(1)
    return d, z, steps, learn, loss, seen


def test_training_steps(golden, tmp_path):
    d, z, steps, learn, loss, seen = golden_run(golden, tmp_path)
    want = [l for o in steps for l in o['losses_in_pass_order']]
    assert np.allclose(loss.seen, want, rtol=0, atol=1e-9)
    first = d['log'][0]
    for n, g in seen.grads.items():
        if f'grad_step0.{n}' in z: assert np.allclose(g, z[f'grad_step0.{n}'], rtol=0, atol=1e-6), n
        assert abs(float(g.norm())-first['grad_l2_step0'][n]) < 1e-9, n
        assert int((g == 0).sum()) == first['n_exact_zero_step0'][n], n
    for n, p in learn.model.named_parameters(): assert np.allclose(p.detach(), z[f'final.{n}'], rtol=0, atol=1e-6), n
    logged = [o['losses_in_pass_order'][0] for o in steps]
    assert np.allclose(seen.losses, logged, rtol=0, atol=1e-9)  # the widest pass' loss is the one that is logged


@pytest.mark.parametrize('stub', ['after_backward', '_pass', 'before_batch', '_forward'])
def test_it_is_the_callback_that_is_tested(golden, tmp_path, monkeypatch, stub):
    "Without one of its parts the recorded run cannot be had"
    monkeypatch.setattr(SliceTrain, stub, lambda *args, **kwargs: None)
    with pytest.raises((AssertionError, TypeError, ValueError)): test_training_steps(golden, tmp_path)


def configs():
    from conftest import GOLDEN
    return json.loads((GOLDEN/'model_slicing'/'scheduler.json').read_text())


def ident(c): return f"{c['scheduler_type']}-{len(c['sr_list'])}-{c['sr_rand_num']}-{'p' if c['sr_prob'] else 'u'}"


@pytest.mark.parametrize('c', [c for c in configs() if 'original_raises' not in c], ids=ident)
def test_schedules(c):
    "What is in every step, how many passes, and how often the rest is drawn: within four standard deviations"
    rates, n = c['sr_list'], 4000
    it = rate_schedule(c['scheduler_type'], rates, c['sr_rand_num'], c['sr_prob'], seed=7)
    steps = [next(it) for _ in range(n)]
    for o in steps:
        assert o == sorted(set(o), reverse=True) and len(o) == c['passes_per_step'] and {rates[i] for i in c['forced_indices']} <= set(o) <= set(rates)
    for i, p in enumerate(c['exact_inclusion_probability_per_index']):
        share = sum(rates[i] in o for o in steps)/n
        assert abs(share-p) <= 4*(p*(1-p)/n)**.5, (rates[i], share, p)


OBVIOUS = {'random_min_max-4-1-p': [1., .75, .5, .25], 'random_min_max-2-1-u': [1., .5], 'static-4-1-u': [1., .75, .5, .25], 'random_min_max-1-0-u': [1.]}

@pytest.mark.parametrize('c', [c for c in configs() if 'original_raises' in c], ids=ident)
def test_where_the_original_raises(c):
    args = c['scheduler_type'], c['sr_list'], c['sr_rand_num'], c['sr_prob']
    if ident(c) in OBVIOUS:
        it = rate_schedule(*args)
        for _ in range(50):
            o = next(it)
            assert {o[0], o[-1]} == {max(c['sr_list']), min(c['sr_list'])} and set(o) <= set(OBVIOUS[ident(c)])
    else:
        with pytest.raises(ValueError) as e: rate_schedule(*args)
        assert 'draws from 4 rates' in str(e.value) or all(n in str(e.value) for n in RATE_SCHEDULES)
