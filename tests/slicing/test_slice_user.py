"Slicing as a user meets it: what one tool leaves is what the next one takes, and a slip is told with its remedy"
from functools import partial

import pandas as pd
import pytest
import torch
from fastai.basics import Learner, accuracy, set_seed
from fastai.data.block import CategoryBlock
from fastai.tabular.core import Categorify, FillMissing, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from torch import nn

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import paramfx.all, paramfx.report.plan # gives Learner the verbs  # noqa: F401
from contracts import build, quiet, same, small_net, snapshot
from paramfx.slicing.plan import slice_plan
from paramfx.slicing.serve import simulate_load
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.layers import Sliced
from paramfx.slicing.slice import Slicing, at_rate, name_slice, set_rate, slice_model

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
RATES = (1, .5, .25)


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


def test_a_report_serves(mk):
    learn = mk(SliceTrain(RATES))
    rep = learn.slice_report(repeats=1)
    secs = {r['rate']: r['latency_ms']/1000 for r in rep}
    runs = [simulate_load(t, 50, 1., duration=2) for t in (rep, secs)]
    assert runs[0].row == runs[1].row and runs[0].row['requests'] > 0
    with pytest.raises(ValueError, match='no latency'): simulate_load([dict(rate=1)], 50, 1., duration=2)


def test_a_file_with_a_named_slice_says_what_is_missing(mk):
    learn = mk(SliceTrain(RATES))
    name_slice(learn.model, 'mine', {'0.0': .5})
    learn.save('named')
    other = mk(SliceTrain(RATES), seed=3)
    state = snapshot(other.model)
    with pytest.raises(ValueError, match='1 named slice more than this model.*name_slice'): other.load('named')
    assert not same(snapshot(other.model), state)
    name_slice(other.model, 'mine', {'0.0': .5})
    other.load('named')
    x = torch.randn(4, 1, 8, 8)
    for r in (*RATES, 'mine'):
        with at_rate(other.model.eval(), r): a = other.model(x)
        with at_rate(learn.model.eval(), r): assert torch.equal(a, learn.model(x))


@pytest.mark.parametrize('kw', [dict(divisor=1000), dict(groups=1)])
def test_a_slice_that_takes_nothing_off_is_refused(mk, kw):
    net = small_net()
    state = snapshot(net)
    with pytest.raises(ValueError, match='no layer gets narrower'): slice_model(net, torch.zeros(1, 1, 8, 8), RATES, **kw)
    with pytest.raises(ValueError, match='no layer gets narrower'): mk(SliceTrain(RATES, slicing=Slicing(**kw)))
    assert not same(snapshot(net), state) and not any(isinstance(m, Sliced) for m in net.modules())


@pytest.mark.parametrize('rate,text', [(50, r'rate=50.*\(0, 1\]'), (.3, 'not prepared.*1.0, 0.5, 0.25'),
    ('half', 'no slice has this name'), ({}, 'at least one'), ({'nowhere': .5}, 'nowhere')])
def test_a_wrong_rate_changes_nothing(mk, rate, text):
    net = small_net()
    with pytest.raises(ValueError, match='not sliced.*slice_model'): set_rate(net, rate)
    slice_model(net, torch.zeros(1, 1, 8, 8), RATES)
    set_rate(net, .5)
    with pytest.raises(ValueError, match=text): set_rate(net, rate)
    assert slice_plan(net).key == .5 and [*slice_plan(net).keys] == [*RATES]


def test_equal_rates_are_one(mk):
    learn = mk(SliceTrain((1, .5, .5)))
    assert slice_plan(learn.model).rates == [1, .5]
    learn.fit(1)
    assert learn.recorder.metric_names.count('accuracy@0.5') == 1


@pytest.mark.parametrize('verb', ['recalibrate', 'validate_rates', 'slice_report', 'search_rates', 'export_slice'])
def test_verbs_of_a_learner_ask_for_slices_first(mk, verb):
    learn = mk()
    args = dict(search_rates=(1e3,), export_slice=(.5, 'a.pth')).get(verb, ())
    with pytest.raises(ValueError, match=r'not sliced.*learn.slice\('): getattr(learn, verb)(*args)


def test_plan_says_what_the_callback_does(mk):
    learn = mk()
    state = snapshot(learn.model)
    rows = learn.plan(SliceTrain(RATES))
    assert [r['rate'] for r in rows if 'rate' in r] == [*RATES] and not same(snapshot(learn.model), state)
    assert not any(isinstance(m, Sliced) for m in learn.model.modules())


class Words(nn.Module):
    "An embedding alone can be sliced, and only where one asks for it"
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(16, 8), nn.Linear(8, 4)
    def forward(self, x): return self.out(self.emb(x).mean(1))


def test_embeddings_by_the_callback_alone(tmp_path):
    from paramfx.data.memory import tensor_dls
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(16, (32, 5), generator=g), torch.randint(4, (32,), generator=g)
    dls = tensor_dls(x, y, x, y, bs=16, normalize=False, device='cpu')
    learn = lambda **kw: quiet(Learner(dls, Words(), metrics=accuracy, path=tmp_path, cbs=SliceTrain((1, .5), slicing=Slicing(**kw))))
    with pytest.raises(ValueError, match='Nothing to slice'): learn()
    one = learn(embeddings=True)
    one.fit(1)
    assert 'accuracy@0.5' in one.recorder.metric_names
    one.materialize(rate=.5)
    assert one.model.emb.weight.shape == (16, 4)


def test_tabular_learner_by_the_callback_alone(tmp_path):
    set_seed(0)
    n = 96
    df = pd.DataFrame(dict(kind=[['a', 'b', 'c'][i%3] for i in range(n)], size=torch.randn(n).tolist(), age=torch.rand(n).tolist()))
    df['y'] = [('yes' if k == 'a' or s > 0 else 'no') for k, s in zip(df.kind, df['size'])]
    dls = TabularDataLoaders.from_df(df, tmp_path, procs=[Categorify, FillMissing, Normalize],
        cat_names=['kind'], cont_names=['size', 'age'], y_names='y', y_block=CategoryBlock(),
                                     valid_idx=[*range(64, n)], bs=16, device=torch.device('cpu'))
    learn = quiet(tabular_learner(dls, layers=[32, 16], metrics=accuracy, path=tmp_path, cbs=SliceTrain(RATES)))
    learn.lr_find(num_it=20, show_plot=False)
    learn.fit(2)
    assert 'accuracy@0.25' in learn.recorder.metric_names
    rows = learn.validate_rates()
    assert rows[0]['params'] > rows[1]['params'] > rows[2]['params']
    with at_rate(learn.model, .25): narrow = learn.get_preds()[0]
    learn.export_slice(.25, 'tab.pkl')
    learn.materialize(rate=.25)
    assert torch.allclose(learn.get_preds()[0], narrow, atol=1e-6)
