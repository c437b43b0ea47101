"""Pictures of splits show the numbers that they are of: checked against plans, masks and split models of other networks than those of the notebooks."""
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.callback.progress import ProgressCallback
from torch import nn

from paramfx.data.memory import tensor_dls
from paramfx.splitnet.split import Splitting, split_model
from paramfx.splitnet.plan import split_plan
from paramfx.splitnet.plots import SplitPlots, plot_assignments, plot_block_weights, plot_group_filters, sort_blocks, split_layers
from paramfx.splitnet.tree import plot_split_tree, split_widths
from paramfx.splitnet.callback import SplitNet
from test_split_model import NETS, resnet


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def learner(net, n=10, size=32):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, size, size, generator=g), torch.arange(16) % n
    return Learner(tensor_dls(x, y, x, y, bs=8, device='cpu', vocab=[f'kind {i}' for i in range(n)]), net, CrossEntropyLossFlat()).remove_cb(ProgressCallback)


def grouped(name, **kw):
    "A Learner of one of the test networks with scattered groups"
    build, splits = NETS[name]
    torch.manual_seed(0)
    learn = learner(build()).add_cb(SplitNet(splits, init_std=1., equal_groups=True, **kw))
    return learn, learn.split_net, splits


@pytest.mark.parametrize('name', ['resnet', 'hierarchy', 'densenet', 'flatten'])
def test_sorted_weights_are_blocks_of_the_mask(name):
    "By way of the mask that the split goes by"
    learn, cb, splits = grouped(name)
    plan = split_plan(learn.model, learn.dls.one_batch()[:1], splits)
    s = Splitting(plan, cb.groups())
    layers = split_layers(learn)
    assert [*layers] == plan.names
    for l in plan.layers:
        w = layers[l.name].weight
        got, rows, cols = sort_blocks(np.where(s.mask(l, torch.as_tensor(w)).numpy(), 1., 0.)*np.ones_like(w), *layers[l.name][1:])
        want = np.repeat(np.eye(l.groups), rows, 0).repeat(cols, 1)
        assert np.array_equal(got, want) and len(rows) == l.groups


def test_axes_are_labelled_and_share_a_scale():
    learn, cb, _ = grouped('resnet')
    layers = split_layers(learn)
    some = {n: layers[n] for n in [*layers][:2]}
    axs = plot_block_weights(some, {n: 3*l.weight for n, l in some.items()})
    assert axs.shape == (2, 2) and all(a.images[0].get_clim() == b.images[0].get_clim() for a, b in zip(*axs))
    again = plot_block_weights(some, axs=axs[1])  # drawn over
    assert again[0, 0] is axs[1, 0] and len(axs[0, 0].figure.axes) == 8
    with pytest.raises(ValueError, match='no weight before'): plot_block_weights(some, {})
    with pytest.raises(ValueError, match='4 axes are needed, not 2'): plot_block_weights(some, {n: l.weight for n, l in some.items()}, axs[0])
    with pytest.raises(ValueError, match="'conv1': no split layer"): split_layers(learn, ['conv1'])


def test_undecided_units_stay_grey():
    p = torch.tensor([[.5, .9, .2], [.5, .1, .8]])
    ax, = plot_assignments({'a': p}, {'a': 'xyz'})
    assert [t.get_text() for t in ax.get_xticklabels()] == ['y', 'x', 'z'] and ax.get_title() == 'a: 2 + 1 units'
    assert np.allclose(ax.images[0].get_array(), p[:, [1, 0, 2]])
    with pytest.raises(ValueError, match='at least one'): plot_assignments({})
    for n, want in ((8, '4 x 2 units'), (9, '4 groups of 2 to 3 units')):
        ax, = plot_assignments({'a': torch.eye(4)[torch.arange(n) % 4].T})
        assert ax.get_title() == f'a: {want}'


