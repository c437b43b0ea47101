"""Tiny networks for the channel tracer, and the one test that every cut has to pass: small = masked in float64."""
import warnings

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from paramfx.channels.cuts import Cut


class Net(nn.Module):
    "Layers, parameters and buffers by name, and a forward that is a function of them and the inputs"
    def __init__(self, run, layers):
        super().__init__()
        self.run = run
        for k, v in layers.items():
            if isinstance(v, nn.Parameter): self.register_parameter(k, v)
            elif torch.is_tensor(v): self.register_buffer(k, v)
            else: setattr(self, k, v)

    def forward(self, *xs): return self.run(self, *xs)


def fill(model, seed=0):
    "Weights, statistics and buffers far from zero and one, in float64"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in model.parameters(): t.copy_((torch.rand(t.shape, generator=gen)-.5)*1.2)
        for t in model.buffers():
            if t.is_floating_point(): t.copy_(torch.rand(t.shape, generator=gen)+.5)
    return model.double().eval()


def numbers(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model, xs):
    with torch.no_grad(): return [t for t in tree_leaves(model(*[x.clone() for x in xs])) if torch.is_tensor(t)]


KEEPS = {'prefix': lambda n, k, rng: np.arange(k), 'subset': lambda n, k, rng: np.sort(rng.permutation(n)[:k]),
    'shuffled': lambda n, k, rng: rng.permutation(n)[:k]}

def keep(cmap, kind, seed=0):
    "Half of the units of each space that can be cut, chosen in one of three ways"
    rng = np.random.default_rng(seed)
    return {s.name: KEEPS[kind](s.size, max(1, s.size//2), rng) for s in cmap.cuttable}


def check_exact(model, xs, cmap, kinds=KEEPS, tol=1e-12):
    "Small = masked, and neither is the whole network nor blind to its input"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        for kind in kinds:
            cut = Cut(cmap, keep(cmap, kind))
            small = cut.apply(model)
            a, b, whole = run(small, xs), run(cut.masked(model), xs), run(model, xs)
            assert [t.shape for t in a] == [t.shape for t in b] == [t.shape for t in whole]
            assert max((s-t).abs().max()/t.abs().max() for s, t in zip(a, b)) < tol, kind
            assert max((s-t).abs().max() for s, t in zip(b, whole)) > 1e-6, 'the cut changes nothing'
            other = run(small, [numbers(*x.shape, seed=9) if x.is_floating_point() else x for x in xs])
            assert max((s-t).abs().max() for s, t in zip(a, other)) > 1e-6, 'the output does not depend on the input'
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            assert [(n, type(m)) for n, m in small.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]


def found(cmap):
    "Spaces as text, without the outputs: 'producers:units>readers', with '!reason' where they stay whole"
    return [(f"{','.join(s.producers)}:{s.size}>{','.join(s.readers)}", s.why) for s in cmap if not s.why.startswith('they are the output')]
