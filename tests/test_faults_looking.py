"Looking at a model leaves it as it was: models that do something in their first pass, against all verbs that look"
import random
import warnings
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner
from torch import nn

from paramfx.all import (
    DynamicSparse, KnowledgeEvolution, OrthoReg, SliceTrain, Snip, SplitNet, cost, extract_slim, kels_masks,
    masked_model, materialize, share_bases, slice_model, split_model, split_plan, tensor_dls, tie_weights,
    trace_channels)
from paramfx.core.forward import copy_model
from paramfx.report.cost import layer_macs
from paramfx.slicing.slice import plan_slices
from paramfx.core.samples import rng_state
from paramfx.kernels.timing import sparse_infer
from paramfx.core.forward import failing_module, still

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    "What all of the awkward models below can be asked to do: three convolutions and a classifier"
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.c, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x): return self.fc(torch.relu(self.c(torch.relu(self.b(torch.relu(self.n(self.a(x))))))).mean((2, 3)))


class HooksOnce(Body):
    "Hangs hooks onto its layers in the first pass, as transformers does, and sums what they collect"
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if not hasattr(self, 'ready'):
            self.fc.register_forward_hook(lambda m, i, o: self.seen.append(o))
            self.a.register_forward_pre_hook(lambda m, i: None)
            self.ready = True
        self.seen.clear()
        super().forward(x)
        return sum(self.seen)


class Collections(Body):
    "Counts and remembers in all kinds of containers; each pass gives something else"
    table = {}  # of the class

    def __init__(self):
        super().__init__()
        self.rows, self.last, self.sizes, self.log = [], deque(maxlen=2), set(), bytearray()
        self.state, self.nested = SimpleNamespace(calls=0, kept={}), dict(deep=[[0.]])
        self.counts, self.plain = np.zeros(2), torch.zeros(3)
        self.dice, self.noise, self.gen = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)

    def forward(self, x):
        y = super().forward(x)
        self.rows.append(1)
        self.last.append(len(self.rows))
        self.sizes.add(len(self.rows))
        self.log += b'x'
        self.state.calls += 1
        self.state.kept[self.state.calls] = y.detach()
        self.nested['deep'][0][0] += 1.
        self.counts += 1
        self.plain += 1
        type(self).table[self.state.calls] = 1
        luck = self.dice.random()+self.noise.random()+torch.rand((), generator=self.gen).item()
        total = len(self.rows)+sum(self.last)+len(self.sizes)+len(self.log)+self.state.calls+self.nested['deep'][0][0]
        return y*(1+luck+total+float(self.counts.sum())+self.plain.sum().item())


class Grows(Body):
    "Makes a layer and a buffer in its first pass"
    def forward(self, x):
        y = super().forward(x)
        if not hasattr(self, 'extra'):
            self.fc.extra = self.extra = nn.Linear(4, 4)
            self.register_buffer('scale', torch.full((), 2.))
        return self.extra(y)*self.scale


class ActNorm(Body):
    "Values that come of the first batch, written past the version counter"
    def __init__(self):
        super().__init__()
        self.shift, self.start = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer('begun', torch.tensor(0))

    def forward(self, x):
        y = super().forward(x)
        if not self.begun:
            self.shift.data.copy_(-y.detach().mean(0))
            with torch.no_grad(): self.start.copy_(y.detach()[0])
            self.begun.data.fill_(1)
        return y+self.shift+self.start


class Renorm(Body):
    "Norms are enforced in each pass: by another tensor, in place, and by torch itself"
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(4, 4, max_norm=.01)

    def forward(self, x):
        self.b.weight.data = torch.renorm(self.b.weight.data*1.1, 2, 0, 1.)
        with torch.no_grad(): self.a.weight.mul_(.9)
        return super().forward(x)+self.emb(torch.arange(len(x)) % 2)


class Merged(nn.Linear):
    "As in LoRA: evaluation mode merges, training mode takes apart"
    merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += .1 if not mode else -.1
            self.merged = not mode
        return super().train(mode)


class WithLora(Body):
    def __init__(self):
        super().__init__()
        self.fc = Merged(8, 4)

    def forward(self, x): return super().forward(x)*(1 if self.fc.merged else 2)


class GradHooks(Body):
    "A hook on a weight, and a flag, from the first pass on"
    def forward(self, x):
        if not hasattr(self, 'ready'):
            if self.a.weight.requires_grad: self.a.weight.register_hook(lambda g: g*2)
            self.b.bias.requires_grad_(False)
            self.ready = True
        return super().forward(x)


MODELS = [HooksOnce, Collections, Grows, ActNorm, Renorm, WithLora, GradHooks]


def build(kind, ran):
    "The same model each time, in training mode but for one layer, with gradients"
    torch.manual_seed(3)
    Collections.table.clear()
    m = kind()
    m.train()
    m.n.eval()
    if ran:
        m(X[:2]).square().mean().backward()
        m.eval()(X[:3])
        m.train()
        m.n.eval()
    return m


