"The language model: its state is carried, dropped, left out of files; and the models that count words"
import pickle
from copy import deepcopy
import pytest, torch
from torch import nn
from fastai.basics import Learner, Perplexity, set_seed
from fastai.callback.rnn import ModelResetter
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from benchmarks.zoo import lstm
from paramfx import zoo
from paramfx.core.forward import check_same, still
from paramfx.zoo.networks import LSTMLM
from paramfx.data.text import text_dls

KINDS = [dict(), dict(n_layers=2), dict(tie=False), dict(n_hidden=12, tie=False)]
def net(**kw):
    torch.manual_seed(0)
    return LSTMLM(30, 8, **kw).eval()
def words(*shape): return torch.randint(30, shape, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('kw', KINDS)
@torch.no_grad()
def test_chunks_equal_one_read(kw):
    m,x = net(**kw),words(4,30)
    whole = m(x)
    assert whole.shape == (4,30,30)
    for n in (1,7,30):
        m.reset()
        torch.testing.assert_close(torch.cat([m(c) for c in x.split(n, 1)], 1), whole)
    m.reset(); m(x[:,:10])
    carried = m(x[:,10:]); m.reset()
    assert (m(x[:,10:])[:,0] - carried[:,0]).abs().max() > 1e-3

@torch.no_grad()
def test_second_route():
    "The same from the parts, step by step"
    m,x = net(tie=False),words(2,6)
    cell = nn.LSTMCell(8, 8)
    for n,p in cell.named_parameters(): p.copy_(getattr(m.rnn, f'{n}_l0'))
    h,got = None,[]
    for t in range(6):
        h = cell(m.emb.weight[x[:,t]], h)
        got.append(h[0] @ m.out.weight.T + m.out.bias)
    torch.testing.assert_close(torch.stack(got, 1), m(x))

@torch.no_grad()
def test_start_values():
    m = LSTMLM(500, 40, tie=False)
    for w in (m.emb.weight, m.out.weight): assert .099 < w.max() <= .1 and -.1 <= w.min() < -.099 and abs(w.mean()) < .01
    assert not m.out.bias.any()

@torch.no_grad()
def test_dropout_is_in_all_its_places():
    "Behind the embedding, between layers, before the last one; with p=1 nothing passes"
    m,x = LSTMLM(30, 8, n_layers=3, p=.25),words(4,6)
    assert m.rnn.dropout == .25 and LSTMLM(30, 8, p=.25).rnn.dropout == 0.
    seen = {}
    m.rnn.register_forward_pre_hook(lambda m, a: seen.update(rnn=a[0]))
    m.out.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    for key,drop in (('rnn', m.drop_in), ('out', m.drop_out)):
        m.eval()(x); assert (seen[key] != 0).all()
        m.train(); drop.p = 1.
        m(x); assert not seen[key].any()
        drop.p = 0.
        m(x); assert seen[key].any()

@torch.no_grad()
def test_a_sample_is_on_its_own():
    m,x = net(),words(3,5)
    first = m(x)
    assert not torch.equal(m(x), first) # goes on
    assert torch.equal(m.eval()(x), first)
    m.train()(words(3,9)); assert torch.equal(m.eval()(x), first)
    with still(m): assert torch.equal(m(x), first)
    state = m.state[0].clone()
    with still(m): m(x)
    assert torch.equal(m.state[0], state) # what is read meanwhile changes nothing
    m(words(2,5)); assert m.state[0].shape[1] == 2 # another batch size begins afresh
    m.reset(); two = m(x[:2]); m(x); assert torch.equal(m(x[:2]), two)
    check_same(m, deepcopy(m), x)

@torch.no_grad()
def test_state_follows_dtype():
    m,x = net(),words(3,5)
    m(x); m.double()
    out = m(x)
    assert out.dtype == m.state[0].dtype == torch.float64
    assert torch.equal(out, m.eval()(x))

def test_autocast_carries():
    try:
        with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16): nn.LSTM(4, 4)(torch.zeros(2, 1, 4))
    except RuntimeError as e: pytest.skip(f"torch has no bfloat16 LSTM for this processor: {e}")
    m,x = net(),words(3,8)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        whole = m(x)[:,4:]; m.reset(); m(x[:,:4]); part = m(x[:,4:])
        cold = m.eval()(x[:,4:])
    assert m.state[0].dtype == torch.float32
    assert (part-whole).abs().max() < .02*whole.abs().max() and (cold-whole).abs().max() > 2*(part-whole).abs().max()

@pytest.mark.parametrize('kw', KINDS)
def test_copies_and_files(kw, tmp_path):
    m,x = net(**kw),words(3,5)
    want = m.eval()(x).detach()
    assert not [k for k in m.state_dict() if 'state' in k]
    for new in (deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert new.state is None and m.state is not None and torch.equal(new(x), want)
        assert (new.out.weight is new.emb.weight) == kw.get('tie', True)
    other = LSTMLM(30, 8, **kw).eval()
    assert not torch.equal(other(x), want)
    other.load_state_dict(m.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), want)
    torch.save(m, tmp_path/'m.pt')
    assert torch.equal(torch.load(tmp_path/'m.pt', weights_only=False)(x), want)

def test_gradient_stops_at_the_batch():
    m,x = net().train(),words(3,5)
    m(x); assert not m.state[0].requires_grad
    m(x).sum().backward() # the first graph is gone: nothing reaches into it
    assert m.emb.weight.grad is not None

def test_tied_is_one_parameter():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(net(tie=False)) - count(net()) == 30*8
    with pytest.raises(ValueError, match='n_hidden equal to n_emb, not 12 and 8'): LSTMLM(30, 8, n_hidden=12)

def test_training_is_deterministic_and_resets():
    "ModelResetter changes nothing: switching between training and validation forgets already"
    lines = [' '.join(f'w{(i*7+j*j)%29}' for j in range(10)) for i in range(200)]
    def run(cbs):
        set_seed(0)
        dls = text_dls(lines, lines[:50], bs=5, seq_len=7, device='cpu')
        learn = Learner(dls, LSTMLM(dls.c, 16, p=.1), cbs=cbs, metrics=Perplexity())
        with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(2, 1e-2)
        return learn.recorder.values
    assert run([ModelResetter()]) == run([])

def test_counted_models_are_probabilities():
    "Each sums to one over the vocab, after words seen or never seen as the first of a pair; the interpolated one by hand"
    ids = torch.tensor([0,1,2,0,1,1,2,0,3])
    gram = lstm.Bigram(ids, 5)
    for a in range(5):
        for p in gram.probs(torch.full((5,), a), torch.arange(5)).values(): assert abs(float(p.sum())-1) < 1e-9
    p = gram.probs(torch.tensor([0]), torch.tensor([1]))
    assert abs(float(p['bigram']) - (.5*2/3 + .5*3/9)) < 1e-12 and abs(float(p['unigram']) - 3/9) < 1e-12

@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    lines = [' '.join(f'w{(i*7+j*j)%29}' for j in range(10)) for i in range(400)]
    for part in ('valid','test'): (tmp_path/f'wiki.{part}.txt').write_text('\n'.join(lines)+'\n')
    rows = lstm.measure(tmp_path, dict(n_emb=16, bs=4, seq_len=7, epochs=2, p=.1))
    assert len(rows) == 4 and rows[-1]['parameters'] == 31*16 + 31 + 2*4*16*(16+1)
    assert all(1 < r[k] < 40 for r in rows for k in ('train','valid','final','test'))
    text = lstm.note(zoo.dls('wikitext2', path=tmp_path, device='cpu'), lstm.SETTINGS)
    assert '4,400 words, 31 different' in text
