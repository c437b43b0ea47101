"""Perplexity of one LSTM language model at every rate it was slice-trained for, beside networks of these widths trained on their own.

WikiText-2 without its training text, as in `lstm`. Needs `PARAMFX_DATA`."""
import argparse
import os
import random
import time
from contextlib import nullcontext

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import F, set_seed
from benchmarks.zoo.lstm import log_likelihood, perplexity
from benchmarks.timing import write_table
from paramfx import zoo
from paramfx.slicing.slice import at_rate, slice_model
from paramfx.zoo.networks import LSTMLM

SETTINGS = dict(n_emb=96, p=.2, bs=16, seq_len=35, min_freq=5, epochs=3, lr=1e-2, clip=.5, seed=0)
RATES = (1, .75, .5, .25)


def some(rates, rng):
    "Widest, narrowest, and one between"
    return [rates[0], rng.choice(rates[1:-1]), rates[-1]] if len(rates) > 2 else rates


def train(model, dl, s, rates=(None,)):
    "Adam, one cycle; gradients of the passes of a step are summed, each rate goes on from its own state. Returns CPU seconds"
    opt, rng, start = torch.optim.Adam(model.parameters(), s['lr']), random.Random(s['seed']), time.process_time()
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, s['lr'], s['epochs']*len(dl))
    for _ in range(s['epochs']):
        model.train().reset()
        for x, y in dl:
            opt.zero_grad()
            for r in some(rates, rng):
                with nullcontext() if r is None else at_rate(model, r): F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s['clip'])
            opt.step()
            sched.step()
    return time.process_time()-start


def scores(model, halves): return [perplexity(log_likelihood(model, dl)) for dl in halves]


def fresh(n_vocab, s, width=1.):
    set_seed(s['seed'])
    return LSTMLM(n_vocab, s['n_emb'], p=s['p'], width=width)


def measure(path=None, settings=SETTINGS, rates=RATES):
    "All rows"
    s = {**SETTINGS, **settings}
    dls = zoo.dls('wikitext2', path=path, bs=s['bs'], seq_len=s['seq_len'], min_freq=s['min_freq'], device='cpu')
    learns, *halves = dls.loaders
    x, rows = dls.one_batch()[0][:2], []
    def row(method, rate, model, seconds=''):
        valid, final = scores(model, halves)
        rows.append(dict(method=method, rate=rate, valid=valid, final=final, seconds=seconds))
    one = fresh(dls.c, s)
    table = slice_model(one, x, rates, embeddings=True)
    seconds = round(train(one, learns, s, rates))
    for r in rates:
        with at_rate(one, r): row('slice-trained', r, one, seconds if r == rates[0] else '')
    for r in rates:
        model = fresh(dls.c, s, r)
        seconds = round(train(model, learns, s))
        row('on its own', r, model, seconds)
        if r == 1: whole = model
    slice_model(whole, x, rates, embeddings=True)
    for r in rates[1:]:
        with at_rate(whole, r): row('trained at 1, sliced', r, whole)
    sizes = {t['rate']: t['params'] for t in table if 'rate' in t}
    return [dict(r, parameters=sizes[r['rate']]) for r in rows], note(dls, s)


def note(dls, s):
    "What the table shows"
    return (f"""Perplexities on WikiText-2 without its training text: trained on wiki.valid.txt ({len(dls.train_ds):,} words, {dls.c:,} different
ones), `valid` is the first half
of wiki.test.txt, `final` the second; rarer words count as `<unk>`, so that **figures of another vocab are not comparable**. One LSTM layer,
embedding and decoder one matrix, all of it sliced.

slice-trained: one network, each step at the widest, the narrowest and one rate between, gradients summed, a state per rate, no distillation;
`seconds` (CPU) are those of the whole training.
on its own: a network of this width, as many steps. trained at 1, sliced: what slicing does without slice training.
{', '.join(f'{k} {v}' for k, v in s.items())}; Adam, one cycle.""")


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--epochs', type=int, default=SETTINGS['epochs'])
    settings = {**SETTINGS, 'epochs': ap.parse_args().epochs}
    torch.set_num_threads(1)
    print(write_table('slice_lm', *measure(settings=settings)).read_text())
