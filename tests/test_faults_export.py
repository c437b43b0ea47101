"Exporting a live network says what it carries, and names `materialize`; after it there is nothing to say."
import warnings

import pytest
import torch
from fastai.basics import Datasets, Learner, load_learner
from torch import nn

from paramfx.all import DynamicSparse, RunState, SliceTrain, share_bases, slice_model, tie_weights, materialize


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def told(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in seen if 'paramfx is installed' in str(w.message) or 'Export what' in str(w.message)]


LIVE = dict(sliced=lambda m, x: slice_model(m, x), bases=lambda m, x: share_bases(m, x, 4, groups={'a': ['3', '5']}), tied=lambda m, x: tie_weights(m, .5))


@pytest.mark.parametrize('kind', LIVE)
def test_a_live_network_tells_when_it_is_exported(kind):
    model, x = net(), torch.randn(2, 3, 8, 8)
    LIVE[kind](model, x)
    said = told(lambda: torch.export.export(model, (x,)))
    assert said and all('`model = materialize(model, x)`' in s for s in said)
    assert not told(lambda: model(x)) and not told(lambda: model.train()(x))
    model = materialize(model.eval(), x)
    assert not told(lambda: torch.export.export(model, (x,)))


def picture(i): return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))
def label(i): return torch.tensor(i % 4)


def learner(tmp_path, cbs=None):
    dsets = Datasets([*range(16)], [[picture], [label]], splits=[[*range(8)], [*range(8, 16)]])
    learn = Learner(dsets.dataloaders(bs=8, num_workers=0), net(), loss_func=nn.CrossEntropyLoss(), path=tmp_path, cbs=cbs)
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ in ('Recorder', 'ProgressCallback')])
    return learn


@pytest.mark.parametrize('cb,name', [(lambda: DynamicSparse(.5), 'DynamicSparse'), (lambda: SliceTrain((1, .5)), 'SliceTrain')])
def test_an_export_under_an_effect_names_the_way_out(cb, name, tmp_path):
    learn = learner(tmp_path, cb())
    said = told(lambda: learn.export('a.pkl'))
    assert len(said) == 1 and said[0].startswith('a.pkl will load only where paramfx is installed') and name in said[0] and '`learn.materialize()`' in said[0]
    learn.materialize()
    assert not told(lambda: learn.export('a.pkl'))
    assert isinstance(load_learner(tmp_path/'a.pkl'), Learner)


def test_a_callback_alone_is_named(tmp_path):
    learn = learner(tmp_path, RunState('run'))
    said = told(lambda: learn.export('a.pkl'))
    assert len(said) == 1 and 'RunState' in said[0] and 'materialize' not in said[0]


def test_export_slice_leaves_the_way_out_behind(tmp_path):
    pytest.importorskip('onnxscript')
    import onnx
    learn = learner(tmp_path)
    learn.slice()
    assert not told(lambda: learn.export_slice(.5, 'a.onnx'))
    graph = onnx.load(tmp_path/'a.onnx').graph
    assert not [n for n in graph.node if n.op_type == 'Slice']
    assert max(i.dims[0] for i in graph.initializer if len(i.dims) == 4) == 4