def digest(o, seen=None):
    "All that can be told of an object, as plain data"
    seen = {} if seen is None else seen
    if id(o) in seen: return 'again', seen[id(o)]
    if isinstance(o, (type(None), bool, int, float, str, bytes)): return o
    if isinstance(o, torch.Tensor):
        grad = o.is_leaf and o.grad is not None and o.grad.tolist()
        return type(o).__name__, o.tolist(), o.requires_grad, len(o._backward_hooks or ()), grad, digest(vars(o), seen)
    if isinstance(o, np.ndarray): return o.tolist()
    seen[id(o)] = len(seen)
    if isinstance(o, dict): return type(o).__name__, [(k if isinstance(k, str) else '', digest(v, seen)) for k, v in o.items()]
    if isinstance(o, (list, tuple, set, deque)): return type(o).__name__, [digest(v, seen) for v in o]
    if isinstance(o, bytearray): return bytes(o)
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, np.random.Generator): return str(o.bit_generator.state)
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    if isinstance(o, (nn.Module, SimpleNamespace)): return type(o).__name__, digest(vars(o), seen)
    return type(o).__name__


def behaviour(m):
    "What it does from here on: passes in both modes, gradients, and what is left of it"
    res = [digest(m), digest(Collections.table)]
    for mode in (True, False, True):
        m.train(mode)
        y = m(X[:3])
        res.append(y.tolist())
        if mode: y.square().mean().backward()
    return res+[digest(m)]


def learner(m): return Learner(tensor_dls(X, torch.arange(16) % 4, X, torch.arange(16) % 4, bs=8), m, loss_func=CrossEntropyLossFlat())


def grouped(**kw): return dict(splits={'fc': 2}, classes={0: 0, 1: 0, 2: 1, 3: 1}, **kw)


GROUPS = dict(both=['b', 'c'])
LOOKS = {
    'cost': lambda m, x, learn: cost(m, x, max_seconds=.01),
    'layer_macs': lambda m, x, learn: layer_macs(m, x),
    'learn.cost': lambda m, x, learn: learn.cost(latency=False),
    'fails_at': lambda m, x, learn: failing_module(m, (x,)),
    'trace': lambda m, x, learn: trace_channels(m, x),
    'trace of another size': lambda m, x, learn: trace_channels(m, x[:, :2]),
    'kels': lambda m, x, learn: kels_masks(m, x),
    'extract_slim': lambda m, x, learn: extract_slim(m, x),
    'materialize': lambda m, x, learn: materialize(m, x),
    'sparse_infer': lambda m, x, learn: sparse_infer(m, x, 'auto'),
    'plan_slices': lambda m, x, learn: plan_slices(m, x, (1, .5)),
    'slice refused': lambda m, x, learn: slice_model(m, x, (1, 5)),
    'slice refused late': lambda m, x, learn: slice_model(m, x, (1, .5), norm='gn', groups=3),
    'split_plan': lambda m, x, learn: split_plan(m, x, {'fc': 2}),
    'split': lambda m, x, learn: split_model(m, x, **grouped()),
    'masked': lambda m, x, learn: masked_model(m, x, **grouped()),
    'split refused': lambda m, x, learn: split_model(m, x, **grouped() | dict(splits={'a': 2})),
    'share_bases.plan': lambda m, x, learn: share_bases.plan(m, x, shared_rank=2, groups=GROUPS),
    'share_bases refused': lambda m, x, learn: share_bases(m, x, shared_rank=4000, groups=GROUPS),
    'tie.plan': lambda m, x, learn: tie_weights.plan(m),
    'learn.plan sparsify': lambda m, x, learn: learn.plan('sparsify', sparsity=.5),
    'learn.plan slice': lambda m, x, learn: learn.plan('slice', rates=(1, .5)),
    'learn.plan share_bases': lambda m, x, learn: learn.plan('share_bases', shared_rank=2, groups=GROUPS),
    'learn.plan tie': lambda m, x, learn: learn.plan('tie'),
    'learn.plan prune': lambda m, x, learn: learn.plan('prune', target=.5),
    'learn.plan SplitNet': lambda m, x, learn: learn.plan(SplitNet({'fc': 2})),
    'learn.plan SliceTrain': lambda m, x, learn: learn.plan(SliceTrain((1, .5))),
    'learn.plan OrthoReg refused': lambda m, x, learn: learn.plan(OrthoReg()),
    'learn.plan refused': lambda m, x, learn: learn.plan(DynamicSparse(.5, include='nothing')),
    'snip': lambda m, x, learn: _snip(m, x, learn),
} | {f'learn.plan {k}': lambda m, x, learn, k=k: learn.plan(DynamicSparse(.5, method=k)) for k in ('set', 'rigl', 'static')} | {
    f'learn.plan {k}': lambda m, x, learn, k=k: learn.plan(KnowledgeEvolution(policy=k, generations=2))
    for k in ('kels', 'wels', 'llf', 'lw', 'magnitude', 'snip')}


