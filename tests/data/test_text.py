"Text in order: every word once, rows that run on, all layouts of files, and a state that makes chunks equal one long read"
import os, pickle, random, subprocess, sys
from collections import Counter
from copy import deepcopy
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, F, L, Learner, Perplexity, set_seed
from fastai.callback.rnn import ModelResetter
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from paramfx.core.runs import RunState
from paramfx.data.text import StreamDL, TextStream, lm_dls, make_vocab, split_words, text_dls

class Net(nn.Module):
    "A small recurrent model that carries its state"
    def __init__(self, c, n=24):
        super().__init__()
        self.emb,self.rnn,self.out = nn.Embedding(c, n),nn.LSTM(n, n, batch_first=True),nn.Linear(n, c)
        self.reset()
    def reset(self): self.state = None
    def forward(self, x):
        if self.state is not None and self.state[0].shape[1] != len(x): self.reset()
        y,state = self.rnn(self.emb(x), self.state)
        self.state = tuple(o.detach() for o in state)
        return self.out(y)

def follow(w): return [(7*w+k)%40 for k in (1,8,20)]

def chain(n_lines, seed=0):
    "Lines of twelve words of a Markov chain with three successors each"
    rng = random.Random(seed)
    def line(w=0):
        for _ in range(12):
            w = rng.choice(follow(w))
            yield f'w{w}'
    return [' '.join(line()) for _ in range(n_lines)]

def chain_dls(bs=10, seq_len=20, n=600, **kw): return text_dls(chain(n), chain(80, 1), chain(80, 2), bs=bs, seq_len=seq_len, device='cpu', **kw)
def stream(n): return TextStream(torch.arange(n), [str(i) for i in range(n)])
def learner(dls, net=None, **kw): return Learner(dls, net or Net(dls.c), cbs=ModelResetter(), metrics=Perplexity(), **kw)
def fit(learn, *args, **kw):
    with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(*args, **kw)
def validate(learn, **kw):
    with learn.no_logging(), learn.no_bar(): return learn.validate(**kw)

# order of reading

def batchify(ids, bs, seq_len):
    "The textbook way: cut, stack, step"
    n = len(ids)//bs
    if (len(ids) - n*bs) == 0: n -= 1 # the last row needs a target for its last word
    rows = [ids[i*n:(i+1)*n+1] for i in range(bs)]
    for s in range(0, n, seq_len):
        yield torch.stack([r[s:min(s+seq_len, n)] for r in rows]),torch.stack([r[s+1:min(s+seq_len, n)+1] for r in rows])

SIZES = [(101,4,7), (100,4,25), (1000,20,35), (29,7,1), (8,7,5), (350,1,35), (351,1,35), (97,8,1000)]

@pytest.mark.parametrize('n,bs,seq_len', SIZES)
def test_batches_equal_the_textbook(n, bs, seq_len):
    ours,theirs = list(StreamDL(stream(n), bs=bs, seq_len=seq_len)),list(batchify(torch.arange(n), bs, seq_len))
    assert len(ours) == len(theirs) == len(StreamDL(stream(n), bs=bs, seq_len=seq_len))
    for a,b in zip(ours, theirs): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

