"""Materialize: dead channels cut exactly, recipes in fresh processes, optimizers that go on, files that load without this library."""
import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchvision
from fastai.basics import Adam, CrossEntropyLossFlat, L, Learner, OptimWrapper, SGD, accuracy
from fastai.tabular.model import TabularModel
from fastai.text.models import AWD_LSTM
from fastai.vision.augment import Resize
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn

from paramfx.channels.trace import trace_channels
from paramfx.core.layers import CONVS
from paramfx.core.optimizers import opt_state
from paramfx.data.memory import digits_dls
from paramfx.core.forward import check_same
from paramfx.channels.dead import cut_dead, has_dead
from paramfx.experiments.demo import demo_net
from paramfx.core.runs import RunState
from fastai.torch_core import TensorBase, TensorImage
from paramfx.export.materialize import Recipe, defer, load_recipe, materialize, save_recipe, swap_model
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.sparsify import sparsify
from paramfx.core.state import effects
from paramfx.sparse.methods import DSR
from fresh import run_fresh


def lively(model, seed=0):
    "Norms with statistics, scales and shifts of their own, as after training"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, .2, generator=g)
                m.running_var.uniform_(.5, 1.5, generator=g)
                m.weight.uniform_(.5, 1.5, generator=g)
                m.bias.normal_(0, .3, generator=g)
    return model


def kill(model, share, seed=0):
    "Zero a share of the filters of each convolution but the first and the last"
    g = torch.Generator().manual_seed(seed)
    convs = [m for m in model.modules() if isinstance(m, CONVS)]
    with torch.no_grad():
        for m in convs[1:-1]:
            rows = torch.rand(m.weight.shape[0], generator=g) < share
            m.weight[rows] = 0
    return model


def calibrated(model, x):
    "Norms that have seen `x`, so that the signal reaches the end"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = 1.
    with torch.no_grad(): model.train()(x)
    return model.eval()


def snapshot(model): return {k: v.clone() for k, v in model.state_dict().items()}


def assert_state(a, b):
    assert list(a) == list(b)
    for k in a: assert torch.equal(a[k], b[k]), k


# 1. dead channels --------------------------------------------------------------------------------------------------------------

NETS = {n: getattr(torchvision.models, n) for n in ('resnet18', 'densenet121', 'squeezenet1_1', 'mobilenet_v2', 'mobilenet_v3_small', 'shufflenet_v2_x0_5')}


@pytest.mark.few(2)
@pytest.mark.parametrize('name', NETS)
def test_dead_filters_go_without_a_trace(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64).double()
    model = calibrated(kill(lively(NETS[name](num_classes=7)), .5).double(), x)
    before = snapshot(model)
    slim, cuts, rows = cut_dead(model, x)
    n, left = (sum(p.numel() for p in m.parameters()) for m in (model, slim))
    assert cuts and left < (.95 if 'mobilenet' in name or 'shuffle' in name or 'resnext' in name else .75)*n, (left/n, rows)
    for shape in ((2, 3, 64, 64), (1, 3, 96, 72)):  # not only on the sample that it was found with
        assert check_same(slim, model, torch.randn(shape).double(), 1e-11) < 1e-11
    assert_state(snapshot(model), before)
    assert (slim(x)-slim(-x)).abs().max() > 1e-8*slim(x).abs().max()  # the input does reach the outputs, far above the tolerance
    assert not has_dead(slim) or any(r['note'] for r in rows)


def test_flattened_maps():
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Flatten(), nn.Linear(6*9, 4)).double()).eval()
    with torch.no_grad(): model[0].weight[[1, 3]] = 0
    slim = cut_dead(model, torch.randn(2, 3, 5, 5).double())[0]
    assert slim[4].in_features == 4*9
    check_same(slim, model, torch.randn(9, 3, 5, 5).double(), 1e-12)


def test_training_goes_on_after_the_cut():
    model = kill(lively(torchvision.models.resnet18(num_classes=4)), .5)
    slim = materialize(model, torch.randn(2, 3, 32, 32))
    slim.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in slim.parameters())


