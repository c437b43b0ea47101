"""Recurrent layers and language models at every rate: the second route is a layer of `torch.nn` with gate blocks cut by hand."""
import json
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fastai.basics import Adam, CrossEntropyLossFlat, DataLoaders, Learner, L
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.text.models import AWD_LSTM, get_language_model, get_text_classifier
from fastai.text.models.awdlstm import awd_lstm_clas_config, awd_lstm_lm_config
from torch import nn

from benchmarks.slicing import slice_lm
from nets import Net, fill, numbers
from paramfx.channels.trace import trace_channels
from paramfx.export.materialize import Recipe, load_recipe, materialize
from paramfx.slicing.layers import Sliced
from paramfx.slicing.slice import at_rate, name_slice, set_rate, slice_model, unslice
from paramfx.zoo.networks import LSTMLM

RATES = (1, .75, .5, .25)
CELLS = dict(LSTM=nn.LSTM, GRU=nn.GRU, RNN=nn.RNN)
SHAPES = [(1, False, True), (2, False, False), (1, True, True), (2, True, True)]


def words(*shape, n=30, seed=1): return torch.randint(2, n, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(rnn, i, h):
    "The layer with `i` inputs and `h` units: the first rows of each gate block, the first columns"
    ways, gates = 1+rnn.bidirectional, rnn.weight_hh_l0.shape[0]//rnn.hidden_size
    small = type(rnn)(i, h, rnn.num_layers, bias=rnn.bias, batch_first=rnn.batch_first, bidirectional=rnn.bidirectional).double()
    with torch.no_grad():
        for n, p in small.named_parameters():
            w = torch.stack([b[:h] for b in getattr(rnn, n).chunk(gates)])
            if n.startswith('weight_hh'): w = w[..., :h]
            elif n.startswith('weight_ih_l0'): w = w[..., :i]
            elif n.startswith('weight_ih'): w = w.unflatten(-1, (ways, -1))[..., :h].flatten(-2) # what each direction hands out
            p.copy_(w.flatten(0, 1))
    return small


def stack(kind, layers, both, bias):
    "Linear, recurrent, linear"
    m = CELLS[kind](8, 12, layers, bias=bias, bidirectional=both, batch_first=True)
    return fill(Net(lambda s, x: s.o(s.m(s.a(x))[0]), dict(a=nn.Linear(3, 8), m=m, o=nn.Linear(12*(1+both), 2))))


@pytest.mark.parametrize('layers,both,bias', SHAPES)
@pytest.mark.parametrize('kind', CELLS)
def test_every_rate_equals_a_layer_cut_by_hand(kind, layers, both, bias):
    net, x = stack(kind, layers, both, bias), numbers(2, 5, 3)
    whole, ref = deepcopy(net), net(x)
    slice_model(net, x, RATES)
    assert torch.equal(net(x), ref)
    for r in RATES:
        i, h = int(8*r), int(12*r)
        small, ways = by_hand(whole.m, i, h), 1+both
        y, states = small(whole.a(x)[..., :i])
        w = whole.o.weight.unflatten(-1, (ways, -1))[..., :h].flatten(-2)
        want = y @ w.T+whole.o.bias
        for grad in (True, False):
            with at_rate(net, r), torch.set_grad_enabled(grad):
                assert (net(x)-want).abs().max() < 1e-12
                assert net.m.hidden_size == h and net.m.input_size == i
                got = net.m(net.a(x))
        for a, b in zip(L(got[1]) if kind != 'LSTM' else got[1], L(states) if kind != 'LSTM' else states): assert (a-b).abs().max() < 1e-12
        plain = materialize(net, x, rate=r)
        with at_rate(net, r): assert torch.equal(plain(x), net(x))
        assert type(plain.m) is CELLS[kind] and {n: p.shape for n, p in plain.m.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
        check_gradients(net, small, x, r, h, layers)
    unslice(net)
    assert type(net.m) is CELLS[kind] and torch.equal(net(x), ref)


def check_gradients(net, small, x, r, h, layers):
    "Inside those of the layer cut by hand, outside exactly zero"
    net.zero_grad()
    with at_rate(net, r):
        net(x).square().sum().backward()
        plain = materialize(net, x, rate=r)
    plain.zero_grad()
    plain(x).square().sum().backward()
    gates = small.weight_hh_l0.shape[0]//h
    for n, p in plain.m.named_parameters():
        full = net.m._parameters[n].grad
        blocks, mine = full.unflatten(0, (gates, -1)), p.grad.unflatten(0, (gates, -1))
        assert not blocks[:, h:].any(), n
        inside = blocks[:, :h]
        if n.startswith(('weight_hh', 'weight_ih_l0')):
            assert not inside[..., mine.shape[-1]:].any(), n
            inside = inside[..., :mine.shape[-1]]
        elif n.startswith('weight_ih'):
            ways = full.shape[1]//12
            assert not inside.unflatten(-1, (ways, 12))[..., h:].any(), n
            inside = inside.unflatten(-1, (ways, 12))[..., :h].flatten(-2)
        assert (inside-mine).abs().max() < 1e-12 and mine.any(), n


@pytest.mark.parametrize('rate', RATES[1:])
def test_what_is_outside_is_never_read(rate):
    net, x = stack('LSTM', 2, True, True), numbers(2, 5, 3)
    slice_model(net, x, RATES)
    with at_rate(net, rate), torch.no_grad():
        y = net(x)
        net.zero_grad()
    with at_rate(net, rate): net(x).sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2: p[p.grad == 0] = float('nan')
        with at_rate(net, rate): assert torch.equal(net(x), y)
        assert net(x).isnan().all()


def test_states_of_another_rate_are_refused():
    net, x = fill(Net(lambda s, x, *h: s.m(x, *h), dict(m=nn.LSTM(3, 8)))), numbers(5, 2, 3)
    net = Net(lambda s, x: s.o(s.m(x, s.last)[0]), dict(m=nn.LSTM(3, 8), o=nn.Linear(8, 2), last=None)).double()
    slice_model(net, x, (1, .5))
    net.last = net.m(x)[1]
    net(x)
    with at_rate(net, .5), pytest.raises(ValueError, match=r'LSTM: a state of shape \[1, 2, 8\] does not fit \[1, 2, 4\] at slice 0.5.*reset'): net(x)
    with at_rate(net, .5):
        net.last = None
        net(x)


def test_one_number_serves_what_shares_it():
    cmap = trace_channels(AWD_LSTM(30, 8, 12, 3).eval(), words(2, 5))
    assert [(s.name, s.size, s.producers) for s in cmap.cuttable] == [('rnns.0.module', 12, ['rnns.0.module', 'rnns.1.module'])]
    small = cmap.cut(.5).apply(AWD_LSTM(30, 8, 12, 3).eval())
    assert small.n_hid == 6 and small.rnns[0].module.hidden_size == 6 and small.rnns[0].weight_hh_l0_raw.shape == (24, 6)
    small.reset()
    assert [h[0].shape[-1] for h in small.hidden] == [6, 6, 8]


# language models ---------------------------------------------------------------------------------------------------------------

def awd(tie=True, bidir=False, drop=1.):
    torch.manual_seed(0)
    model = get_language_model(AWD_LSTM, 30, {**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 12, 'tie_weights': tie, 'bidir': bidir}, drop).double().eval()
    model.reset() # its states are no buffers
    return model

def own(**kw):
    torch.manual_seed(0)
    return LSTMLM(30, 8, **kw).double().eval()

MODELS = dict(awd=(awd, {}), awd_untied=(lambda: awd(False), {}), awd_both_ways=(lambda: awd(True, True), {}),
    own=(own, dict(embeddings=True)), two_layers=(lambda: own(n_layers=2), dict(embeddings=True)),
              untied=(lambda: own(n_hidden=12, tie=False), {}), all_of_it=(lambda: own(n_hidden=12, tie=False), dict(embeddings=True)))

def first(o): return o[0] if isinstance(o, tuple) else o


class Beginner(nn.Module):
    "Begins anew by itself, in its forward pass, where the number of texts changes"
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.b, self.bs = nn.Linear(3, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2), 1
        self.reset()
    def reset(self): self.h = torch.zeros(1, self.bs, self.rnn.hidden_size)
    def forward(self, x):
        if len(x) != self.bs:
            self.bs = len(x)
            self.reset()
        y, self.h = self.rnn(self.a(x).relu(), self.h)
        return self.b(y)


@pytest.mark.parametrize('rates', [(.5, 1, .25), (1, .5, .25), (.25, .5, 1)])
@torch.no_grad()
def test_a_model_that_resets_itself(rates):
    "At any rate first, and with another number of texts later"
    torch.manual_seed(0)
    model = Beginner().eval()
    slice_model(model, torch.randn(1, 5, 3), (1, .5, .25))
    plain = {r: materialize(model, torch.randn(1, 5, 3), rate=r) for r in rates}
    for m in (model, *plain.values()): m.reset()
    for n in (4, 2):
        for k in range(2):
            x = torch.randn(n, 5, 3)
            for r in rates:
                if k == 0: model.reset(), plain[r].reset()
                with at_rate(model, r): assert torch.equal(model(x), plain[r](x)), (n, r, k)
            if k == 0: # the reset of a wider one was one for all: those that ran before it begin anew
                for r in rates[:-1]: plain[r].reset()


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_language_models_at_every_rate(name):
    "Three batches with a carried state, at all rates in turn, equal three batches of each plain network"
    make, kw = MODELS[name]
    model, xs = make(), words(4, 21).split(7, 1)
    ref = deepcopy(model)
    ref.reset()
    want = [first(ref(x)) for x in xs]
    slice_model(model, xs[0][:1], RATES, **kw)
    plain = {r: materialize(model, xs[0], rate=r) for r in RATES}
    sizes = [sum(p.numel() for p in plain[r].parameters()) for r in RATES]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 4
    assert not any(isinstance(m, Sliced) for m in plain[.5].modules())
    for m in (model, *plain.values()): m.reset()
    for k, x in enumerate(xs):
        for r in RATES:
            with at_rate(model, r): got = first(model(x))
            assert torch.equal(got, first(plain[r](x))), (r, k)
            if r == 1: assert torch.equal(got, want[k])
    model.reset()
    for r in RATES:
        with at_rate(model, r): again = first(model(xs[0]))
        plain[r].reset()
        assert torch.equal(again, first(plain[r](xs[0])))


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_each_slice_has_a_state_of_its_own(name):
    "What was read at one rate changes nothing at another, batches of another size go on, copies keep all, unslice takes all out"
    make, kw = MODELS[name]
    model, x = make(), words(4, 7)
    slice_model(model, x, RATES, **kw)
    model.reset()
    with at_rate(model, .5): a = first(model(x)); b = first(model(x))
    assert not torch.equal(a, b)
    model.reset()
    with at_rate(model, .5): first(model(x))
    for r in (1, .25): 
        with at_rate(model, r): model(x)
    other = pickle.loads(pickle.dumps(deepcopy(model)))
    with at_rate(model, .5):
        assert torch.equal(first(model(x)), b)
        for n in (2, 3, 4): assert first(model(x[:n])).shape[0] == n
    with at_rate(other, .5): assert torch.equal(first(other(x)), b if name.startswith('awd') else a) # copies of LSTMLM begin afresh
    unslice(model)
    model.reset()
    ref = make()
    ref.reset()
    assert torch.equal(first(model(x)), first(ref(x))) and type(model) is type(ref)


@torch.no_grad()
def test_a_warm_model_is_sliced_and_left_as_warm():
    model, x = awd(), words(4, 7)
    model(x)
    ref = deepcopy(model)
    slice_model(model, words(2, 3), RATES)
    assert torch.equal(first(model(x)), first(ref(x)))
    set_rate(model, .5)
    plain = materialize(model, x)
    assert plain[0].n_hid == 6
    assert torch.equal(first(plain(x)), first(model(x)))


def test_weights_are_dropped_at_every_rate():
    "In training, WeightDropout draws anew for what the slice has"
    model, x = awd(), words(4, 7)
    slice_model(model, x, RATES)
    model.train()
    for r in RATES:
        with at_rate(model, r): a, b = first(model(x)), first(model(x))
        assert not torch.equal(a, b)
        model.zero_grad()
        a.sum().backward()
        g = model[0].rnns[0]._parameters['weight_hh_l0_raw'].grad.view(4, 12, 12)
        h = int(12*r)
        assert g[:, :h, :h].any() and not g[:, h:].any() and not g[:, :, h:].any()
    plain = materialize(model, x, rate=.5)
    inner = plain[0].rnns[0]
    assert inner.module.flatten_parameters.__self__ is inner and len(pickle.dumps(plain)) < len(pickle.dumps(model))


def test_recipes_make_them_again(tmp_path):
    for make, kw in MODELS.values():
        model, x = make(), words(4, 7)
        slice_model(model, x, RATES, **kw)
        slim = materialize(model, x, rate=.5)
        again = load_recipe(Recipe.of(slim), make())
        again.load_state_dict(slim.state_dict())
        for m in (slim, again): m.eval().reset()
        assert torch.equal(first(slim(x)), first(again(x)))


def test_tied_matrices_stay_tied():
    model, x = own(), words(4, 7)
    with pytest.raises(ValueError, match='Nothing to slice.*embeddings=True'): slice_model(model, x)
    table = slice_model(model, x, RATES, embeddings=True)
    slim = materialize(model, x, rate=.5)
    assert slim.out.weight is slim.emb.weight and slim.emb.weight.shape == (30, 4) and (slim.emb.embedding_dim, slim.out.in_features) == (4, 4)
    assert table[2]['params'] == sum(p.numel() for p in slim.parameters()) == 30*4+30+4*4*(4+4)+2*4*4


def test_named_slices_and_only():
    model, x = own(n_hidden=12, tie=False), words(4, 7)
    slice_model(model, x, RATES, embeddings=True)
    name_slice(model, 'thin words', {'emb': .25})
    set_rate(model, .5)
    name_slice(model, 'thin states', {'rnn': .25}) # whatever is in force
    slim = [materialize(model, x, rate=k) for k in ('thin words', 'thin states')]
    assert [(m.rnn.input_size, m.rnn.hidden_size) for m in slim] == [(2, 12), (8, 3)]
    for k, m in zip(('thin words', 'thin states'), slim):
        model.reset()
        m.eval().reset()
        with at_rate(model, k), torch.no_grad(): assert torch.equal(model(x), m(x))


def test_a_classifier_over_the_encoder():
    torch.manual_seed(0)
    model = get_text_classifier(AWD_LSTM, 30, 3, seq_len=5, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 12}).double().eval()
    x = words(4, 13)
    with pytest.raises(ValueError, match=r"takes them at fixed positions.*exclude=\['0.module.rnns.2.module'\]"): slice_model(model, x, RATES)
    slice_model(model, x, RATES, exclude='0.module.rnns.2.module')
    for r in RATES:
        with at_rate(model, r), torch.no_grad(): assert torch.equal(first(model(x)), first(materialize(model, x, rate=r)(x)))


def test_training_with_fastai(tmp_path):
    "A fit at a rate, with the callbacks of language models; validation begins anew"
    data = [(words(4, 7, seed=k), words(4, 7, seed=k+50)) for k in range(6)]
    model = awd(drop=.1).float()
    learn = Learner(DataLoaders(data, data[:2]), model, CrossEntropyLossFlat(), opt_func=Adam, cbs=[ModelResetter(), RNNCallback(), RNNRegularizer(2, 1)])
    learn.slice(data[0][0])
    set_rate(learn.model, .5)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, wd=0.)
    w, old = learn.model[0].rnns[1]._parameters['weight_hh_l0_raw'], before['0.rnns.1.weight_hh_l0_raw']
    assert torch.equal(w.view(4, 12, 12)[:, 6:], old.view(4, 12, 12)[:, 6:]) and not torch.equal(w, old)
    slim = materialize(learn.model, data[0][0], rate=.5)
    model.reset()
    slim.eval().reset()
    with torch.no_grad(): assert torch.equal(first(learn.model.eval()(data[0][0])), first(slim(data[0][0])))


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    "Every rate of a network that was slice-trained reads the text; one that was not loses most of what it knows"
    lines = [' '.join(f'w{(i*7+j*j)%29}' for j in range(10)) for i in range(400)]
    for part in ('valid', 'test'): (tmp_path/f'wiki.{part}.txt').write_text('\n'.join(lines)+'\n')
    rows, note = slice_lm.measure(tmp_path, dict(n_emb=16, bs=4, seq_len=7, epochs=2, p=0., lr=2e-2), (1, .75, .5))
    final = {(r['method'], r['rate']): r['final'] for r in rows}
    assert len(rows) == 3+3+2 and '31 different' in note
    assert all(1 < final[k, r] < 15 for k in ('slice-trained', 'on its own') for r in (1, .75, .5))
    assert final['trained at 1, sliced', .5] > 1.5*final['slice-trained', .5]
    assert rows[0]['parameters'] == 31*16+31+2*4*16*17 and rows[2]['parameters'] == 31*8+31+2*4*8*9


def test_recorded_benchmark():
    "Slice-trained, every rate is as good as a network of its width, within a few percent; without, narrow ones are far off"
    rows = json.loads((Path(slice_lm.__file__).parent.parent/'results'/'slice_lm.json').read_text())['rows']
    final = {(r['method'], r['rate']): r['final'] for r in rows}
    for r in (1, .75, .5, .25): assert final['slice-trained', r] < 1.05*final['on its own', r]
    assert final['trained at 1, sliced', .25] > 5*final['slice-trained', .25]
