"Sparse layers in half precision, and weights put in the place of computed ones, as torchao does it: one clear line, with a remedy that works"
import pickle
import re
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.basics import Learner
from torch import nn

import paramfx.core.optimizers
from paramfx.kernels.csr import CSRLinear
from paramfx.all import DynamicSparse, load_recipe, materialize, save_recipe, share_bases, sparsify, tensor_dls, tie_weights

X = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='no sparse kernels in this build of torch')


def net(): return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))


def learner(model=None, *cbs):
    x = torch.randn(16, 20)
    return Learner(tensor_dls(x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long(), bs=8, device='cpu'), model or net(), cbs=cbs)


def live(): return learner(None, DynamicSparse(.8, method='set', compute='csr', include='*'))


def pasted(message, **names):
    "Carry out what stands in backticks"
    code, = re.findall('`(.*?)`', message)
    exec(code, {'torch': torch, 'materialize': materialize} | names, names)
    return names


@needs_mkl
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_live_sparse_layers_in_half_precision_are_named(dtype, tmp_path):
    learn = live()
    model = learn.model
    y = model(X)
    for m in (model, deepcopy(model), pickle.loads(pickle.dumps(model)), load_recipe(save_recipe(model, tmp_path/'r.pth'), net())):
        m.to(dtype)
        with pytest.raises(TypeError, match=rf'^0: there are no sparse kernels for {str(dtype)[6:]}.*`model = materialize\(model\.float\(\), x\)') as e:
            m(X.to(dtype))
        new = pasted(str(e.value), model=m, x=X)['model']
        assert type(new[0]) is nn.Linear and new[0].weight.dtype == dtype
        assert torch.allclose(new(X.to(dtype)).float(), y, atol=.05)
    model.to(dtype)
    with pytest.raises(TypeError, match='^0: .*`learn.model.float') as e: learn.validate()
    learn = pasted(str(e.value), learn=learn)['learn']
    assert torch.allclose(learn.model(X.to(dtype)).float(), y, atol=.05)


@needs_mkl
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_frozen_layers_in_half_precision_are_named(dtype):
    model = net()
    sparsify(model, .8, include='*')
    y, new = model.eval()(X), materialize(model, X, fmt='csr')
    assert torch.allclose(new(X), y, atol=1e-5)
    new.to(dtype)
    with pytest.raises(TypeError, match='^0: there are no sparse kernels') as e: new(X.to(dtype))
    again = pasted(str(e.value), model=new, x=X)['model']
    assert torch.allclose(again(X.to(dtype)).float(), y, atol=.05)


@needs_mkl
def test_autocast_computes_in_the_type_of_the_values():
    learn = live()
    y = learn.model.eval()(X)
    frozen = materialize(learn.model, X, fmt='csr')
    for m in (learn.model, frozen):
        with torch.autocast('cpu', torch.bfloat16): out = m(X)
        assert torch.allclose(out.float(), y, atol=.05)
    learn.model.bfloat16()
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(TypeError, match='^0: there are no sparse kernels'): learn.model(X)
    learn.model.double()
    assert torch.allclose(learn.model(X.double()).float(), y, atol=.05)


def convs(): return nn.Sequential(nn.Conv2d(3, 8, 3), *[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    for _ in range(3)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def tied():
    model = net()
    tie_weights(model, .8, include='*')
    return model


def shared():
    model = convs()
    share_bases(model, torch.randn(2, 3, 8, 8))
    return model


@pytest.mark.parametrize('make', (pytest.param(lambda: live().model, marks=needs_mkl), tied, shared))
def test_no_weight_is_put_in_the_place_of_a_computed_one(make):
    model = make()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, paramfx.core.optimizers.ComputedWeight))
    w, keys = layer.weight.detach().clone(), [*model.state_dict()]
    for put in (lambda: setattr(layer, 'weight', nn.Parameter(w)), lambda: setattr(layer, 'weight', w),
        lambda: layer.register_parameter('weight', nn.Parameter(w))):
        with pytest.raises(TypeError, match=r'weight is calculated .* `model = materialize\(model, x\)`') as e: put()
        assert torch.equal(layer.weight, w) and keys == [*model.state_dict()]
    if not isinstance(model[0], nn.Conv2d): assert str(e.value).startswith(f'{name}:')
    new = pasted(str(e.value), model=model, x=X if isinstance(model[0], nn.Linear) else torch.randn(2, 3, 8, 8))['model']
    layer = new.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def test_a_layer_on_its_own_shows_itself():
    if not torch.backends.mkl.is_available(): pytest.skip('no sparse kernels')
    layer = CSRLinear.of(nn.Linear(20, 4)).bfloat16()
    with pytest.raises(TypeError, match=r'^CSRLinear\(in_features=20.*no sparse kernels'): layer(X.bfloat16())


@needs_mkl
def test_with_torchao():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantization = pytest.importorskip('torchao.quantization', reason='torchao is not installed')
    model = live().model
    with pytest.raises(TypeError, match=r'^0: its weight is calculated .* `model = materialize\(model, x\)`') as e:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    new = pasted(str(e.value), model=model, x=X)['model']
    y = new.eval()(X)
    quantization.quantize_(new, quantization.Int8WeightOnlyConfig())
    assert torch.allclose(new(X), y, atol=.05)