@pytest.mark.parametrize('n,bs,seq_len', SIZES)
def test_every_word_is_a_target_once(n, bs, seq_len):
    "All words but the first, and but what is less than a column at the end"
    batches = list(StreamDL(stream(n), bs=bs, seq_len=seq_len))
    seen = torch.cat([y.flatten() for _,y in batches]).sort()[0]
    assert torch.equal(seen, torch.arange(1, (n-1)//bs*bs+1)) and n-1-len(seen) < bs

@pytest.mark.parametrize('n,bs,seq_len', SIZES)
def test_rows_run_on(n, bs, seq_len):
    batches = list(StreamDL(stream(n), bs=bs, seq_len=seq_len))
    assert all(x.shape[1] == seq_len for x,_ in batches[:-1])
    for x,y in batches:
        assert torch.equal(y, x+1) and x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    for (_,y),(x,_) in zip(batches, batches[1:]): assert torch.equal(x[:,0], y[:,-1])

@pytest.mark.parametrize('n,bs,seq_len', SIZES[:4])
def test_batches_equal_fastai(n, bs, seq_len):
    from fastai.text.data import LMDataLoader
    theirs = LMDataLoader([torch.arange(n)], bs=bs, seq_len=seq_len, device='cpu')
    ours = StreamDL(stream(n), bs=bs, seq_len=seq_len)
    assert len(ours) == len(theirs)
    for a,b in zip(ours, theirs): assert torch.equal(a[0], torch.Tensor(b[0]).long()) and torch.equal(a[1], b[1])

def test_training_equals_fastai():
    "A run on these loaders is the run on `LMDataLoader`, bit for bit"
    from fastai.text.data import LMDataLoader
    dls = chain_dls(n=100)
    theirs = DataLoaders(*[LMDataLoader([d.dataset.ids], bs=10, seq_len=20, device='cpu') for d in dls.loaders])
    def weights(d):
        set_seed(3)
        learn = Learner(d, Net(dls.c), loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
        fit(learn, 2, 1e-2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(weights(dls), weights(theirs))

def test_nothing_is_drawn():
    "Epochs are alike; reading moves the loader's own generator and, as torch's loaders all do, torch's, and no other"
    dl = chain_dls(n=40).train
    np_state,py_state = np.random.get_state()[1].copy(),random.getstate()
    a,b = list(dl),list(dl)
    assert all(torch.equal(p[0], q[0]) for p,q in zip(a, b))
    assert (np.random.get_state()[1] == np_state).all() and random.getstate() == py_state

def test_transforms():
    "Of items and of batches; the first make batches row by row, with the same content"
    plain = chain_dls(n=40)
    for name in ('after_item','after_batch'):
        other = chain_dls(n=40, **{name: lambda b: b})
        assert all(torch.equal(p, q) for a,b in zip(plain.train, other.train) for p,q in zip(a, b))

def test_shuffled_batches_are_whole():
    "As `show_results` asks for them"
    dl = StreamDL(stream(101), bs=4, seq_len=5).new(shuffle=True)
    firsts = [int(x[0,0]) for x,_ in dl]
    assert firsts != sorted(firsts) and sorted(firsts) == [0,5,10,15,20]
    with pytest.raises(ValueError, match='shuffle=True'): chain_dls(shuffle=True)

def test_new_keeps_settings():
    dl = StreamDL(stream(101), bs=4, seq_len=5)
    assert dl.new().seq_len == 5 and len(list(dl.new())) == 5
    again = dl.new(bs=2, seq_len=25)
    assert again.one_batch()[0].shape == (2,25) and len(again) == 2
    lms = chain_dls(val_bs=3)
    assert [d.bs for d in lms.loaders] == [10,3,3]

def test_workers_keep_the_order():
    dl = StreamDL(stream(101), bs=4, seq_len=5)
    assert all(torch.equal(a[0], b[0]) for a,b in zip(dl, dl.new(num_workers=2)))

# vocab

def test_vocab():
    words = split_words(['b a a', 'c b a'])
    assert words == ['b','a','a','<eos>','c','b','a','<eos>']
    assert make_vocab(words) == ['a','<eos>','b','c','<unk>'] and make_vocab(words, 3) == ['a','<eos>','<unk>']
    assert make_vocab(['<unk>']*3+['x']) == ['<unk>','x','<eos>'] # the text's own unknown words

def test_vocab_is_that_of_the_training_text():
    dls = text_dls(['a b a'], ['a new word'], ['b'], bs=1, device='cpu')
    assert [d.vocab for d in dls.loaders] == [['a','<eos>','b','<unk>']]*3 and dls.c == 4
    assert dls[1].dataset.decode((dls[1].dataset.ids,)) == ('a <unk> <unk> <eos>',)
    rare = text_dls(['a b a'], ['a b'], bs=1, min_freq=2, device='cpu')
    assert rare.vocab == ['a','<eos>','<unk>'] and len(rare.loaders) == 2

def test_lines_are_those_of_a_file():
    "Signs that only `splitlines` breaks at do not end a line"
    assert split_words(['a\x0cb\u2028c']).count('<eos>') == 1

# files

LAYOUTS = ['wiki.{}.tokens', 'wiki.{}.txt', 'ptb.{}.txt', '{}.txt']
def write(folder, pattern, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for k,v in texts.items(): (folder/pattern.format(k)).write_text('\n'.join(v)+'\n', encoding='utf8')
def sources(dls): return [d.dataset.source for d in dls.loaders]

@pytest.mark.parametrize('sub', ['', 'wikitext2', 'wikitext-2', 'ptb'])
@pytest.mark.parametrize('pattern', LAYOUTS)
def test_layouts(tmp_path, monkeypatch, pattern, sub):
    write(tmp_path/sub, pattern, train=chain(30), valid=chain(8, 1), test=chain(9, 2))
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    for dls in (lm_dls(tmp_path, bs=3, device='cpu'), lm_dls(bs=3, device='cpu'), lm_dls(str(tmp_path/sub), bs=3, device='cpu')):
        assert [len(d.dataset) for d in dls.loaders] == [13*30, 13*8, 13*9]
        assert sources(dls) == [pattern.format(p) for p in ('train','valid','test')]

@pytest.mark.parametrize('pattern', LAYOUTS[:2])
def test_wikitext_without_its_training_text(tmp_path, pattern):
    valid,test = chain(30, 1),chain(9, 2)
    write(tmp_path, pattern, valid=valid, test=test)
    dls = lm_dls(tmp_path, bs=3, device='cpu')
    assert sources(dls) == [pattern.format('valid'), pattern.format('test')+', first half', pattern.format('test')+', second half']
    halves = [d.dataset.decode((d.dataset.ids,))[0].split() for d in dls.loaders]
    assert halves[0] == split_words(valid) and halves[1] + halves[2] == split_words(test) and 0 <= len(halves[2])-len(halves[1]) <= 1

def test_whole_layout_before_a_part(tmp_path):
    write(tmp_path, 'wiki.{}.tokens', valid=chain(8, 1), test=chain(8, 2))
    write(tmp_path, '{}.txt', train=chain(30), valid=chain(8, 1), test=chain(8, 2))
    assert sources(lm_dls(tmp_path, bs=3, device='cpu')) == ['train.txt','valid.txt','test.txt']

@pytest.mark.parametrize('pattern,missing', [('ptb.{}.txt','train'), ('{}.txt','train'), ('{}.txt','test'), ('wiki.{}.txt','test')])
def test_only_wikitext_may_lack_a_file(tmp_path, pattern, missing):
    write(tmp_path, pattern, **{k: chain(8) for k in ('train','valid','test') if k != missing})
    with pytest.raises(FileNotFoundError, match=f'No {pattern.format(missing)} in') as e: lm_dls(tmp_path)
    assert '\n' not in str(e.value)

def test_unknown_names(tmp_path):
    write(tmp_path, 'my.{}.txt', train=chain(3), valid=chain(3), test=chain(3))
    with pytest.raises(FileNotFoundError, match='No text in .*train.txt, valid.txt and test.txt as `path`'): lm_dls(tmp_path)

def test_missing(tmp_path, monkeypatch):
    monkeypatch.delenv('PARAMFX_DATA', raising=False)
    for path in (None, tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match='PARAMFX_DATA/wikitext2') as e: lm_dls(path)
        assert '\n' not in str(e.value) and 'pytorch/examples' in str(e.value)

def test_odd_files(tmp_path):
    "A mark at the start, other line ends, no end of line"
    write(tmp_path, '{}.txt', valid=['a b'], test=['a b'])
    (tmp_path/'train.txt').write_bytes('\ufeffa b\r\n\r\nc'.encode())
    dls = lm_dls(tmp_path, bs=1, device='cpu')
    assert dls.train_ds.decode((dls.train_ds.ids,)) == ('a b <eos> <eos> c <eos>',)

def test_bad_input(tmp_path):
    write(tmp_path, '{}.txt', train=chain(3), valid=chain(3), test=chain(2))
    one_line = lambda e: '\n' not in str(e.value)
    with pytest.raises(ValueError, match=r'bs=26 needs at least 27 words, test.txt has 26: pass a smaller bs') as e: lm_dls(tmp_path, bs=26)
    assert one_line(e) and lm_dls(tmp_path, bs=25, device='cpu')[2].one_batch()[0].shape == (25,1)
    for kw in (dict(seq_len=0), dict(seq_len=-3), dict(bs=0), dict(val_bs=-1)):
        with pytest.raises(ValueError, match='must be at least 1') as e: lm_dls(tmp_path, **{'bs': 5, **kw})
        assert one_line(e)
    (tmp_path/'test.txt').write_bytes('caf\xe9'.encode('latin1'))
    with pytest.raises(ValueError, match='test.txt is not UTF-8') as e: lm_dls(tmp_path)
    assert one_line(e)
    (tmp_path/'train.txt').write_text('')
    (tmp_path/'test.txt').write_text('a\n')
    with pytest.raises(ValueError, match='train.txt is empty') as e: lm_dls(tmp_path)
    with pytest.raises(TypeError, match='list of lines'): text_dls('a b c', ['a'])
    with pytest.raises(TypeError, match='list of lines'): text_dls(['a b c'], tmp_path/'train.txt')

# use

def test_show(monkeypatch):
    "Tables of words: two rows, and what the network says to them"
    shown = []
    monkeypatch.setattr('paramfx.data.text.display_df', shown.append)
    dls = chain_dls(n=40)
    dls.show_batch(max_n=2)
    assert list(shown[0].columns) == ['text','target'] and len(shown[0]) == 2
    assert all(r.text.split()[1:] == r.target.split()[:-1] for r in shown[0].itertuples())
    x,y,its = dls.show_batch(show=False)
    assert len(its) == 4 and its[0][0].split()[1:] == its[0][1].split()[:-1]
    learn = learner(dls)
    with learn.no_bar(): learn.show_results(max_n=3, shuffle=False)
    assert list(shown[1].columns) == ['text','target','prediction'] and len(shown[1]) == 3
    x,y = dls[1].one_batch()
    learn.model.eval().reset()
    with torch.no_grad(): guess = learn.model(x).argmax(-1)
    assert list(shown[1].prediction) == [' '.join(dls.vocab[i] for i in r) for r in guess[:3].tolist()]
    dls.test_dl(['w1 w8', 'w3']).show_batch()
    assert shown[2].text.tolist() == ['w1 w8', 'w3 <eos>']

def test_perplexity_falls_below_the_unigram():
    "Two epochs on a text whose next word is one of three"
    dls = chain_dls(n=1200, bs=8)
    set_seed(0)
    learn = learner(dls)
    fit(learn, 2, 3e-2)
    ids,count = dls[2].dataset.ids,Counter(dls.train_ds.ids.tolist())
    unigram = np.exp(-np.mean([np.log(count[i]/len(dls.train_ds)) for i in ids.tolist()]))
    loss,ppl = validate(learn, ds_idx=2)
    assert 3**(12/13) < ppl < 10 < 30 < unigram
    assert abs(np.exp(loss)-ppl) < 1e-4

def test_chunks_equal_one_long_read():
    "The carried state makes the cut invisible; without it each chunk begins as a stranger"
    dls = chain_dls()
    set_seed(0)
    learn = learner(dls)
    fit(learn, 2, 3e-2)
    model = learn.model.eval()
    def logits(seq_len, carry=True):
        model.reset()
        res = []
        for x,_ in dls[1].new(seq_len=seq_len):
            if not carry: model.reset()
            with torch.no_grad(): res.append(model(x))
        return torch.cat(res, 1)
    whole = logits(10_000)
    for seq_len in (1,7,20): torch.testing.assert_close(logits(seq_len), whole)
    cold = logits(7, carry=False)
    torch.testing.assert_close(cold[:,:7], whole[:,:7])
    assert (cold[:,7]-whole[:,7]).abs().max() > .1

def test_lr_find_and_get_preds():
    dls = chain_dls(n=1500)
    learn = learner(dls)
    before = deepcopy(learn.model.state_dict())
    with learn.no_logging(), learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    dl = dls[1].new(bs=3, seq_len=173) # two batches of one size
    with learn.no_bar(): preds,targs = learn.get_preds(dl=dl)
    rows = torch.cat([y for _,y in dl]) # batch after batch, as `get_preds` stacks them
    assert preds.shape == (*rows.shape, dls.c) and torch.equal(targs, rows)
    loss = F.nll_loss(preds.log().flatten(0,1), targs.flatten())
    assert abs(float(loss) - validate(learn, dl=dl)[0]) < 1e-4

def test_resumed_equals_uninterrupted(tmp_path):
    "A run continued from a checkpoint is the run that was never interrupted, bit for bit"
    def make():
        set_seed(1)
        return learner(chain_dls(n=100), path=tmp_path)
    def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    whole = make(); fit(whole, 3, 1e-2)
    class Stop(Exception): pass
    class Crash(Callback):
        order = 90
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 3: raise Stop('now')
    first = make()
    with pytest.raises(Stop): fit(first, 3, 1e-2, cbs=[RunState(), Crash()])
    second = make()
    second.resume()
    fit(second, 3, 1e-2, cbs=[RunState()])
    assert torch.equal(weights(whole), weights(second))

def test_predict_knows_only_its_line():
    "Lines are rows of their own, filled up on the right; what was read before does not matter"
    dls = chain_dls()
    set_seed(0)
    learn = learner(dls)
    fit(learn, 2, 3e-2)
    lines = ['w1 w8 w20 w5', 'w3', 'w7 w9']
    with learn.no_bar(), learn.no_logging():
        preds = learn.get_preds(dl=dls.test_dl(lines))[0]
        assert preds.shape == (3,4,dls.c)
        for i,l in enumerate(lines):
            text,ids,p = learn.predict(l)
            n = len(l.split())
            torch.testing.assert_close(p, preds[i,:n])
            assert text.split() == [dls.vocab[j] for j in p.argmax(-1)] and ids.shape == (n,)
        assert learn.predict(' '.join(['w1']*50))[2].shape == (50,dls.c) # longer than a batch
        again = learn.predict(lines[0])[2]
        learn.validate()
        assert torch.equal(learn.predict(lines[0])[2], again)
        assert learn.predict('never-seen')[2].shape == (1,dls.c)
        for one in ('w3', ('w3',), L('w3')): torch.testing.assert_close(learn.get_preds(dl=dls.test_dl(one))[0][0], preds[1,:1])
        with pytest.raises(ValueError, match='each line needs a word'): learn.predict('  ')

LOAD = """
import sys, torch
sys.path.insert(0, {tests!r})
from fastai.basics import load_learner
learn = load_learner({file!r})
with learn.no_bar(), learn.no_logging(): torch.save(learn.predict('w1 w8 w20')[2], {out!r})
assert [len(d.dataset) for d in learn.dls.loaders] == [0,0,0] and len(learn.dls.vocab) == {c}
"""
def test_export_holds_no_text(tmp_path):
    "A new process predicts the same from a file without the text"
    from test_text import Net as Importable # pytest may have loaded this file under another name
    dls = chain_dls(n=3000)
    learn = learner(dls, Importable(dls.c), path=tmp_path)
    fit(learn, 1, 1e-2)
    with learn.no_bar(), learn.no_logging(): want = learn.predict('w1 w8 w20')[2]
    learn.export()
    assert len(dls.train_ds) == 13*3000 and (tmp_path/'export.pkl').stat().st_size < 100_000 < 8*len(dls.train_ds)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = LOAD.format(tests=os.path.dirname(os.path.abspath(__file__)), file=str(tmp_path/'export.pkl'), out=str(tmp_path/'p.pt'), c=dls.c)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(here), os.environ.get('PYTHONPATH','')]))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path/'p.pt'), want)