def _snip(m, x, learn):
    policy = Snip(batches=2)
    policy.start(learn, 2)
    return policy(m, x, 1)


def look(f, m, learn):
    "Whether it was refused"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: f(m, X[:2], learn)
        except (ValueError, NotImplementedError, RuntimeError) as e: return e
    return None


SOME = 'learn.cost', 'trace', 'extract_slim', 'split', 'slice refused late', 'snip', 'learn.plan sparsify'


@pytest.mark.parametrize('ran', [False, True], ids=['fresh', 'ran'])
@pytest.mark.parametrize('looks', [SOME, pytest.param([*LOOKS], marks=pytest.mark.slow)], ids=['some', 'all'])
@pytest.mark.parametrize('kind', MODELS)
def test_no_verb_that_looks_changes_a_model(kind, looks, ran):
    fresh = behaviour(build(kind, ran))
    for name in looks:
        f = LOOKS[name]
        m = build(kind, ran)
        learn = learner(m)
        before, rng = digest(m), rng_state(learn.dls)
        look(f, m, learn)
        now = rng_state(learn.dls)
        assert digest(m) == before, name
        assert str(now['python']) == str(rng['python']) and torch.equal(now['torch'], rng['torch']) and torch.equal(now['numpy'][1], rng['numpy'][1]), name
        assert behaviour(m) == fresh, name


def test_the_looks_look():
    "On an ordinary model all of them do something, but those that are refused; each of the awkward ones is traced and costs something"
    for name, f in LOOKS.items():
        m = build(Body, False)
        e = look(f, m, learner(m))
        assert (e is not None) == ('refused' in name or 'another size' in name), (name, e)
    for kind in MODELS:
        for ran in (False, True): assert not look(LOOKS['learn.cost'], m := build(kind, ran), learner(m)), (kind, ran)
    for kind in (HooksOnce, GradHooks): assert not look(LOOKS['extract_slim'], m := build(kind, True), learner(m)), kind


def test_the_model_of_the_report():
    class Lazy(nn.Module):
        def __init__(s):
            super().__init__()
            s.a, s.c, s.seen = nn.Linear(3, 8), nn.Linear(8, 2), []
        def forward(s, x):
            if not hasattr(s, 'ready'):
                s.a.register_forward_hook(lambda m, i, o: s.seen.append(o))
                s.ready = True
            s.seen.clear()
            s.a(x)
            return s.c(sum(s.seen))
    m, x = Lazy().eval(), torch.ones(1, 3)
    trace_channels(m, x)
    assert not m.seen and not hasattr(m, 'ready')
    y = m(x)
    assert len(m.a._forward_hooks) == 1
    trace_channels(m, x)
    assert len(m.a._forward_hooks) == 1 and torch.equal(m(x), y)


def test_a_failing_pass_is_undone_too():
    m = build(Grows, False)
    with pytest.raises(RuntimeError), still(m):
        m(X[:1])
        raise RuntimeError('in the middle')
    assert not hasattr(m, 'extra') and not hasattr(m.fc, 'extra') and 'scale' not in m._buffers


def test_large_weights_are_told_of_and_others_put_back(monkeypatch):
    "Weights of torch's own layers are not copied where they are large; one that is written into nevertheless is named"
    import paramfx.core.forward as forward
    monkeypatch.setattr(forward, '_SMALL', 100)
    m = build(Renorm, False)
    old = {n: p.detach().clone() for n, p in m.named_parameters()}
    with pytest.warns(UserWarning, match='a.weight: a forward pass of this model writes'): trace_channels(m, X[:2])
    assert [n for n, p in m.named_parameters() if not torch.equal(p, old[n])] == ['a.weight']


def test_copies_do_not_reach_into_the_original():
    "A hook that closes over its model closes over the copy in a copy"
    m = build(HooksOnce, True)
    m.seen.clear()
    twin = copy_model(m)
    y = twin(X[:2])
    assert not m.seen and len(twin.seen) == 1 and torch.equal(y, m(X[:2]))


def test_bert_with_hidden_states():
    "transformers hangs its hooks on in the first pass"
    tf = pytest.importorskip('transformers', reason='transformers is not installed')
    kw = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ids = torch.randint(0, 50, (2, 6))
    m = tf.BertModel(tf.BertConfig(**kw, output_hidden_states=True)).eval()
    cost(m, ids, latency=False)
    trace_channels(m, ids)
    assert len(m(input_ids=ids, output_hidden_states=True).hidden_states) == 3
    m = tf.BertForSequenceClassification(tf.BertConfig(**kw, num_labels=2)).train()
    cost(m, ids, latency=False)
    m(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in m.parameters())