def two_convs(pad, bias, act=nn.ReLU, norm=True):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, bias=False), *([nn.BatchNorm2d(6)] if norm else []), act(),
        nn.Conv2d(6, 5, 3, padding=pad, bias=bias), nn.ReLU(), nn.Conv2d(5, 4, 1)]
    return lively(nn.Sequential(*body).double()).eval()


@pytest.mark.parametrize('act', [nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Hardswish, nn.Softplus])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('pad', [0, 1, 'same'])
def test_constants_are_folded_or_carried(pad, bias, act):
    model, x = two_convs(pad, bias, act), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad():
        model[0].weight[[1, 2, 4]] = 0
        model[1].bias[[1, 2, 4]] = torch.tensor([.4, .9, .2]).double()
    slim = cut_dead(model, x)[0]
    assert slim[0].out_channels == (3 if pad == 0 and bias else 4)  # one carries the others
    assert (slim[3].bias is None) == (not bias)
    assert check_same(slim, model, torch.randn(3, 3, 12, 7).double(), 1e-12) < 1e-12


def test_constants_at_the_border_differ_so_they_stay():
    "A depthwise convolution with padding makes another constant at the border: no ratio fits"
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 3, 1)).double()).eval()
    with torch.no_grad(): model[0].weight[1] = 0; model[1].bias[1] = 1; model[1].running_mean[1] = -1
    x = torch.randn(2, 3, 8, 8).double()
    with pytest.warns(UserWarning, match='1 dead channel kept: .*border'): slim = materialize(model, x)
    assert slim[0].out_channels == 4


class Tied(nn.Module):
    "Two readers of one space; they share a weight, a bias, or use the weight without its bias"
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        if how == 'weight': self.c.weight = self.b.weight
        if how == 'bias': self.c.bias = self.b.bias

    def forward(self, x):
        h = torch.sigmoid(self.a(x))
        c = nn.functional.linear(h, self.c.weight) if self.how == 'no bias' else self.c(h.flip(0))
        return torch.cat([self.b(h), c], 1)


@pytest.mark.parametrize('how', ['weight', 'bias', 'no bias', ''])
def test_constants_of_tied_layers(how):
    torch.manual_seed(0)
    model = Tied(how).double()
    with torch.no_grad(): model.a.weight[[1, 4]] = 0
    slim = cut_dead(model, torch.randn(5, 3).double())[0]
    assert slim.a.out_features == (5 if how else 4)  # carried, or folded into biases
    check_same(slim, model, torch.randn(9, 3).double(), 1e-12)


def test_a_gate_that_depends_on_the_input_is_no_constant():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        def forward(self, x): return self.out(self.conv(x)*torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))
    torch.manual_seed(0)
    model, x = Gated().double().eval(), torch.randn(2, 3, 5, 5).double()
    with torch.no_grad():
        model.conv.weight[:2] = 0
        model.conv.bias[:2] = torch.tensor([0., 1.]).double()
    slim = cut_dead(model, x)[0]
    assert slim.conv.out_channels == slim.gate.out_channels == 3  # 0 times any gate is 0; 1 times a gate is not constant
    check_same(slim, model, torch.randn(4, 3, 6, 6).double(), 1e-12)


def test_comparisons_depend_on_the_input():
    class Stepped(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x):
            h = self.a(x)
            return self.b(torch.where(h > 0, torch.ones_like(h), torch.zeros_like(h)))
    torch.manual_seed(0)
    model, x = Stepped().double(), torch.randn(5, 3).double()
    with torch.no_grad(): model.a.weight[1] = 0
    slim = cut_dead(model, x)[0]
    check_same(slim, model, 3*torch.randn(50, 3).double(), 1e-12)


def test_unread_channels_go_too():
    model, x = two_convs(1, False), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad(): model[3].weight[:, [0, 5]] = 0
    slim = cut_dead(model, x)[0]
    assert slim[0].out_channels == 4
    check_same(slim, model, x, 1e-12)


