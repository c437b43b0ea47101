"""Every matrix of a network is told of by every plan, taken or skipped; and what a network says of its widths is true after a cut."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contracts import build, tiny_dls
from nets import Net, numbers
from paramfx.bases.share import share_bases
from paramfx.channels.trace import trace_channels
from paramfx.core.layers import all_matrices, pick_layers
import paramfx.report.plan # gives Learner plan  # noqa: F401
from paramfx.evolution.masks import extract_slim, kels_masks, wels_masks
from paramfx.core.forward import check_same
from paramfx.evolution.callback import KnowledgeEvolution
from paramfx.export.materialize import load_recipe, materialize, save_recipe
from paramfx.evolution.policies import LLF, Head, Magnitude
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.callback import DynamicSparse
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.slice import set_rate, slice_model
from paramfx.sparse.sparsify import sparsify
from paramfx.splitnet.plan import split_plan
from paramfx.sparse.tied import tie_weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


class Times(nn.Module):
    "`x @ w`"
    def __init__(self, i, o):
        super().__init__()
        self.w = nn.Parameter(torch.randn(i, o)*.1)
    def forward(self, x): return x @ self.w


class Conv1D(nn.Module):
    "As in GPT-2: a linear layer whose weight lies the other way round"
    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)*.1), nn.Parameter(torch.zeros(o))
    def forward(self, x): return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Kernels(nn.Module):
    "`F.conv2d(x, k)`"
    def __init__(self, i, o):
        super().__init__()
        self.k = nn.Parameter(torch.randn(o, i, 3, 3)*.1)
    def forward(self, x): return F.conv2d(x, self.k, padding=1)


class Mixed(nn.Module):
    "All kinds of matrices: known layers, raw ones, an embedding and its decoder, attention, a parametrized layer, a norm of two dimensions"
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.raw_conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), Kernels(4, 4)
        self.norm = nn.LayerNorm([8, 8])
        self.up, self.times, self.gpt = nn.Linear(8, 12), Times(12, 12), Conv1D(12, 12)
        self.att = nn.MultiheadAttention(12, 2, batch_first=True)
        self.par = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
        self.emb, self.dec = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.dec.weight = self.emb.weight
        self.pos, self.head = nn.Parameter(torch.zeros(1, 8, 12)), nn.Linear(20, 10)

    def forward(self, x):
        h = self.norm(self.raw_conv(self.conv(self.stem(x.view(-1, 1, 8, 8))))).mean(1)
        h = self.par(self.gpt(self.times(self.up(h)+self.pos)))
        h = self.att(h, h, h, need_weights=False)[0] + self.emb(torch.zeros(1, dtype=torch.long, device=x.device))
        return self.head(self.dec(h).mean(1))


def sizes(rows):
    "Numbers in all shapes that a table shows"
    return sum(torch.Size(map(int, s.split('x'))).numel() for r in rows if r.get('shape') for s in r['shape'].split(', '))

def held(model): return sum(p.numel() for p in model.parameters() if p.ndim > 1)
def told(rows): return {str(r.get('layer', r.get('parameter'))): r.get('note', '') for r in rows}
def note(rows, name): return next(v for k, v in told(rows).items() if name in k)

PLANS = dict(
    sparsify=lambda m, x: sparsify.plan(m), DynamicSparse=lambda m, x: DynamicSparse(.5).plan(m), prune=lambda m, x: IterativePrune(.5).plan(m),
    tie=lambda m, x: tie_weights.plan(m, .5))


@pytest.mark.parametrize('name', PLANS)
def test_plans_of_weights_list_every_matrix(name):
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 8, 8)
    rows = PLANS[name](model, x)
    assert sizes(rows) == held(model)
    for n, what in (('times.w', 'Times'), ('gpt.weight', 'Conv1D'), ('raw_conv.k', 'Kernels'), ('pos', 'Mixed')):
        assert f'a parameter of {what}, which is no known' in note(rows, n)
    assert note(rows, 'emb') == 'an embedding' and 'shared with the embedding emb' in note(
        rows, 'dec') and 'norm' in note(rows, 'norm') and 'parametrized' in note(rows, 'par')
    assert not [n for n in told(rows) if 'in_proj' in n and told(rows)[n] and 'only Linear' not in told(rows)[n]]


def test_matrices_by_owner():
    model = Mixed()
    mats = {x.name: x for x in all_matrices(model)}
    assert len(mats) == len({id(p) for p in model.parameters() if p.ndim > 1}) and 'dec.weight' not in mats and mats['emb.weight'].is_embedding
    assert {n for n, x in mats.items() if not x.note} == {'stem.weight', 'conv.weight', 'up.weight', 'att.in_proj_weight', 'att.out_proj.weight', 'head.weight'}
    assert mats['par.parametrizations.weight.original1'].layer == 'par'
    dropped = nn.Sequential(nn.LSTMCell(3, 4))
    assert [x.is_unknown for x in all_matrices(dropped)] == [True, True] and not any(x.note for x in all_matrices(dropped, (nn.RNNCellBase,)))


def small(): return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), Times(12, 24), nn.ReLU(), Conv1D(24, 48), nn.ReLU(), nn.Linear(48, 10))


def test_plans_of_channels_list_every_matrix():
    model, x = small(), torch.randn(2, 12)
    rows = slice_model.plan(model, x, rates=(1, .5), exclude=['2'])
    assert sizes(rows) == held(model) and [r['rate'] for r in rows if 'rate' in r] == [1, .5]
    assert {r['layer']: r['becomes'] for r in rows if 'becomes' in r} == {'0.weight': '6x12', '2.weight': '12x6'} and 'Times' in note(rows, '3.w')
    slice_model(model, x, rates=(1, .5), exclude=['2'])
    assert list(SliceTrain().plan(model))[2:] == list(rows)[2:]
    cmap = trace_channels(small(), x)
    assert 'Outside of layers, so stay whole: 3.w, 5.weight' in repr(cmap)
    cut = cmap.cut(.5, whole='keep')
    assert [(r['layer'], r.get('becomes')) for r in cut.matrices(small())][:2] == [('0.weight', '6x12'), ('2.weight', '12x6')]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Kernels(4, 4), nn.ReLU(), nn.Conv2d(4, 2, 3)) # here the trace follows the raw weight
    rows = trace_channels(net, torch.randn(1, 1, 8, 8)).cut(.5).matrices(net)
    assert [r.get('becomes') for r in rows] == ['2x1x3x3', '2x2x3x3', '2x2x3x3'] and 'Outside' not in repr(trace_channels(net, torch.randn(1, 1, 8, 8)))


def test_plan_of_a_split_lists_every_matrix():
    model, x = nn.Sequential(Times(12, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(2, 12)
    rows = split_plan(model, x, {'1': 2, '3': 2}).table
    assert sizes(rows) == held(model) and [r['groups'] for r in rows if r.get('layer') == '1.weight'] == [2] and 'Times' in note(rows, '0.w')
    rows = split_plan(model, x, {'3': 2}).table
    assert sizes(rows) == held(model) and note(rows, '1.weight') == 'not in splits'


def test_plan_of_bases_lists_every_matrix():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Kernels(8, 8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8*25, 3))
    rows = share_bases.plan(net, torch.randn(1, 3, 11, 11), groups=dict(a=['1', '3']), shared_rank=4)
    assert sizes(rows) + sum(r.get('params_before', 0) for r in rows) == held(net)
    assert 'Kernels' in note(rows, '2.k') and note(rows, '5.weight') == 'Linear: only convolutions share filters'


@pytest.mark.parametrize('cb', [lambda: DynamicSparse(.5), lambda: IterativePrune(.5),
    lambda: KnowledgeEvolution('wels'), lambda: KnowledgeEvolution(LLF('dec')), 'tie'])
def test_a_learner_lists_them_too(tmp_path, cb):
    learn = build(tmp_path, model=Mixed, dls=lambda: tiny_dls(n=32, n_valid=16, bs=16))
    for n, p in list(learn.model.named_modules()):
        if n == 'par': nn.utils.parametrize.remove_parametrizations(p, 'weight')
    rows = learn.plan(cb if isinstance(cb, str) else cb())
    assert sizes(r for r in rows if 'x' in r.get('shape', '')) == held(learn.model) and 'Times' in note(rows, 'times.w')


def test_large_unknown_parts_are_told_of():
    with pytest.warns(UserWarning, match=r'1,440 of the 2,208 numbers.*\(Times, Conv1D\): 3.w, 5.weight. They stay dense'): sparsify(small(), .5)
    with pytest.warns(UserWarning, match='They stay as they are'): tie_weights(small(), .5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify(nn.Sequential(Times(3, 3), nn.Linear(3, 9)), .5)


@pytest.mark.parametrize('spec,text', [
    ('3', r"'3' is of class Times, and none of its matrices can be taken: 3.w \(12x24\) is a parameter "
    r"of Times"), ('3.w', r"called '3.w'.*3.w \(12x24\) is a parameter of Times"),
    ('0.weight', "'0.weight' is a parameter: name its layer, '0'"),
    ('0.bias', r"'0.bias' is a parameter of shape \[12\]"), ('1', "'1' is of class ReLU and holds no matrix"),
    ('*.w', 'a parameter of Times'), ('nothing', "No layer is called 'nothing'")])
def test_include_names_something_else(spec, text):
    for f in (lambda: pick_layers(small(), spec), lambda: sparsify(small(), include=[spec]),
        lambda: tie_weights(small(), include=spec), lambda: wels_masks(small(), {spec: .5})):
        with pytest.raises(ValueError, match=text): f()
    model = small()
    with pytest.raises(ValueError, match="'3' is of class Times"): pick_layers(model, model[3])
    with pytest.raises(ValueError, match=r"'0' is of class Embedding.*0.weight \(5x6\) is an embedding"):
        pick_layers(nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 2)), '0')


def language_model(linear=False):
    e, d = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
    d.weight = e.weight
    return nn.Sequential(e, Conv1D(12, 16), nn.GELU(), *([nn.Linear(16, 16)] if linear else []), Conv1D(16, 12), d)


def test_a_language_model_of_unknown_layers():
    model, x = language_model(), torch.randint(20, (1, 4))
    known = r'held by classes that are no known layers \(Conv1D\)'
    for f in (lambda: sparsify(model), lambda: tie_weights(model), lambda: slice_model(model, x), lambda: share_bases(model, x), lambda: wels_masks(model)):
        with pytest.raises(ValueError, match=known): f()
    with pytest.raises(ValueError, match='held by no known class of layer'): kels_masks(model, x)
    with pytest.raises(ValueError, match='held by no known class of layer'): trace_channels(model, x).cut(.5)


def test_embeddings_are_drawn_anew_only_for_who_asks():
    model, x = language_model(), None
    with pytest.raises(ValueError, match=r"embedding \(0.weight, 20x12\).*split_rate=\{'0': .5\}"): wels_masks(model)
    with pytest.raises(ValueError, match='left alone'): wels_masks(model, {'*': .5})
    for name in ('0', '4'): assert 0 < wels_masks(model, {name: .5})['0.weight'].float().mean() < 1
    only = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 12)) # an embedding that nothing shares
    assert list(wels_masks(only)) == ['1.weight'] and not wels_masks(only, {'0': .5})['0.weight'].all()
    model = language_model(True)
    for masks in (wels_masks(model), Magnitude(.5)(model, x, 1), LLF('3')(model, x, 1), wels_masks(model, {'*': .5})):
        assert masks['0.weight'].all() and not masks['3.weight'].all()
    with pytest.raises(ValueError, match=r"policy=LLF\('5'\)"): Head()(model, x, 1)
    assert not LLF('5')(model, x, 1)['0.weight'].any() and not LLF('fc')(model, x, 1)['0.weight'].any()


def test_transformers():
    tf = pytest.importorskip('transformers', reason='transformers is not installed')
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()
    for f in (sparsify, tie_weights, wels_masks):
        with pytest.raises(ValueError, match=r'no known layers \(Conv1D\)'): f(model)
    with pytest.raises(ValueError, match='is a parameter of Conv1D'): sparsify(model, include='transformer.h.0.attn')
    assert list(wels_masks(model, {'lm_head': .5})) == ['transformer.wte.weight']


# -- widths

def timm_net(name='resnet10t', **kw):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5, **kw).eval(), torch.randn(1, 3, 64, 64)


def check_widths(new, x):
    "Stages, features and a new head, as timm tells of them"
    seen, hooks = {}, []
    for o in new.feature_info:
        def look(m, args, out, n=o['module']): seen[n] = out.shape[1]
        hooks.append(new.get_submodule(o['module']).register_forward_hook(look))
    features = new.forward_features(x)
    for h in hooks: h.remove()
    assert {o['module']: o['num_chs'] for o in new.feature_info} == seen and len(seen) > 2
    assert new.num_features == features.shape[1]
    assert new.forward_head(features, pre_logits=True).shape[1] == new.head_hidden_size
    new.reset_classifier(7)
    assert new(x).shape == (1, 7)


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'regnety_002', 'densenet121'])
@pytest.mark.parametrize('only', [None, 2])
def test_timm_follows(name, only):
    model, x = timm_net(name)
    cmap = trace_channels(model, x)
    before = copy.deepcopy(model.feature_info)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*width of before')
        new = cmap.cut(.5, only=None if only is None else cmap.cuttable[::only]).apply(model, check=False)
    assert new.feature_info != before and model.feature_info == before
    check_widths(new, x)


def test_every_way_to_less_channels(tmp_path):
    model, x = timm_net()
    check_widths(extract_slim(model, x, .5), x)
    sliced = copy.deepcopy(model)
    slice_model(sliced, x, rates=(1, .5))
    set_rate(sliced, .5)
    thin = materialize(sliced, x)
    save_recipe(thin, tmp_path/'thin.pth')
    check_widths(thin, x)
    check_widths(load_recipe(tmp_path/'thin.pth', model), x)
    check_widths(materialize(sliced, x, rate=.5), x)
    assert materialize(sliced, x, rate=1).num_features == model.num_features
    dead = copy.deepcopy(model)
    with torch.no_grad():
        for m in (dead.layer4[0].bn2, dead.layer4[0].downsample[-1]): m.weight[:100], m.bias[:100] = 0, 0
    new = materialize(dead, x)
    assert new.num_features == new.fc.in_features < 512
    check_widths(new, x)


def test_torchvision_follows():
    from torchvision import models as tv
    for make, names in ((tv.resnet18, ['inplanes']),
        (tv.mobilenet_v2, ['last_channel', 'features.1.out_channels']), (tv.squeezenet1_0, ['features.3.inplanes'])):
        model, x = make(weights=None).eval(), torch.randn(1, 3, 64, 64)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', '.*width of before')
            new = trace_channels(model, x).cut(.5).apply(model, check=False)
        for n in names:
            owner, _, key = n.rpartition('.')
            old, now = (getattr(m.get_submodule(owner), key) for m in (model, new))
            assert now == old//2


def test_unknown_widths_are_told_of_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
            self.code, self.num_heads, self.kept, self.hidden_dim, self.flag, self._mine = 8, 8, 3, 8, True, 8
        def forward(self, x): return self.c(self.b(self.a(x).relu()).relu())
    model, x = Odd().double(), numbers(2, 3)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        new = trace_channels(model, x).cut(.5).apply(model)
    assert [str(w.message).split(':')[0] for w in got] == ['code=8']
    assert (new.code, new.num_heads, new.hidden_dim) == (8, 8, 4)
    with warnings.catch_warnings(record=True) as got: # where another layer still has the width, nothing is known to be stale
        warnings.simplefilter('always')
        trace_channels(model, x).cut(.5, only='b').apply(model)
    assert not got
    net = Net(lambda s, x: s.b(s.a(x)), dict(a=nn.Linear(3, 8), b=nn.Linear(8, 2)))
    check_same(trace_channels(net, torch.randn(2, 3)).cut(1.).apply(net), net, torch.randn(2, 3))
