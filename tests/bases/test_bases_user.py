"Shared bases as a user meets them: fastai's batches, pictures with many layers, a norm that is to stay, ResNeXt on a Learner"
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from fastai.basics import TensorCategory, params
from fastai.callback.training import BnFreeze
from fastai.vision.core import TensorImage
from matplotlib import pyplot as plt
from torch import nn

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import paramfx.report.plan # gives Learner plan  # noqa: F401
from contracts import build, quiet, same, snapshot
from paramfx.bases import plots as bp
from paramfx.experiments import cli
from paramfx.zoo import networks as nets
from paramfx.bases.callback import OrthoReg
from paramfx.bases.share import Calibrated, share_bases
from paramfx.bases.layers import sharing_layers
from paramfx.bases.join import join_bases
from test_bases import block_net

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path, model=block_net)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def drawn(ax):
    ax.figure.savefig(BytesIO(), format='png')
    return ax
def boxes(texts): return [t.get_window_extent() for t in texts if t.get_visible() and t.get_text()]
def apart(bs): return not any(a.overlaps(b) for i, a in enumerate(bs) for b in bs[i+1:])


# -- a norm that is to stay
def norms(learn): return [m.norm for m in sharing_layers(learn.model).values()]
def states(ns): return [[v.clone() for v in n.state_dict().values()] for n in ns]
def equal(a, b): return all(torch.equal(x, y) for s, t in zip(a, b) for x, y in zip(s, t))


@pytest.mark.parametrize('opt', [False, True])
def test_a_calibrated_norm_can_be_kept(mk, opt):
    learn = mk()
    if opt: learn.create_opt()
    learn.share_bases(shared_rank=6, init='svd', basis_norm='calibrated')
    for n in norms(learn): n.requires_grad_(False)
    was, coeff, bn = states(norms(learn)), [*sharing_layers(learn.model).values()][0].coeff.detach().clone(), [m
        for m in learn.model.modules() if type(m) is nn.BatchNorm2d and m not in norms(learn)][0]
    mean = bn.running_mean.clone()
    with quiet(learn): learn.fit(2, cbs=[BnFreeze(), OrthoReg()])
    assert equal(states(norms(learn)), was)
    assert not torch.equal([*sharing_layers(learn.model).values()][0].coeff, coeff) and not torch.equal(bn.running_mean, mean)


def test_without_bnfreeze_statistics_move_and_fine_tune_wakes(mk):
    "What the lesson warns of"
    learn = mk(splitter=params)
    learn.share_bases(shared_rank=6, init='svd', basis_norm='calibrated')
    for n in norms(learn): n.requires_grad_(False)
    was = states(norms(learn))
    with quiet(learn): learn.fit(1)
    assert not equal(states(norms(learn)), was) and not any(n.weight.requires_grad for n in norms(learn))
    learn.unfreeze()
    assert all(n.weight.requires_grad for n in norms(learn))


# -- pictures
@pytest.fixture(scope='module')
def many():
    "24 layers of one basis, and names as long as DenseNet's"
    net = block_net(3, blocks=13)
    share_bases(net, torch.zeros(1, 3, 16, 16), shared_rank=4)
    return net


def test_use_grads_of_a_fastai_batch(many):
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    want, got = bp.use_grads(many, x, y), bp.use_grads(many, TensorImage(x), TensorCategory(y))
    assert all(torch.equal(a, b) and type(b) in (torch.Tensor, nn.Parameter) for k in want for a, b in zip(want[k].values(), got[k].values()))