def test_a_layer_keeps_one_channel():
    model, x = two_convs(1, True), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad(): model[0].weight.zero_(); model[1].bias.fill_(-9.)
    slim, _, rows = cut_dead(model, x)
    assert slim[0].out_channels == 1 and 'one is kept' in rows[0]['note']
    check_same(slim, model, x, 1e-12)


def test_tabular_model_with_integer_inputs():
    torch.manual_seed(0)
    model = lively(TabularModel([(5, 3), (4, 2)], 3, 2, [16, 8]).double().eval())
    lin = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad(): lin[0].weight[:5] = 0
    x = (torch.randint(0, 4, (6, 2)), torch.randn(6, 3).double())
    slim = materialize(model, x)
    assert [m for m in slim.modules() if isinstance(m, nn.Linear)][0].out_features == 12  # 11 live ones, and one that carries the constants of the norm behind
    y = (torch.randint(0, 4, (50, 2)), torch.randn(50, 3).double())
    check_same(slim, model, y, 1e-12)


def test_what_cannot_be_traced_keeps_its_dead_channels():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x): return self.b(torch.special.i0(self.a(x)))
    model, x = Odd(), torch.randn(2, 3)
    with torch.no_grad(): model.a.weight[1] = 0
    with pytest.warns(UserWarning, match='special_i0'): slim = materialize(model, x)
    assert slim.a.out_features == 4 and torch.equal(slim(x), model(x))


def test_recurrent_networks_pass(recwarn):
    torch.manual_seed(0)
    model, x = AWD_LSTM(20, 6, 8, 1), torch.randint(0, 20, (2, 5))
    slim = materialize(model, x)
    check_same(slim, model, x)


# 2. materialize ----------------------------------------------------------------------------------------------------------------

def test_masks_burn_in_and_go():
    model, x = demo_net(), torch.randn(4, 1, 8, 8)
    sparsify(model, .8)
    before = snapshot(model)
    plain = materialize(model, x)
    assert effects(plain) == {} and list(plain.state_dict()) == list(demo_net().state_dict())
    assert_state(snapshot(model), before)
    assert 'dynamic_sparse' in effects(model)
    check_same(plain, model, x)


def test_whole_filters_really_go():
    model, x = lively(demo_net()), torch.randn(4, 1, 8, 8)
    sparsify(model, .5, granularity='filter', include=CONVS)
    plain = materialize(model, x)
    assert [m.out_channels for m in plain if isinstance(m, nn.Conv2d)] <= [9, 17, 17]
    check_same(plain, model, torch.randn(9, 1, 8, 8))


def test_dead_false_leaves_shapes_alone():
    model, x = demo_net(), torch.randn(4, 1, 8, 8)
    sparsify(model, .5, granularity='filter', include=CONVS)
    assert [p.shape for p in materialize(model, x, dead=False).parameters()] == [p.shape for p in demo_net().parameters()]


