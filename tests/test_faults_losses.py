"""Nothing is lost without a word: fits without a method's callback, cuts of what is not ready, names and evolutions that cannot work."""
import re
import warnings
from functools import partial

import pytest
import torch
from fastai.basics import Learner, accuracy, set_seed
from fastai.callback.schedule import *  # noqa: F403  fit_one_cycle, fine_tune, lr_find
from torch import nn

from paramfx.all import (
    at_rate, DynamicSparse, effects, Evaluation, IterativePrune, KELS, KnowledgeEvolution, LLF, masked_model, materialize, OrthoReg,
    set_rate, slice_model, SliceTrain, split_model, SplitNet, tensor_dls)
from paramfx.core.samples import sample_batch
from paramfx.core.forward import copy_model
from paramfx.core.clock import AllFits


def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def net(w=8): return nn.Sequential(conv(1, w), conv(w, w), conv(w, w, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 4))


def few_dls(n=96, valid=32):
    "Stripes along one of two axes, of one of two widths, and some noise"
    x, y = torch.randn(n+valid, 1, 8, 8, generator=torch.Generator().manual_seed(0))*.5, torch.arange(n+valid)%4
    wave = torch.sin(torch.arange(8)*1.5)*2
    for i, k in enumerate(y):
        x[i, 0] += (wave if k < 2 else wave.sign()*(torch.arange(8) % 4 < 2))[None if k%2 else slice(None), None if not k%2 else slice(None)]
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
    'DynamicSparse, granet': (None, partial(DynamicSparse, .8, method='granet', span=AllFits(9)), masks('dynamic_sparse'), 'DynamicSparse'),
    'IterativePrune': (None, partial(IterativePrune, .8), masks('iterative_prune'), None),
    'IterativePrune, on its way': (None, partial(IterativePrune, .8, n_prunes=3, span=AllFits(9)), masks('iterative_prune'), 'IterativePrune'),
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


# -- what a verb takes away

def number(text): return float(re.search(r'([\d.]+) % of the squared weight is lost', text)[1])/100


def trained(cbs=None, epochs=1, model=None, **kw):
    learn = learner(model, **kw)
    learn.fit(epochs, 1e-2, cbs=cbs)
    return learn


def test_what_was_never_pruned_is_told():
    learn = learner().prune(.8)
    seen = told(learn.materialize)
    assert len(seen) == 1 and seen[0].startswith('IterativePrune: 0 of 1 prunes were made, so 1,184 of 1,184 units are live, and 236 the target')
    assert any('0 of 1 prunes' in r['how'] for r in learn.paramfx['materialize'])
    done = learner().prune(.8)
    done.fit(1)
    assert told(done.materialize) == []
    with pytest.warns(UserWarning, match='room for 1 of 3'): half = trained(IterativePrune(.8, n_prunes=3))
    x = sample_batch(half.dls)
    assert [w.split(',')[0] for w in told(materialize, half.model, x)] == ['IterativePrune: 1 of 3 prunes were made']  # on a model alike
    assert told(trained(DynamicSparse(.8, period=1)).materialize) == []  # at its budget from the first step on
    late = told(trained(DynamicSparse(.8, method='granet', span=AllFits(9))).materialize)
    assert len(late) == 1 and "target of method='granet'" in late[0]


def test_groups_that_nobody_has_cut_along_are_told():
    learn = trained(SplitNet({'2': 2, '5': 2}))
    seen = told(learn.materialize)
    assert len(seen) == 1 and 'learn.split()' in seen[0]


def test_a_split_of_undecided_groups_tells_what_it_loses():
    learn = trained(SplitNet({'2': 2, '5': 2}))
    dense = {n: p.clone() for n, p in learn.model.named_parameters()}
    seen = told(learn.split)
    assert len(seen) == 1 and seen[0].startswith('split: ')
    cut = ('2.0.weight', '5.weight')
    left = sum(p.double().square().sum().item() for n, p in learn.model.named_parameters() if n.startswith(('2.0', '5.')) and p.ndim > 1)
    share = 1-left/sum(dense[n].double().square().sum().item() for n in cut)
    assert number(seen[0]) == pytest.approx(share, abs=1e-3) and share > .2
    assert f'{100*share:.3g} %' in learn.paramfx['split'][-2]['groups']