def test_names_and_ticks_do_not_touch(many):
    fs = bp.stage_filters(many)
    (k, parts), = fs.items()
    assert len(parts) == 25
    ax = drawn(bp.plot_cosines(parts))
    names = boxes(ax.get_yticklabels())
    assert len(names) > 5 and apart(names) and min(b.x0 for b in names) >= 0
    ax = drawn(bp.plot_cosines({'shared': torch.randn(16, 9), 'layer 1': torch.randn(1, 9), 'layer 2': torch.randn(1, 9)}))
    assert len(ax.get_yticklabels()) == 3 and min(b.x0 for b in boxes(ax.get_yticklabels())) >= 0  # was cut off at the left
    ax = drawn(bp.plot_use_grads({k: dict(enumerate(np.linspace(1, 9, 24)))}))
    assert apart(boxes(ax.get_xticklabels())) and not any('10^' in t.get_text() for t in ax.get_yticklabels(which='both'))


def test_gaps_between_kernels_are_no_small_weights():
    ax = drawn(bp.plot_filters(torch.full((2, 2, 3, 3), 1e-9)))
    gap = ax.images[0].cmap.get_bad()[:3]
    assert np.abs(gap-np.array(ax.images[0].cmap(.5)[:3])).min() > .1
    assert ax.images[0].colorbar.ax.get_ylabel() == 'weight'


@pytest.mark.parametrize('eps', [0, 1e-7, 1e-3])
def test_rounding_is_no_spread_of_lengths(eps):
    ax = drawn(bp.plot_row_norms({'a': 1+eps*torch.linspace(-1, 1, 5), 'b': torch.ones(3)}, dict(b=.99)))
    assert ax.xaxis.get_offset_text().get_text() == '' and .0999 <= np.diff(ax.get_xlim())[0] < .11
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {'filters', 'balance'}  # the first group has no balance


@pytest.mark.parametrize('norm', ['global', 'group', 'sum'])
def test_settled_norms_by_hand(norm):
    net = nets.resnet_cifar(20)
    share_bases(net, torch.zeros(1, 3, 16, 16), shared_rank=4, unique_rank=1, n_bases=2)
    fs, wd = bp.stage_filters(net), 1e-2
    assert [*fs['layer1']][:2] == ['basis 1', 'basis 2'] and all(len(v) == 6 for v in fs.values())
    entries = {k: (8*s)*(8*s+4*s)+4*s*s for k, s in (('layer1', 1), ('layer2', 2), ('layer3', 4))}
    for k, n in entries.items():
        count = dict(sum=1, group=n)[norm] if norm != 'global' else sum(entries.values())
        assert abs(bp.settled_norms(net, wd, 5., True, norm)[k]-max(0, 1-wd*count/20)**.5) < 1e-12
    with pytest.raises(ValueError, match="norm='mean'"): bp.settled_norms(net, wd, norm='mean')


# -- ResNeXt
def small():
    net = nets.resnet((2, 3, 3), 10, bottleneck=True, stem=3, first=16, groups=4, base_width=16)
    net.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    return net


@pytest.mark.parametrize('frozen', [False, True])
def test_join_bases_on_a_learner(mk, frozen):
    learn = mk(model=small, splitter=lambda m: [params(m.conv1)+params(m.layer1),
        [p for n, p in m.named_parameters() if not n.startswith(('conv1', 'layer1'))]])
    state = snapshot(learn.model)
    assert [r['stage'] for r in learn.plan('join_bases', shared_rank=8, unique_rank=4)] == ['layer2', 'layer3'] and not same(snapshot(learn.model), state)
    if frozen: learn.freeze()
    learn.join_bases(shared_rank=8, unique_rank=4)
    w = learn.model.layer2[2].conv2.shared.weight
    old, stem = w.detach().clone(), learn.model.conv1.weight.detach().clone()
    with quiet(learn): learn.fit(1, cbs=OrthoReg())
    assert not torch.equal(w, old) and torch.equal(stem, learn.model.conv1.weight) == frozen
    assert [r['blocks'] for r in learn.paramfx['join_bases']] == [2, 2]