def test_a_module_that_lies_is_caught():
    class Half(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Linear(4, 2)
        def forward(self, x): return self.inner(x)/2
        def plain(self): return self.inner
    model = nn.Sequential(Half())
    with pytest.raises(ValueError, match='differ'): materialize(model, torch.randn(2, 4))
    assert isinstance(model[0], Half)


def test_waiting_cuts_survive_copies_and_are_applied():
    model, x = lively(demo_net()).eval(), torch.randn(2, 1, 8, 8)
    cut = trace_channels(model, x).cut(.5)
    defer(model, cut)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    small = materialize(other, x)
    check_same(small, cut.masked(model), x)
    assert '_pending' not in vars(small) and [s['verb'] for s in Recipe.of(small)] == ['cut']


# 3. recipes --------------------------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from fastai.torch_core import TensorBase, TensorImage
from paramfx.export.materialize import Recipe, load_recipe
from paramfx.experiments.demo import demo_net
m = load_recipe(sys.argv[1], demo_net()).eval()
torch.save(m(torch.load(sys.argv[2])), sys.argv[3])
"""


def run(code, *args, **kw):
    res = run_fresh(code, *map(str, args), **kw)
    assert res.returncode == 0, res.stderr[-3000:]
    return res.stdout


@pytest.mark.parametrize('kind', ['masks', 'slim', 'slim, then masks'])
def test_recipe_in_a_fresh_process(kind, tmp_path):
    model, x = lively(demo_net()).eval(), torch.randn(2, 1, 8, 8)
    if 'slim' in kind: model = trace_channels(model, x).cut(.5).apply(model)
    if 'masks' in kind: sparsify(model, .7)
    torch.save(x, tmp_path/'x')
    run(LOAD, save_recipe(model, tmp_path/'net.pth'), tmp_path/'x', tmp_path/'y')
    assert torch.equal(torch.load(tmp_path/'y'), model(x))


def test_two_cuts_one_after_the_other(tmp_path):
    model, x = lively(demo_net()).eval(), torch.randn(2, 1, 8, 8)
    a = trace_channels(model, x).cut({'0': [3, 1, 2, 9], '3': range(5)})
    small = a.apply(model)
    small = trace_channels(small, x).cut({'0': [1, 0]}).apply(small)
    again = load_recipe(save_recipe(small, tmp_path/'net.pth'), demo_net()).eval()
    assert torch.equal(again(x), small(x)) and len(Recipe.of(again)) == 2


def test_files_that_are_no_recipes(tmp_path):
    torch.save(demo_net().state_dict(), tmp_path/'plain.pth')
    (tmp_path/'junk.pth').write_bytes(b'junk')
    for name in ('plain.pth', 'junk.pth'):
        with pytest.raises(ValueError, match='no file of `save_recipe`'): load_recipe(tmp_path/name, demo_net())
    with pytest.raises(FileNotFoundError): load_recipe(tmp_path/'missing.pth', demo_net())
    with pytest.raises(ValueError, match='no such step'): load_recipe([dict(verb='x', module='os', args={})], demo_net())


# 4. on a Learner ---------------------------------------------------------------------------------------------------------------

def filters(**kw): return DynamicSparse(.5, granularity='filter', include=CONVS, method='static', **kw)


def learner(tmp_path, opt_func=Adam):
    torch.manual_seed(0)
    learn = Learner(digits_dls(device='cpu'), demo_net(), metrics=accuracy, path=tmp_path, opt_func=opt_func)
    learn.fit(1, cbs=filters())
    return learn


@pytest.mark.parametrize('opt_func', [Adam, SGD, lambda p, **kw: OptimWrapper(p, torch.optim.AdamW, **kw)], ids=['adam', 'sgd', 'wrapper'])
def test_optimizer_goes_on_with_its_momentum(tmp_path, opt_func):
    learn = learner(tmp_path, opt_func)
    old, opt = learn.model, learn.opt
    state = {n: {k: v.clone() for k, v in opt_state(opt, p).items() if torch.is_tensor(v)} for n, p in old.named_parameters()}
    score = learn.validate()
    assert learn.materialize() is learn and learn.opt is opt and learn.model is not old
    assert list(learn.validate()) == pytest.approx(list(score), abs=1e-5)
    held = {id(p) for g in (opt.param_lists if hasattr(opt, 'param_lists') else [g['params'] for g in opt.param_groups]) for p in g}
    keep = {s: torch.tensor(k) for step in Recipe.of(learn.model) for s, k in step['args']['keep'].items()}
    for n, p in learn.model.named_parameters():
        assert id(p) in held, n
        for k, v in opt_state(opt, p).items():
            if torch.is_tensor(v) and v.ndim: assert v.shape == p.shape, (n, k)
    moved = opt_state(opt, learn.model[0].weight)
    for k, v in state['0.weight'].items():
        if v.ndim: assert torch.equal(moved[k], v[keep['0']]), k
    before = snapshot(learn.model)
    learn.fit(1)
    assert not torch.equal(before['3.weight'], learn.model[3].weight)
    assert 'dead channels of 0' in str(learn.paramfx['materialize'])


def test_no_dead_channel_no_new_model(tmp_path):
    learn = Learner(digits_dls(device='cpu'), demo_net(), path=tmp_path)
    learn.sparsify(.5)
    model, params = learn.model, list(learn.model.parameters())
    learn.materialize()
    assert learn.model is model and all(a is b for a, b in zip(params, model.parameters())) and effects(model) == {}


def test_frozen_groups_stay_frozen(tmp_path):
    split = lambda m: L(list(m[:6].parameters()), list(m[6:].parameters()))
    learn = Learner(digits_dls(device='cpu'), demo_net(), path=tmp_path, splitter=split)
    learn.sparsify(.5, granularity='filter', include=CONVS, method='static')
    learn.freeze()
    learn.materialize()
    assert not learn.model[3].weight.requires_grad and learn.model[6].weight.requires_grad
    before = snapshot(learn.model)
    learn.fit(1)
    assert torch.equal(before['3.weight'], learn.model[3].weight) and not torch.equal(before['6.weight'], learn.model[6].weight)


def test_slim_run_is_resumed(tmp_path):
    "Files of the small network fit the small network"
    learn = learner(tmp_path).materialize()
    learn.fit(1, cbs=RunState('run'))
    learn.save('slim')
    other = learner(tmp_path).materialize()
    other.load('slim', with_opt=True)
    assert_state(snapshot(other.model), snapshot(learn.model))


EXPORTED = """
import sys
class Blocked:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'paramfx': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
assert not any(m.split('.')[0] == 'paramfx' for m in sys.modules)
torch.save(learn.model.eval()(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_export_loads_without_this_library(tmp_path):
    files = []
    for i in range(48):
        files.append(tmp_path/f'{i}.png')
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 12), dtype=np.uint8)).save(files[-1])
    dls = ImageDataLoaders.from_lists(tmp_path, files, [f'class{i%10}' for i in range(48)], item_tfms=Resize(8),
        img_cls=PILImageBW, bs=8, num_workers=0, device='cpu', seed=0)
    learn = Learner(dls, demo_net(), CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    x = torch.randn(4, 1, 8, 8)
    learn.fit(1, cbs=DynamicSparse(.5, granularity='filter', include=CONVS, method='static'))
    learn.materialize()
    out = learn.model.eval()(x)
    learn.export('net.pkl')
    torch.save(x, tmp_path/'x')
    run(EXPORTED, tmp_path/'net.pkl', tmp_path/'x', tmp_path/'y', cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path/'y'), out)
    assert learn.model[0].out_channels < 16