def test_a_split_of_decided_groups_and_of_a_new_network_is_silent():
    learn = trained(SplitNet({'2': 2, '5': 2}))
    holder = learn.split_net.effect.holder
    with torch.no_grad():  # as if nothing were left between the groups
        for w, p, q in holder.weights({s: torch.nn.functional.one_hot(g).T.float() for s, g in holder.groups().items()}):
            w.mul_((q.T@p).view(len(w), -1, *[1]*(w.ndim-2)) + 1e-3)
    assert told(learn.split) == []
    assert told(learner().split, {'5': 2}, classes='random') == []
    seen = told(trained().split, {'5': 2}, classes='random')  # the same where there is something to lose
    assert len(seen) == 1 and .2 < number(seen[0]) < .8


def test_the_fit_part_tells_what_it_leaves_behind():
    learn = learner()
    learn.evolve(1, 1, file=None, evaluation=Evaluation(slim=False))
    whole = [m.weight.clone() for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    seen = told(learn.extract_slim)
    kept = [m.weight for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1:]  # the first one reads the picture
    share = 1-sum(w.square().sum() for w in kept)/sum(w[:len(k)].square().sum() for w, k in zip(whole[1:], kept))
    assert len(seen) == 1 and number(seen[0]) == pytest.approx(share.item(), abs=1e-3)
    assert f'{100*share.item():.2g}'[:2] in learn.paramfx['materialize'][0]['how']
    assert told(learner().extract_slim, {'0.0': 1.}) == []  # nothing goes


def test_a_slice_that_was_never_trained_tells_so(tmp_path):
    learn = learner(path=tmp_path)
    x = sample_batch(learn.dls)
    learn.slice(rates=(1, .75, .5))
    assert told(learn.slice_report, repeats=1) == told(materialize, learn.model, x) == []
    out = told(materialize, learn.model, x, rate=.5)
    assert len(out) == 1 and out[0].startswith('rate=0.5: ') and 'SliceTrain()' in out[0] and .3 < number(out[0]) < .7
    assert told(learn.export_slice, .5, 'small') == out
    assert len(told(materialize, set_rate(learn.model, .5), x)) == 1  # the width that is in force
    learn.fit(1, cbs=SliceTrain())
    learn.save('all')
    set_rate(learn.model, 1)
    assert told(materialize, learn.model, x, rate=.5) == told(learn.export_slice, .75, 'small') == []
    other = learner(cbs=SliceTrain((1, .75, .5)), path=tmp_path)
    assert len(told(materialize, other.model, x, rate=.5)) == 1
    other.load('all')  # a file knows that it was trained
    assert told(materialize, other.model, x, rate=.5) == []


def test_only_the_widths_that_ran_count_as_trained():
    model, x = net(), torch.rand(2, 1, 8, 8)
    slice_model(model, x, rates=(1, .75, .5))
    with at_rate(model, .75): model(x).sum().backward()  # a loop of one's own
    assert told(materialize, model, x, rate=.75) == []
    assert len(told(materialize, model, x, rate=.5)) == 1
    assert told(materialize, copy_model(model), x, rate=.75) == []


def blocks(): return nn.Sequential(conv(1, 8), nn.Sequential(*[conv(8, 8) for _ in range(3)]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
SHARED = dict(groups={'all': ['1.0.0', '1.1.0', '1.2.0']}, basis_norm=False)


@pytest.mark.parametrize('mode', ['basis', 'tie'])
def test_filters_that_are_converted_tell_what_they_lose(mode):
    learn = trained(model=blocks())
    before = [learn.model[1][i][0].weight.clone() for i in range(3)]
    more = dict(shared_rank=4) if mode == 'basis' else {}
    kw = {**SHARED, 'mode': mode, 'init': 'svd', **more}
    if mode == 'tie': kw.pop('basis_norm')
    seen = told(learn.share_bases, **kw)
    lost = [(a-learn.model[1][i][0].weight).square().sum().item() for i, a in enumerate(before)]
    share = sum(lost)/sum(a.square().sum().item() for a in before)
    assert len(seen) == 1 and seen[0].startswith('share_bases: ') and number(seen[0]) == pytest.approx(share, abs=1e-3)
    rows = [r for r in learn.paramfx['share_bases'] if 'lost' in r]
    assert [r['lost'] for r in rows] == pytest.approx([e/a.square().sum().item() for e, a in zip(lost, before)], rel=1e-4)
    if mode == 'basis': assert not any('is lost' in w for w in told(trained(model=blocks()).share_bases, shared_rank=24, unique_rank=0, init='svd', **SHARED))


TRAINED = {  # verb on a trained Learner -> who tells, and whether with the share
    'share_bases': (lambda learn: learn.share_bases(shared_rank=4, **SHARED), "share_bases: 3 trained layers begin anew", False),
    'tie': (lambda learn: learn.tie(.5), 'tie: ', True),
    'sparsify': (lambda learn: learn.sparsify(.5), 'DynamicSparse: ', True),
    'sparsify, plan': (lambda learn: learn.plan('sparsify', sparsity=.5), 'DynamicSparse: ', True),
    'slice, gn': (lambda learn: learn.slice(rates=(1, .5), norm='gn', groups=4), "norm='gn': 4 batch norms", False),
}


@pytest.mark.parametrize('name', TRAINED)
def test_a_verb_tells_what_it_takes_of_a_trained_network(name):
    verb, begins, share = TRAINED[name]
    seen = told(verb, trained(model=blocks()))
    assert len(seen) == 1 and seen[0].startswith(begins)
    if share: assert .1 < number(seen[0]) <= 1
    assert told(verb, learner(blocks())) == []  # a new network has nothing to lose


def test_masks_of_a_trained_network_tell_the_share_they_take():
    learn = trained(model=blocks())
    before = {n: p.clone() for n, p in learn.model.named_parameters()}
    seen = told(learn.sparsify, .9)
    lost = {n: before[n][~m].square().sum() for n, m in learn.dynamic_sparse.masks.items()}
    assert number(seen[0]) == pytest.approx((sum(lost.values())/sum(before[n].square().sum() for n in lost)).item(), abs=1e-3)
    assert told(trained(model=blocks()).sparsify, 0.) == []


# -- names for a split

@pytest.mark.parametrize('named', [{'2': 2, '5': 2}, {'2*': 2, 'fc': 2}, [2, 2]])
def test_a_split_takes_the_names_that_SplitNet_takes(named):
    one, two = (trained(SplitNet(named)) for _ in range(2))
    x = torch.rand(3, 1, 8, 8)
    told(one.split)
    told(two.split, named)
    assert torch.equal(one.model.eval()(x), two.model.eval()(x))
    assert one.model._split['groups'] == two.model._split['groups']
    by_chance = learner().split(named, classes='random')
    assert by_chance.model._split['splits'] == one.model._split['splits']
    dense = net().eval()
    small, masked = (f(dense, x, named, classes='random') for f in (split_model, masked_model))  # and the verbs on a model
    assert torch.allclose(small(x), masked(x), atol=1e-5)


def test_a_split_may_be_a_part_or_a_coarser_form_of_what_was_learned():
    learn = trained(SplitNet({'1': 2, '2': 4, '5': 4}, equal_groups=True))
    groups = learn.split_net.groups()
    told(learn.split, {'2': 2, '5': 4})
    had = learn.model._split['groups']
    assert had['5'] == groups['5'].tolist() and len(had) == 3
    other = trained(SplitNet({'2': 4, '5': 4}, equal_groups=True))
    coarse = [g//2 for g in other.split_net.groups()['5'].tolist()]
    told(other.split, {'5': 2})
    assert other.model._split['groups']['5'] == coarse
    with pytest.raises(ValueError, match='this: 2 of 1.0, 4 of 2.0, 4 of 5. There are: 2 of 2.0, 2 of 5.'): trained(SplitNet({'5': 2})).split({'2': 2, '5': 4})


def test_groups_of_equal_size_where_the_network_is_cut():
    learn = trained(SplitNet({'2': 2, '5': 2}))
    with torch.no_grad(): learn.model.split_net_logits.view(-1)[:8] += 9.  # all of the first space lean to one side
    uneven = {s: g.bincount(minlength=2).tolist() for s, g in learn.split_net.groups().items()}
    assert 0 in uneven['1.0']
    with pytest.raises(ValueError, match=r'equal_groups=True'): learn.split()
    assert {tuple(g.bincount().tolist()) for g in learn.split_net.groups(equal_groups=True).values()} == {(4, 4), (2, 2)}
    told(learn.split, equal_groups=True)
    assert {len(g): [g.count(0), g.count(1)] for g in learn.model._split['groups'].values()} == {8: [4, 4], 4: [2, 2]}
    with pytest.raises(ValueError, match='SplitNet'): learner().split({'5': 2}, classes='random', equal_groups=True)


def test_a_split_without_groups_says_what_can_be_pasted():
    learn = learner()
    with pytest.raises(ValueError) as e: learn.split({'2': 2, '5': 2})
    call = re.search(r'learn\.split\(.*?\)', str(e.value))[0]
    make = re.search(r'cbs=(SplitNet\(.*?\))', str(e.value))[1]
    learn.fit(1, cbs=eval(make))
    told(eval, call, dict(learn=learn))
    assert '_split' in learn.model.__dict__
    with pytest.raises(ValueError, match='Leave one of them out'): learner().split({'5': 2}, splits={'5': 2}, classes='random')


# -- evolutions under other methods

def residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = conv(8, 8), conv(8, 8)

        def forward(self, x): return x+self.conv2(self.conv1(x))
    return nn.Sequential(conv(1, 8), nn.Sequential(*[Block() for _ in range(3)]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def shared(learn, **kw): return learn.share_bases(shared_rank=4, groups={'all': ['1.1.conv1.0', '1.2.conv1.0']}, **kw)


# structure and callbacks under which generations are trained
UNDER = {
    'bases': (shared, lambda: []), 'bases and penalty': (shared, lambda: [OrthoReg()]),
    'bases without norm': (partial(shared, basis_norm=False), lambda: [OrthoReg()]),
    'bases and masks': (shared, lambda: [DynamicSparse(.5)]),
    'one weight': (lambda learn: learn.share_bases(mode='tie', groups={'all': ['1.1.conv1.0', '1.2.conv1.0']}), lambda: [OrthoReg()]),
    'masks': (None, lambda: [DynamicSparse(.5)]), 'prunes': (None, lambda: [IterativePrune(.5)]), 'slices': (None, lambda: [SliceTrain((1, .5))]),
    'sliced': (lambda learn: learn.slice(rates=(1, .5)), lambda: []), 'groups': (None, lambda: [SplitNet({'4': 2})]),
    'split': (lambda learn: learn.split({'1.2': 2, '4': 2}, classes='random'), lambda: []),
}


def under(name):
    learn, (before, cbs) = learner(residual()), UNDER[name]
    if before is not None: before(learn)
    return learn, cbs()


@pytest.mark.few(6)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', UNDER)
def test_an_evolution_evaluates_the_part_that_is_left_in_the_end(name):
    learn, cbs = under(name)
    log = learn.evolve(2, 1, cbs=cbs, file=None, policy=KELS({'*': .5}))
    assert len(log) == 2 and sum(r['reset'] for r in log) > 0
    learn.extract_slim()
    assert learn.validate()[0] == pytest.approx(log[-1]['slim_valid_loss'], rel=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['bases', 'bases and penalty', 'masks', 'sliced', 'split'])
def test_what_is_cut_out_is_what_began_anew(name):
    "The callback alike: no space of the plain network is cut that was whole while it was trained"
    learn, cbs = under(name)
    learn.add_cbs([*cbs, KnowledgeEvolution(policy=KELS({'*': .5}))])
    learn.fit(1)
    learn.fit(1)
    cut = learn.knowledge_evolution.lineage.forget.policy.cut
    wide = {n: p.shape for n, p in materialize(learn.model, sample_batch(learn.dls)).named_parameters() if p.ndim > 1}
    learn.extract_slim()
    now = {n: p.shape for n, p in learn.model.named_parameters() if p.ndim > 1}
    rows = {n for n in wide if now[n][0] < wide[n][0]}
    assert rows == {f'{p}.weight' for n in cut.keep for p in cut.cmap[n].producers}


@pytest.mark.parametrize('policy', ['kels', 'wels', 'head'])
def test_an_evolution_that_cannot_go_on_is_refused_before_it_trains(policy, tmp_path):
    learn = learner(path=tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match="weight: under dynamic_sparse .* compute='dense'"):
        learn.evolve(2, 1, policy=policy, cbs=DynamicSparse(.5, compute='csr'))
    assert learn.opt is None and not effects(learn.model) and not [*tmp_path.rglob('*.pth')]
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items()) and 'dynamic_sparse' not in learn.__dict__
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(learn.evolve(2, 1, policy=policy, cbs=DynamicSparse(.5, compute='dense'), file=None)) == 2  # the remedy


def test_forgetting_begins_at_a_layer_without_a_weight_of_its_own():
    learn = learner(residual())
    learn.share_bases(mode='tie', groups={'all': ['1.1.conv1.0', '1.2.conv1.0']})
    assert len(learn.evolve(2, 1, policy=LLF('1.2'), file=None)) == 2