def test_colour_filters_stay_whole():
    "The published code reshapes kernels across channels: here each tile is a filter, seen as a picture"
    w = torch.randn(6, 3, 5, 4)
    ax = plot_group_filters(w, [0, 1, 1, 0, 1, 0], n=2)
    img = np.asarray(ax.images[0].get_array())
    for g, rows in enumerate(([0, 3, 5], [1, 2, 4])):
        best = sorted(rows, key=lambda i: -w[i].norm())[:2]
        for j, i in enumerate(best): assert np.allclose(img[6*g:6*g+5, 5*j:5*j+4], (.5+.5*w[i]/w[i].abs().max()).permute(1, 2, 0), atol=1e-6)
    assert img.shape == (11, 9, 3) and (img[5] == 1).all()


@pytest.mark.few(2)
@pytest.mark.parametrize('name', ['resnet', 'hierarchy', 'densenet'])
def test_classes_and_widths_before_and_after_the_split(name):
    learn, cb, splits = grouped(name)
    groups = cb.groups()
    classes, table = cb.effect.holder.classes, learn.class_groups()
    widths, layers = split_widths(learn), split_layers(learn)
    assert [*widths][-1] == classes and {*widths} == {*groups} and sorted(map(len, widths.values())) == [*map(len, widths.values())]
    for n, l in layers.items():
        if n in widths: assert widths[n] == np.bincount(l.outputs).tolist()  # as the layer that makes it is split
    assert len([s for s in widths if s in layers]) == len(widths)-1
    named = {c: r['group']-1 for r in table for c in r['names'].split(', ')}
    assert [named[f'kind {i}'] for i in range(10)] == groups[classes].tolist()
    learn.split()
    assert learn.class_groups() == table and split_widths(learn.model) == widths
    plot_split_tree(widths, [r['names'].split(', ') for r in table])


def test_levels_of_a_hierarchy():
    learn, cb, splits = grouped('hierarchy')
    levels = sorted({l.groups for l in cb.effect.holder.layers})
    table = learn.class_groups()
    assert len(levels) > 1 and len(table) == levels[-1]
    plan = split_plan(learn.model, learn.dls.one_batch()[:1], splits)
    for m in levels[:-1]: assert [r[f'of {m}']-1 for r in table] == plan.coarse(torch.arange(levels[-1]), levels[-1], m).tolist()
    assert [r['of 2'] for r in table] == [1, 1, 1, 1, 2]  # five groups are three, and these two
    ax = plot_split_tree(split_widths(learn))
    tops = [p.get_y()+p.get_height()/2 for p in ax.patches if type(p).__name__ == 'Rectangle'][1:3]
    assert tops == [3, .5]  # in the middle of four ends, and of the last


def test_live_pictures(tmp_path):
    learn = learner(resnet() if callable(resnet) else NETS['resnet'][0]())
    with pytest.raises(ValueError, match='no groups are learned'):
        with learn.no_logging(): learn.fit(1, 0., cbs=SplitPlots(tmp_path/'a.png'))
    learn, cb, _ = grouped('resnet')
    plots = SplitPlots(tmp_path/'a.png', every=2)
    seen = []
    plots._show, show = (lambda fig: (seen.append(learn.epoch), show(fig))), plots._show
    with learn.no_logging(): learn.fit(3, 1e-4, cbs=plots)
    assert seen == [1, 2] and (tmp_path/'a.png').stat().st_size > 1000
    pickle.loads(pickle.dumps(plots.figure))  # `learn.export` takes callbacks along
    n = len(seen)
    learn.validate(cbs=plots); learn.get_preds(cbs=plots)
    assert len(seen) == n
    with pytest.raises(ValueError, match='no split layer'):
        with learn.no_logging(): learn.fit(1, 1e-4, cbs=SplitPlots(tmp_path/'b.png', layer='conv1'))
    assert not (tmp_path/'b.png').exists()
    with pytest.raises(ValueError, match='every=0'): SplitPlots(every=0)


def test_a_split_network_has_no_blocks_to_sort():
    net, splits = NETS['resnet']
    torch.manual_seed(0)
    new = split_model(net(), torch.randn(2, 3, 32, 32), splits=splits, classes='random')
    assert sum(split_widths(new)[[*split_widths(new)][-1]]) == 10
    with pytest.raises(ValueError, match='split already'): split_layers(new)
    with pytest.raises(ValueError, match='no groups'): split_widths(nn.Linear(2, 2))