def test_pretrained_style_learner(tmp_path):
    "A body and fastai's head, as `vision_learner` makes them"
    from fastai.vision.learner import create_vision_model
    from fastai.vision.models import resnet18
    torch.manual_seed(0)
    model = create_vision_model(resnet18, 3, pretrained=False)
    lively(model)
    sparsify(model, .5, granularity='filter', include=lambda n, m: isinstance(m, CONVS) and '0.' in n and 'conv1' in n and 'layer' not in n and n != '0.0')
    x = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = materialize(model, x)
    assert sum(p.numel() for p in plain.parameters()) < .8*sum(p.numel() for p in model.parameters())
    check_same(plain, model, torch.randn(3, 3, 96, 64))


# 5. what a sample cannot show, and what must not get lost -----------------------------------------------------------------------

class Do(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)


def middle_of_zero():
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    with torch.no_grad(): conv.weight[:, :, 1, 1] = 0
    return conv


SIZES = dict(  # name -> what is between two layers, the second layer, extent of the sample, is the dead channel the same constant at any size?
    sum=(Do(lambda h: h.sum((2, 3))), nn.Linear(6, 2), 4, False),
    softmax=(Do(lambda h: h.flatten(2).softmax(-1)), nn.Conv1d(6, 2, 1), 4, False),
    shape=(Do(lambda h: h/h.shape[-1]), nn.Conv2d(6, 2, 1), 4, False),
    depthwise=(middle_of_zero(), nn.Conv2d(6, 2, 1), 1, False),
    ceil=(nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3), nn.Conv2d(6, 2, 1), 4, False),
    mean=(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 2), 4, True),
    border=(nn.Identity(), nn.Conv2d(6, 2, 1, padding=1), 4, None),  # merged
    fmax=(Do(lambda h: torch.fmax(h, torch.zeros_like(h))), nn.Conv2d(6, 2, 1), 4, True),
    sign=(Do(torch.sign), nn.Conv2d(6, 2, 1), 4, True))