def test_pickle():
    dls = pickle.loads(pickle.dumps(chain_dls(n=40)))
    assert len(dls.train_ds) == 13*40 and dls.one_batch()[0].shape == (10,20)

def test_two_ranks_read_one_half_each():
    "fastai's distributed loader splits the batches: each rank reads a stretch without gaps"
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    class Local(DistributedDL):
        def _broadcast(self, t, rank): return t
    dl = StreamDL(stream(161), bs=4, seq_len=5)
    halves = [list(Local(dl, rank=r, world_size=2)) for r in (0,1)]
    assert all(torch.equal(a[0], b[0]) for a,b in zip(halves[0]+halves[1], dl)) and len(halves[0]) == len(halves[1]) == 4

# the real text

def test_real_wikitext(data_dir):
    "Counts of the published files; the first words of both halves"
    if not (data_dir/'wikitext2').is_dir(): pytest.skip('no wikitext2 folder in PARAMFX_DATA')
    dls = lm_dls(data_dir/'wikitext2', device='cpu')
    n = [len(d.dataset) for d in dls.loaders]
    assert n[0] == 217_646 and n[1]+n[2] == 245_569 and n[2]-n[1] == 1
    read = lambda f: [w for l in open(data_dir/'wikitext2'/f, encoding='utf8') for w in l.split() + ['<eos>']]
    train,test = read('wiki.valid.txt'),read('wiki.test.txt')
    assert dls.c == len(set(train) | {'<unk>'}) == 13_777
    known = set(train)
    for d,words in zip(dls.loaders, (train, test[:n[1]], test[n[1]:])):
        assert d.dataset.decode((d.dataset.ids,))[0].split() == [w if w in known else '<unk>' for w in words]
    x,y = dls.one_batch()
    assert x.shape == y.shape == (20,35) and len(dls.train) == 311
