"""Cuts against the golden vectors of Knowledge Evolution and SplitNet: which rows and columns belong to a slim network, found by the
authors' hand-written models, and outputs computed by the original code."""
import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.vision.learner import create_vision_model
from fastai.vision.models import resnet18, xresnet
from torch import nn

from paramfx.channels.trace import trace_channels
from paramfx.core.forward import check_same


def read(golden, name):
    path = golden/'knowledge_evolution'/name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_text())


def build(arch, classes):
    "The network without the time for its random weights"
    if arch == 'vision_learner_resnet18': return create_vision_model(resnet18, classes, pretrained=False).eval()
    if arch.startswith('x'): return getattr(xresnet, arch)(n_out=classes).eval()
    kw = dict(aux_logits=False, init_weights=False) if arch == 'googlenet' else {}
    with torch.device('meta'): model = torchvision.models.get_model(arch, weights=None, num_classes=classes, **kw)
    return model.to_empty(device='cpu').eval()


def runs(idx): return [[int(r[0]), int(r[-1])+1] for r in np.split(idx, np.flatnonzero(np.diff(idx) != 1)+1)]


def kept(cut, name, tensor, dim, n):
    "Positions that stay along a dimension of a tensor, as runs"
    b = cut.cmap.bindings.get((name, tensor, dim))
    idx = None if b is None else cut.index(b[1])
    return [[0, n]] if idx is None else runs(idx)


@pytest.mark.parametrize('file', ['kels_resnet18.json', 'kels_resnet50.json', 'kels_googlenet.json', 'kels_densenet121.json.gz'])
def test_rows_and_columns_of_the_hand_written_models(golden, file):
    cases = read(golden, file)
    model = build(cases[0]['arch'], cases[0]['num_classes'])
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()): t.zero_()
    cmap = trace_channels(model, torch.zeros(1, 3, 64, 64))
    seen = 0
    for case in cases:
        cut = cmap.cut(case['split_rate'])
        for layer in case['layers']:
            o, i = layer['shape'][:2]
            assert kept(cut, layer['name'], 'weight', 0, o) == layer['out'], (case['split_rate'], layer['name'])
            assert kept(cut, layer['name'], 'weight', 1, i) == layer['in'], (case['split_rate'], layer['name'])
            seen += 2
        for norm in case['norms']:
            assert kept(cut, norm['name'], 'running_var', 0, norm['n']) == norm['keep'], (case['split_rate'], norm['name'])
        if case['split_rate'] == .5: assert sum(p.numel() for p in cut.apply(model, check=False).parameters()) == case['fit_params']
    assert seen == 2*sum(len(c['layers']) for c in cases)


def test_grouped_layers_and_other_concatenations(golden):
    for case in read(golden, 'derived_slim.json'):
        model = build(case['model'], case['num_classes'])
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()): t.zero_()
        slim = trace_channels(model, torch.zeros(1, 3, 96, 96)).cut(case['split_rate']).apply(model, check=False)
        assert sum(p.numel() for p in slim.parameters()) == case['fit_params'], case['model']
        for name, (o, i, groups) in case['layers'].items():
            m = slim.get_submodule(name)
            assert m.weight.shape[0] == o and (m.in_features if isinstance(m, nn.Linear) else m.in_channels) == i, (case['model'], name)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 13, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(13)
        self.fc = nn.Linear(13, 5)

    def forward(self, x): return self.fc(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda i, o, k=3, s=1: nn.Conv2d(i, o, k, stride=s, padding=k//2, bias=False)
        self.stem, self.a1, self.a2, self.b1, self.b2, self.down = conv(3, 7), conv(7, 7), conv(7, 7), conv(7, 12, s=2), conv(12, 12), conv(7, 12, 1, 2)
        for n, k in dict(bn0=7, bna1=7, bna2=7, bnb1=12, bnb2=12, bnd=12).items(): setattr(self, n, nn.BatchNorm2d(k))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x+self.bna2(self.a2(F.relu(self.bna1(self.a1(x))))))
        y = self.bnb2(self.b2(F.relu(self.bnb1(self.b1(x)))))
        return self.fc(F.relu(self.bnd(self.down(x))+y).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda i, o, k: nn.Conv2d(i, o, k, padding=k//2, bias=False)
        self.stem, self.p, self.q, self.mix = conv(3, 8, 3), conv(8, 5, 1), conv(8, 7, 3), conv(12, 10, 1)
        for n, k in dict(bn0=8, bnc=12, bnm=10).items(): setattr(self, n, nn.BatchNorm2d(k))
        self.fc = nn.Linear(22, 5)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        z = F.relu(self.bnc(torch.cat([self.p(x), self.q(x)], 1)))
        m = F.relu(self.bnm(self.mix(z)))
        return self.fc(torch.cat([m, z], 1).mean((2, 3)))


TINY = dict(chain=Chain, residual=Residual, concat=Concat)


@pytest.mark.parametrize('name', ['chain_30', 'chain_50', 'concat_30', 'concat_50', 'concat_80', 'residual_30', 'residual_50'])
def test_slim_networks_to_the_number(golden, name):
    z = np.load(golden/'knowledge_evolution'/f'tiny_{name}.npz')
    net, rate = name.split('_')
    model = TINY[net]().double().eval()
    state = {k[7:]: torch.tensor(z[k]).double() for k in z.files if k.startswith('before/')}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all('num_batches' in k for k in missing.missing_keys)
    x = torch.tensor(z['x']).double()
    cut = trace_channels(model, x).cut(int(rate)/100)
    slim = cut.apply(model)
    for k in z.files:
        if k.startswith('slim/') and 'num_batches' not in k: assert np.array_equal(slim.state_dict()[k[5:]].float().numpy(), z[k]), k
    with torch.no_grad():
        assert np.allclose(model(x), z['y_dense'], rtol=0, atol=1e-6)
        for out, want in ((slim(x), 'y_slim'), (cut.masked(model)(x), 'y_masked')): assert np.allclose(out, z[want], rtol=1e-6, atol=1e-6)
    assert check_same(slim, cut.masked(model), x, 1e-12) < 1e-12