@pytest.mark.parametrize('name', SIZES)
def test_constants_hold_at_other_sizes(name):
    torch.manual_seed(0)
    mid, head, n, steady = SIZES[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), copy.deepcopy(mid), head).double().eval()
    with torch.no_grad(): model[0].weight[[1, 3]] = 0; model[0].bias[[1, 3]] = torch.tensor([.7, .4]).double()
    slim = cut_dead(model, torch.randn(1, 3, n, n).double())[0]
    assert slim[0].out_channels == (5 if steady is None else 4 if steady else 6)
    check_same(slim, model, torch.randn(2, 3, 7, 5).double(), 1e-12)


def test_dead_channels_that_must_stay_are_named():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 2, 1))
    with torch.no_grad(): model[0].weight[1] = 0
    with pytest.warns(UserWarning, match='1 dead channel kept: .*normalizes'): materialize(model, torch.randn(2, 3, 4, 4))


def test_pins_by_module_and_by_wrong_name():
    model, x = two_convs(0, True), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad(): model[0].weight[1] = 0; model[3].weight[1] = 0
    slim = materialize(model, x, pin=model[0])
    assert slim[0].out_channels == 6 and slim[3].out_channels == 4
    with pytest.raises(ValueError, match="'zzz'"): materialize(model, x, pin='zzz')


class Shell(nn.Module):
    def __init__(self): super().__init__(); self.inner = demo_net()
    def forward(self, x): return self.inner(x)
    def plain(self): return self.inner


def test_plain_modules_keep_cuts_and_recipes(tmp_path):
    model, x = lively(Shell()).eval(), torch.randn(2, 1, 8, 8)
    defer(model, trace_channels(model.inner, x).cut(.5))
    with pytest.raises(ValueError, match='waits'): save_recipe(model, tmp_path/'net.pth')
    small = materialize(model, x)
    assert small[0].out_channels == 8
    assert torch.equal(load_recipe(save_recipe(small, tmp_path/'net.pth'), Shell()).eval()(x), small(x))
    with pytest.raises(ValueError, match='steps of its own'): save_recipe(nn.Sequential(small), tmp_path/'net.pth')


def test_effects_on_a_part_end_too():
    model, x = nn.Sequential(demo_net(), nn.Linear(10, 2)), torch.randn(2, 1, 8, 8)
    sparsify(model[0], .5)
    plain = materialize(model, x)
    assert not effects(plain[0]) and list(plain.state_dict()) == list(nn.Sequential(demo_net(), nn.Linear(10, 2)).state_dict())


@pytest.mark.parametrize('kw', [dict(), dict(granularity='kernel'),
    dict(init_mask={'3.weight': torch.arange(32*16*9).view(32, 16, 3, 3)%3 > 0})], ids=['weight', 'kernel', 'given'])
def test_rewired_masks_go_on_from_a_recipe(tmp_path, kw):
    new = lambda: DynamicSparse(.8, period=4, method=DSR(n_realloc=5), **kw)
    learn = Learner(digits_dls(device='cpu'), demo_net(), path=tmp_path)
    learn.fit(1, cbs=new())
    again = load_recipe(save_recipe(learn.model, tmp_path/'net.pth'), demo_net())
    assert_state(snapshot(again), snapshot(learn.model))
    twice = load_recipe(save_recipe(again, tmp_path/'net.pth'), demo_net())
    assert_state(snapshot(twice), snapshot(learn.model))
    steps = effects(again)['dynamic_sparse'].clock.steps
    Learner(digits_dls(device='cpu'), again, path=tmp_path).fit(1, cbs=new())
    assert effects(again)['dynamic_sparse'].clock.steps == 2*steps


