"Networks met in use: outputs in a dict, samples of other kinds, float functionals"
import pytest
import torch
from torch import nn

from nets import check_exact, fill, numbers
from paramfx.all import branches, check_same, cost, split_model, split_plan, trace_channels
from paramfx.core.samples import as_shapes
from paramfx.evolution.masks import check_masks
from paramfx.bases.ortho import ortho_penalty


class Dict(nn.Module):
    "A classifier that returns a dict, as those of transformers do"
    def __init__(self, more=False):
        super().__init__()
        self.a, self.b, self.fc, self.more = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(8, 4), more

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return dict(loss=None, logits=self.fc(h)) | (dict(hidden=h) if self.more else {})


GROUPS = dict(splits={'b': 2, 'fc': 2}, classes={0: 0, 1: 0, 2: 1, 3: 1})


def test_a_dict_with_one_tensor_is_split():
    m, x = fill(Dict()), numbers(3, 5)
    new = split_model(m, x, **GROUPS)
    assert set(new(x)) == {'loss', 'logits'} and sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in m.parameters())
    parts = branches(new)
    assert torch.equal(parts(x), new(x)['logits']) or check_same(parts, new, x) < 1e-12


def test_several_tensors_are_told_by_shape():
    with pytest.raises(ValueError, match=r"returns \{'loss': None, 'logits': Tensor\[3, 4\], 'hidden': Tensor\[3, 8\]\}, not one tensor") as e:
        split_plan(fill(Dict(more=True)), numbers(3, 5), {'fc': 2})
    assert 'several' not in str(e.value)


BAD = {'dict': lambda t: dict(ids=t), 'nested': lambda t: ((t, t), t), 'number': lambda t: (t, 3), 'array': lambda t: t.numpy(), 'none': lambda t: (t, None)}


@pytest.mark.parametrize('verb', [trace_channels, cost, lambda m, x: split_model(m, x, **GROUPS), lambda m, x: check_same(m, m, x)])
@pytest.mark.parametrize('kind', BAD)
def test_messages_about_samples_tell_shapes(kind, verb):
    x = torch.full((2, 5), .123456789)
    with pytest.raises(ValueError, match=r'sample must be .*\[2, 5\]') as e: verb(Dict(), BAD[kind](x))
    assert '.12' not in str(e.value) and 'tensor(' not in str(e.value)


def test_other_messages_tell_shapes_too():
    t = torch.full((2, 3), .123456789)
    for f in (lambda: check_masks(Dict(), t), lambda: check_masks(Dict(), {'a.weight': [t]}), lambda: ortho_penalty(t)):
        with pytest.raises(ValueError) as e: f()
        assert '[2, 3]' in str(e.value) and '.12' not in str(e.value)
    assert as_shapes((t, [1, {'a': None}])) == "(Tensor[2, 3], (1, {'a': None}))"


class Functional(nn.Module):
    "As written for quantization later: additions and concatenations that can be watched"
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(12, 5, 1), nn.Conv2d(5, 4, 1)
        self.q, self.k = kind(), kind()

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.q.add_relu(x, self.b(x))
        x = self.k.cat([self.k.mul_scalar(x, 2.), x], 1)
        return self.head(torch.relu(self.c(x)))


@pytest.mark.parametrize('kind', [torch.ao.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FXFloatFunctional])
def test_a_float_functional_is_an_addition(kind):
    m, x = fill(Functional(kind)), (numbers(2, 3, 7, 7),)
    cmap = trace_channels(m, x)
    assert [s.name for s in cmap.cuttable] == ['a', 'c'] and cmap['a'].producers == ['a', 'b']
    check_exact(m, x, cmap)


def test_what_is_quantized_is_refused_still():
    class Mine(nn.Linear): __module__ = 'my_quantized_nets.layers'
    assert trace_channels(nn.Sequential(Mine(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)).cuttable
    for m in (torch.ao.nn.quantized.QFunctional(), torch.ao.nn.quantized.Linear(4, 4)):
        with pytest.raises(ValueError, match='it is quantized'): trace_channels(nn.Sequential(nn.Linear(4, 4), m), torch.randn(2, 4))
