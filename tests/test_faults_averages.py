"A copy that is fed while the network trains - an average of its weights, such as `AveragedModel` - is within the budget when it runs, is saved or materialized"
import io
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.basics import Callback, Learner, set_seed
from fastai.optimizer import Adam
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from paramfx.all import DynamicSparse, IterativePrune, effects, load_recipe, load_sparse, materialize, save_recipe, save_sparse, sparsify, tensor_dls

X = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))


def net(): return nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 2))


def learner(method='set', **kw):
    set_seed(0)
    x = torch.randn(64, 20)
    dls = tensor_dls(x, (x[:, 0] > 0).long(), x[:8], (x[:8, 0] > 0).long(), bs=8, device='cpu')
    cb = IterativePrune(.8, n_prunes=2, include='*') if method == 'prune' else DynamicSparse(.8, method=method, include='*', period=3, **kw)
    return Learner(dls, net(), cbs=cb, opt_func=Adam)


class Feed(Callback):
    order = 70
    def __init__(self, average): self.average = average
    def after_step(self): getattr(self.average, 'update_parameters', getattr(self.average, 'update', None))(self.learn.model)


AVERAGES = dict(swa=AveragedModel, ema=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9)),
    v3=lambda m: ModelEmaV3(m, decay=.9), v3_loop=lambda m: ModelEmaV3(m, decay=.9, foreach=False))
UNION = dict(ema_buffers=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True), v2=lambda m: ModelEmaV2(m, decay=.9))


def fed(learn, make, n=2):
    average = make(learn.model)
    with learn.no_logging(), learn.no_bar(): learn.fit(n, cbs=Feed(average))
    return average


def held(model): return [*effects(model).values()][0].holder
def outside(model): return sum(int((e.weight[~e.full] != 0).sum()) for e in held(model).items)
def nonzero(model): return sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize('kind', AVERAGES)
@pytest.mark.parametrize('method', ('set', 'dsr', 'granet', 'prune'))
def test_an_average_is_within_the_budget(method, kind, tmp_path):
    learn = learner(method)
    m = fed(learn, AVERAGES[kind]).module
    masks = held(m).masks
    budget = sum(int(v.sum()) for v in masks.values())
    if method != 'prune': assert all(torch.equal(masks[n], v) for n, v in learn.dynamic_sparse.masks.items())
    before = [p.detach().clone() for p in m.parameters()]
    y = m.eval()(X)
    assert held(m).live == budget and nonzero(m) <= budget and not outside(m)
    for old, (n, p) in zip(before, m.named_parameters()):
        assert torch.equal(p, old*masks[n] if n in masks else old)  # no more than masked
    new = materialize(m, X, dead=False)
    assert nonzero(new) <= budget and torch.allclose(new.eval()(X), y, atol=1e-6)
    save_sparse(m, tmp_path/'a.safetensors')
    other, sparse = learner(method).model, learner(method).model
    other.load_state_dict(m.state_dict())
    load_sparse(tmp_path/'a.safetensors', sparse)
    for o in (other, sparse): assert torch.equal(o.eval()(X), y) and not outside(o)
    assert torch.equal(load_recipe(save_recipe(m, tmp_path/'r.pth'), net()).eval()(X), y)


@pytest.mark.parametrize('first', (lambda m, f: m.state_dict(), lambda m, f: save_sparse(m, f/'a.safetensors'),
    lambda m, f: update_bn([X], AveragedModel(m)), lambda m, f: save_recipe(m, f/'a.pth')))
def test_whatever_reads_it_first_masks_it(first, tmp_path):
    m = fed(learner(), AveragedModel).module
    assert outside(m) or held(m).items[0].late
    first(m, tmp_path)
    m.eval()(X)
    assert not outside(m)


def test_materialize_alone_masks_a_copy():
    m = fed(learner(), AveragedModel).module.eval()
    masks = held(m).masks
    new = materialize(m, X, dead=False)
    assert all(not new.get_parameter(n)[~v].any() for n, v in masks.items())
    assert torch.allclose(new(X), m(X), atol=1e-6)


@pytest.mark.parametrize('kind', UNION)
@pytest.mark.parametrize('method', ('set', 'dsr', 'granet'))
def test_averaged_masks_are_named_as_the_cause(method, kind, tmp_path):
    m = fed(learner(method), UNION[kind]).module.eval()
    with pytest.raises(ValueError, match=r'0\.weight: .* masks now keep .* averaged along with the weights. Average the weights only'): materialize(m, X)
    with pytest.raises(ValueError, match='averaged along with the weights'): save_sparse(m, tmp_path/'a.safetensors')
    assert not (tmp_path/'a.safetensors').exists()


def test_an_average_of_parameters_alone_is_named_as_the_cause():
    learn = learner()
    model, average = learn.model, deepcopy(learn.model)
    with learn.no_logging(), learn.no_bar(): learn.fit(2)
    with torch.no_grad():
        for p, q in zip(average.parameters(), model.parameters()): p.lerp_(q, .5)
    with pytest.raises(ValueError, match=r'weights outside of its mask are not 0\. .* alone'): materialize(average.eval(), X, tol=0.)
    with pytest.warns(UserWarning, match='outside of its mask'): average.state_dict()
    for st in effects(average).values(): st.holder.weights_()  # the remedy
    assert torch.allclose(materialize(average, X, dead=False).eval()(X), average(X), atol=1e-6)


def test_sparse_layers_say_that_an_average_mixes_their_weights():
    if not torch.backends.mkl.is_available(): pytest.skip('no sparse kernels')
    learn = learner(compute='csr')
    average = AveragedModel(learn.model)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
        with pytest.warns(UserWarning, match=r"stand at other places .* compute='dense'"): fed_once(average, learn.model)
        learn.dynamic_sparse.rewire(learn.opt)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            learn.model.state_dict()  # its own rewires are no news
            learn.model.load_state_dict(learn.model.state_dict())
            learn.model.state_dict()
            deepcopy(learn.model).eval()(X)


def fed_once(average, model):
    average.update_parameters(model)
    average.eval()(X)


def test_copies_that_nobody_feeds_stay_as_they_are():
    "Nothing is multiplied, traced or hooked without need"
    model = net()
    sparsify(model, .5)
    assert not model._forward_pre_hooks
    for copy in (deepcopy(model), deepcopy(deepcopy(model)), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        assert not any(e.late for e in held(copy).items) and len(copy._forward_pre_hooks) < 2
        versions = [p._version for p in copy.parameters()]
        assert torch.equal(copy.eval()(X), model.eval()(X))
        torch.func.functional_call(copy, {n: p*2 for n, p in copy.named_parameters()}, X)
        assert versions == [p._version for p in copy.parameters()]
    torch.jit.script(model)
    torch.export.export(deepcopy(model), (X,))
    assert torch.equal(torch.compile(deepcopy(model), backend='eager')(X), model(X))
    plain = materialize(deepcopy(model), X)
    assert not any(m._forward_pre_hooks for m in plain.modules())
    f = io.BytesIO()
    torch.save(deepcopy(model), f)
    assert torch.equal(torch.load(io.BytesIO(f.getvalue()), weights_only=False)(X), model(X))


def test_a_copied_learner_trains_like_the_first():
    a = learner()
    with a.no_logging(), a.no_bar(): a.fit(1)
    b = deepcopy(a)
    for learn in (a, b):
        set_seed(3)
        for dl in learn.dls.loaders: dl.rng.seed(3)
        with learn.no_logging(), learn.no_bar(): learn.fit(1)
    for k, v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k