def test_join_bases_refuses_before_it_changes(mk):
    learn = mk(model=small, splitter=lambda m: [params(m.layer3[2]), [p for n, p in m.named_parameters() if not n.startswith('layer3.2')]])
    state = snapshot(learn.model)
    with pytest.raises(ValueError, match='layer3.2.conv2: in parameter group 0.*keep stages whole'): learn.join_bases(shared_rank=8, unique_rank=4)
    net = small()
    net.layer3[2].conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match='layer3.2.conv2: its channels'): join_bases(net, torch.zeros(1, 1, 16, 16), 8, 4)
    assert not same(snapshot(learn.model), state) and type(net.layer2[1].conv2) is nn.Conv2d


def test_cost_of_resnext_with_one_rank(capsys):
    assert cli.main(['cost', 'cifar100/resnext50_32x4d', '--shared-rank', '64']) == 0  # the published row
    assert '19,333,380' in capsys.readouterr().out


def test_splitnet_says_that_the_weight_is_computed(mk):
    "It named every bias of the network"
    from paramfx.splitnet.callback import SplitNet
    learn = mk()
    learn.share_bases(shared_rank=6)
    name = [*sharing_layers(learn.model)][-1]
    with pytest.raises(ValueError, match='its weight is computed.*materialize'): learn.plan(SplitNet({name: 2}))


# -- what calibration leaves behind, and what it refuses
def test_norms_calibrated_on_typed_images_are_plain_and_load(mk):
    "Batches of a vision Learner are TensorImages: they once made such of the norms' statistics, and the file could not be read"
    learn = mk()
    x = TensorImage(torch.randn(8, *learn.dls.one_batch()[0].shape[1:]))
    learn.share_bases(shared_rank=6, init='svd', basis_norm=Calibrated([x]))
    assert all(type(t) in (torch.Tensor, nn.Parameter) for t in [*learn.model.buffers(), *learn.model.parameters()])
    assert norms(learn)[0].running_var.std() > 0
    f = BytesIO()
    torch.save(learn.model.state_dict(), f)
    f.seek(0)
    same({**torch.load(f, weights_only=True)}, {**learn.model.state_dict()})


def test_batches_that_do_not_run_are_named(mk):
    learn = mk()
    was, x = snapshot(learn.model), learn.dls.one_batch()[0]
    with pytest.raises(ValueError, match=r'batches\[1\] does not run through the model: .*Give inputs'):
        learn.share_bases(init='svd', basis_norm=Calibrated([x, x[:, :, 0]]), shared_rank=6)
    same(snapshot(learn.model), was)


def test_bases_of_a_stage_are_numbered_and_reasons_come_once(mk):
    net = block_net()
    x = mk().dls.one_batch()[0][:1]
    names = {r.get('group') for r in share_bases.plan(net, x, shared_rank=6, n_bases=2)} - {None}
    assert {n.rpartition(', ')[2] for n in names} == {'basis 1', 'basis 2'}
    assert {r.get('group') for r in share_bases.plan(net, x, shared_rank=6)} - {None} == {n.rpartition(', ')[0] for n in names}
    with pytest.raises(ValueError) as e: share_bases(net, x, shared_rank=200)
    assert str(e.value).count('72 dimensions') == 1
    share_bases(net, x, shared_rank=6)
    with pytest.raises(ValueError, match=r'Nothing to share: [^;]*\(it shares filters already\)'): share_bases(net, x, shared_rank=6)


def test_a_join_that_the_splitter_does_not_know_leaves_all_as_it_was(tmp_path):
    net = lambda: nets.resnet((2, 3), 4, bottleneck=True, stem=3, first=16, groups=4, base_width=16)
    split = lambda m: [[*m.parameters()]] if type(m.layer2[1].conv2) is nn.Conv2d else 1/0
    learn = build(tmp_path, model=net, splitter=split)
    x = torch.randn(2, 3, 16, 16)
    learn.create_opt()
    was, opt, mods = snapshot(learn.model), learn.opt, [*learn.model.modules()]
    with pytest.raises(ZeroDivisionError): learn.join_bases(x, shared_rank=8, unique_rank=4)
    same(snapshot(learn.model), was)
    assert learn.opt is opt and [*learn.model.modules()] == mods and '_recipe' not in learn.model.__dict__
