"Slips of people who use slicing together with something else: each is told at once, or does what it says"
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import paramfx.all # gives Learner the verbs  # noqa: F401
from contracts import build, small_net
from paramfx.channels.cuts import Cut
from paramfx.channels.trace import trace_channels
from paramfx.export.materialize import materialize
from paramfx.sparse.callback import DynamicSparse
from paramfx.slicing.plan import slice_plan
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.rates import RateDraw
from paramfx.slicing.layers import Sliced
from paramfx.slicing.slice import at_rate, name_slice, plan_slices, set_rate, slice_model, unslice

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
RATES = (1, .5, .25)
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


def sliced(rates=RATES, seed=0, **kw):
    torch.manual_seed(seed)
    net = small_net().eval()
    slice_model(net, X, rates, **kw)
    return net


class Two(nn.Module):
    "Two networks in one, each sliced for itself"
    def __init__(self):
        super().__init__()
        self.a, self.b = sliced(), sliced((1, .75, .25), seed=1)
    def forward(self, x): return self.a(x)+self.b(x)


def test_parts_at_rates_of_their_own_materialize():
    net = Two().eval()
    set_rate(net.a, .5)
    set_rate(net.b, .75)
    new = materialize(net, X)
    assert torch.equal(new(X), net(X)) and not any(isinstance(m, Sliced) for m in new.modules())
    assert (new.a[0][0].out_channels, new.b[0][0].out_channels) == (4, 6)
    assert materialize(net, X, rate=.25).b[0][0].out_channels == 2
    with pytest.raises(ValueError, match='not prepared'): materialize(net, X, rate=.5)


def test_a_sliced_model_is_not_cut_under_its_slices():
    net = sliced()
    cut = Cut(trace_channels(net, X), {'0.0': np.array([0, 2, 7])})
    with pytest.raises(ValueError, match='sliced.*materialize.*unslice'): cut.apply(net)
    with at_rate(net, .5): assert torch.equal(net(X), materialize(sliced(), X, rate=.5)(X))
    assert cut.apply(unslice(net))[0][0].out_channels == 3


@pytest.mark.parametrize('rate', [.5, .25])
def test_a_trace_sees_the_whole_at_any_rate(rate):
    net = sliced()
    want = [(s.name, s.channels) for s in trace_channels(net, X)]
    set_rate(net, rate)
    assert [(s.name, s.channels) for s in trace_channels(net, X)] == want == [('0.0', 8), ('0.3', 12), ('1.2', 10)]
    with at_rate(net, .5): assert [(s.name, s.channels) for s in trace_channels(net, X)] == want
    assert slice_plan(net).key == rate


def test_norms_replaced_after_slicing_are_told_of(mk):
    learn = mk(SliceTrain(RATES))
    learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)  # what `learn.to_distributed` does
    with pytest.raises(ValueError, match=r'0\.1 \(SyncBatchNorm\).*sync_bn=False'): learn.fit(1)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(small_net()).eval()
    slice_model(first, X, RATES)
    with at_rate(first, .5): a = first(X)
    assert torch.equal(a, materialize(first, X, rate=.5)(X))


def test_taylor_needs_gradients_that_say_something(mk):
    learn = mk()
    learn.fit(1)  # which leaves zeros
    for f in (partial(learn.slice, rates=RATES, sort='taylor'), lambda: plan_slices(learn.model, X, RATES, sort='taylor')):
        with pytest.raises(ValueError, match="taylor.*zero.*l1"): f()
    net = small_net()
    net[0][:2].requires_grad_(False)
    net(X).sum().backward()
    with pytest.raises(ValueError, match=r"^0\.0: .*no gradients.*Unfreeze.*l1"): slice_model(net, X, RATES, sort='taylor', norm='gn', groups=4)
    assert not any(isinstance(m, (Sliced, nn.GroupNorm)) for m in net.modules())
    slice_model(net, X, RATES, sort='taylor', only='0.3')
    assert slice_plan(net).spaces == ['0.3']


def test_no_rate_is_no_answer():
    net = set_rate(sliced(), .5)
    with pytest.raises(ValueError, match='rate=None'): set_rate(net, None)
    with pytest.raises(ValueError, match='rate=None'):
        with at_rate(net, None): pass
    assert slice_plan(net).key == .5


@pytest.mark.parametrize('r', [.1+.2, np.float32(.3), np.float64(.3), np.float16(.3)])
def test_noise_in_a_rate(r):
    net = sliced((sum([.1]*3+[.7]), r))
    assert slice_plan(net).rates == [1, .3]
    set_rate(net, .3)
    set_rate(net, r)
    set_rate(net, 1+2e-16)


@pytest.mark.parametrize('rates', [np.array([1, .5]), torch.tensor([1, .5]), (1, torch.tensor(.5))])
def test_arrays_of_rates_are_refused_with_a_remedy(rates):
    with pytest.raises(ValueError, match='numbers of Python.*tolist'): sliced(rates)
    with pytest.raises(ValueError, match='numbers of Python.*tolist'): SliceTrain(rates)


def test_several_rates_go_by_a_name():
    net = sliced()
    with pytest.raises(ValueError, match='name_slice'): materialize(net, X, rate={'0.0': .5})
    name_slice(net, 'mine', {'0.0': .5})
    assert materialize(net, X, rate='mine')[0][0].out_channels == 4


def test_tools_told_nothing_say_so(mk):
    learn = mk(SliceTrain(RATES))
    for f in (learn.recalibrate, learn.validate_rates, learn.slice_report):
        with pytest.raises(ValueError, match='at least one rate'): f(rates=())
    for n in (0, 1.5, None, 'a', True):
        with pytest.raises(ValueError, match='n_batches.*whole number'): learn.recalibrate(n_batches=n)
    for probs in ('a', (1, 'a', 1), (1, None, 1)):
        with pytest.raises(ValueError, match='^probs=.*number for each of the rates 1, 0.5, 0.25'): SliceTrain(RATES, schedule=RateDraw(probs=probs))


def test_an_effect_that_comes_too_early_tells_the_order(mk):
    with pytest.raises(ValueError, match='SliceTrain goes first'): mk([DynamicSparse(.5), SliceTrain(RATES)])
    mk([SliceTrain(RATES), DynamicSparse(.5)]).fit(1)


def test_no_rates_are_those_it_is_sliced_at(mk):
    learn = mk(SliceTrain(RATES))
    learn.fit(1)
    learn.plan(SliceTrain())
    learn.fit(1, cbs=SliceTrain())
    with pytest.raises(ValueError, match='other settings'): learn.add_cb(SliceTrain((1, .75)))
    with pytest.raises(ValueError, match='other settings.*seed'): learn.add_cb(SliceTrain(schedule=RateDraw(seed=3)))