def test_recipes_of_other_precision_and_damaged_files(tmp_path):
    model, x = lively(demo_net()).eval().double(), torch.randn(2, 1, 8, 8).double()
    file = save_recipe(trace_channels(model, x).cut(.5).apply(model), tmp_path/'net.pth')
    assert load_recipe(file, demo_net())[0].out_channels == 8
    with pytest.raises(ValueError, match='Step 1 .*does not fit this ResNet'): load_recipe(file, torchvision.models.resnet18())
    (tmp_path/'half.pth').write_bytes(file.read_bytes()[:file.stat().st_size//2])
    torch.save(dict(version=1), tmp_path/'empty.pth')
    for name in ('half.pth', 'empty.pth'):
        with pytest.raises(ValueError, match='no file of `save_recipe`'): load_recipe(tmp_path/name, demo_net())
    torch.save(dict(torch.load(file), version=2), tmp_path/'new.pth')
    with pytest.raises(ValueError, match='newer version'): load_recipe(tmp_path/'new.pth', demo_net())
    with pytest.raises(ValueError, match='Step 1 of the recipe is damaged'): load_recipe([dict(verb='cut')], demo_net())


def test_slow_weights_and_wrappers_go_along(tmp_path):
    from fastai.optimizer import ranger
    learn = learner(tmp_path, ranger)
    learn.model = nn.DataParallel(learn.model)
    learn.materialize()
    assert isinstance(learn.model, nn.DataParallel) and learn.model.module[0].out_channels == 8
    for ps, ss in zip(learn.opt.param_lists, learn.opt.slow_weights): assert [p.shape for p in ps] == [s.shape for s in ss]
    rows = learn.paramfx['materialize']
    learn.fit(1)
    assert learn.materialize().paramfx['materialize'] == rows


@pytest.mark.parametrize('norm',
    [nn.BatchNorm2d, lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True), lambda n: nn.GroupNorm(n, n)], ids=['batch', 'instance', 'group'])
def test_channels_scaled_by_zero(norm):
    "As network slimming leaves them: the filter lives, but its norm keeps only the shift"
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).double().eval(), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad(): model[1].weight[[0, 2, 5]] = 0; model[1].bias[[0, 2, 5]] = torch.tensor([.5, .3, -1.]).double()
    slim = cut_dead(model, x)[0]
    assert slim[0].out_channels == 4  # two constants in one, and a zero
    check_same(slim, model, torch.randn(3, 3, 14, 12).double(), 1e-12)


def test_fresh_residual_networks_with_zero_scales_stay():
    model = torchvision.models.resnet18(zero_init_residual=True).eval()
    slim = materialize(model, torch.randn(1, 3, 48, 48))
    check_same(slim, model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('opt', [Adam, lambda p, **kw: OptimWrapper(p, torch.optim.Adam, **kw),
    lambda p, **kw: OptimWrapper(p, torch.optim.SGD, momentum=.9, **kw)])
def test_swap_model_for_one_of_another_shape(opt):
    "State of the old shape is left behind, that of unchanged parameters goes on"
    dls = digits_dls(device='cpu')
    net = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10))
    learn = Learner(dls, net(8), opt_func=opt)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        old, kept = learn.opt, {k: v.clone() for k, v in opt_state(learn.opt, learn.model[3].bias).items() if torch.is_tensor(v)}
        swap_model(learn, net(4))
        assert learn.opt is old and kept and not opt_state(learn.opt, learn.model[1].weight)
        now = opt_state(learn.opt, learn.model[3].bias)
        assert all(torch.equal(now[k], v) for k, v in kept.items())
        before = learn.model[1].weight.detach().clone()
        learn.fit(1, 1e-3)
    assert not torch.equal(learn.model[1].weight, before)


@pytest.mark.parametrize('kind', [torch.Tensor, TensorBase, TensorImage])
def test_constants_fold_whatever_the_type_of_the_sample(kind):
    "Image loaders of fastai's give a TensorImage: a constant read from it must still fit into a bias"
    m = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        m[0].weight[:3] = 0
        m[1].bias.fill_(.5)
    x = torch.randn(2, 3, 8, 8)
    small = materialize(m, x.as_subclass(kind))
    assert small[0].out_channels == 5 and type(small[3].bias) is nn.Parameter
    torch.testing.assert_close(small.eval()(x), m(x))
