"""A word-level LSTM language model trained on 218,000 words in minutes on one thread, beside what counting words reaches.

WikiText-2 without its training text: trained on the validation text; the first half of the test text validates, the second
half gives the final figure. Needs `PARAMFX_DATA`."""
import argparse
import math
import os
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import CrossEntropyLossFlat, F, Learner, Perplexity, set_seed
from fastai.callback.rnn import ModelResetter
import fastai.callback.schedule # brings fit_one_cycle  # noqa: F401
from fastai.callback.training import GradientClip
from benchmarks.timing import write_table
from paramfx import zoo

SETTINGS = dict(n_emb=200, n_layers=1, p=.5, bs=16, seq_len=35, epochs=6, lr=1e-2, wd=1e-6, clip=.25, seed=0)


def log_likelihood(model, dl):
    "Natural logarithms of the probabilities of all words of `dl`, read with a carried state: their sum and number"
    model.eval().reset()
    total, n = 0., 0
    with torch.no_grad():
        for x, y in dl:
            total -= F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='sum').item()
            n += y.numel()
    return total, n


def perplexity(*parts): return math.exp(-sum(t for t, _ in parts)/sum(n for _, n in parts))


class Bigram:
    "Word pairs counted in `ids`, interpolated with word frequencies (fixed weight), or with Kneser-Ney's absolute discount"
    def __init__(self, ids, c, weight=.5, discount=.8):
        self.c, self.weight, self.discount = c, weight, discount
        self.uni = torch.bincount(ids, minlength=c).double()
        self.pairs, self.counts = (ids[:-1]*c + ids[1:]).unique(return_counts=True)
        self.seen = torch.bincount(ids[:-1], minlength=c).double()  # as the first word of a pair
        self.kinds = torch.bincount(self.pairs//c, minlength=c).double()  # different words that follow
        before = torch.bincount(self.pairs % c, minlength=c).double()+.1  # different words in front of it
        self.continues = before/before.sum()

    def _count(self, a, b):
        q = a*self.c + b
        i = torch.searchsorted(self.pairs, q).clamp(max=len(self.pairs)-1)
        return torch.where(self.pairs[i] == q, self.counts[i], 0).double()

    def probs(self, a, b):
        "Probabilities of words `b` after words `a`: by frequency, interpolated, Kneser-Ney"
        n, seen, uni = self._count(a, b), self.seen[a], self.uni[b]/self.uni.sum()
        some = seen.clamp(min=1)  # a word that was never first has no pairs: all is left to the lower order
        weight = torch.where(seen > 0, self.weight, 0.)
        mixed = weight*n/some + (1-weight)*uni
        rest = torch.where(seen > 0, self.discount*self.kinds[a]/some, 1.)
        kn = (n-self.discount).clamp(min=0)/some + rest*self.continues[b]
        return dict(unigram=uni, bigram=mixed, kneser_ney=kn)

    def parts(self, ids):
        "Sum of log-probabilities and number of words, per method"
        return {k: (p.log().sum().item(), len(p)) for k, p in self.probs(ids[:-1], ids[1:]).items()}


def _row(model, train, halves, **kw):
    return dict(model=model, train=perplexity(train), valid=perplexity(halves[0]), final=perplexity(halves[1]),
                test=perplexity(*halves), **kw)


def counting(dls):
    "Rows of the models that count words"
    train, *halves = [dl.dataset.ids for dl in dls.loaders]
    gram = Bigram(train, dls.c)
    parts = [gram.parts(ids) for ids in (train, *halves)]
    names = dict(unigram='word frequencies', bigram='pairs, half and half with frequencies', kneser_ney='pairs, Kneser-Ney')
    return [_row(name, parts[0][k], [p[k] for p in parts[1:]], parameters='', seconds='') for k, name in names.items()]


def make(path=None, settings=SETTINGS):
    "Loaders and learner"
    s = {**SETTINGS, **settings}
    dls = zoo.dls('wikitext2', path=path, bs=s['bs'], seq_len=s['seq_len'], device='cpu')
    set_seed(s['seed'])
    model = zoo.build('wikitext2/lstm', n_out=dls.c, n_emb=s['n_emb'], n_layers=s['n_layers'], p=s['p'])
    return Learner(dls, model, CrossEntropyLossFlat(), lr=s['lr'], wd=s['wd'], metrics=Perplexity(),
                   cbs=[ModelResetter(), GradientClip(s['clip'])])


def measure(path=None, settings=SETTINGS):
    "All rows"
    s = {**SETTINGS, **settings}
    learn = make(path, s)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(s['epochs'], s['lr'])
    seconds = time.process_time()-start
    train, *halves = [log_likelihood(learn.model, dl) for dl in learn.dls.loaders]
    with learn.no_bar(), learn.no_logging(): theirs = learn.validate(ds_idx=2)[1]
    row = _row('LSTM', train, halves, parameters=sum(p.numel() for p in learn.model.parameters()), seconds=round(seconds))
    if abs(theirs/row['final']-1) > .01: raise RuntimeError(f"fastai's perplexity is {theirs:.2f}, word by word it is {row['final']:.2f}")
    return [*counting(learn.dls), row]


NOTE = """Perplexities on WikiText-2 without its training text: trained on wiki.valid.txt ({n} words, {c} different ones), `valid` is the
first half of wiki.test.txt, `final` the second, `test` both; unknown words count as `<unk>`. **Not comparable with published
figures of WikiText-2.** `train`: the training text in evaluation mode. `seconds`: CPU time of training with its validations.
Kneser-Ney: interpolated, discount 0.8, which is the best on `valid` in steps of 0.1.

LSTM: {settings}; tied weights, Adam, one cycle, state carried from batch to batch."""


def note(dls, settings):
    "What the table shows"
    text = ', '.join(f'{k} {v}' for k, v in settings.items())
    return NOTE.format(n=f'{len(dls.train_ds):,}', c=f'{dls.c:,}', settings=text)


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--epochs', type=int, default=SETTINGS['epochs'])
    settings = {**SETTINGS, 'epochs': ap.parse_args().epochs}
    torch.set_num_threads(1)
    print(write_table('lstm', measure(settings=settings), note(zoo.dls('wikitext2', device='cpu'), settings)).read_text())
