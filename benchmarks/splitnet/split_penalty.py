"""What SplitNet's penalty adds to a training step, and how it compares with the same penalty under autograd.

The steps are those of real fits that take turns, as in `masked_step`; the formulations are timed side by side, on the weights
and the assignments of the same network."""
import argparse
import os
import statistics
import time
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: threads that the fits run in take their number from here

import torch
from benchmarks.sparse import masked_step
from benchmarks.sparse.masked_step import Runner, make_learner
from benchmarks.timing import paired, quartiles, ratios, table, write_table
from paramfx import zoo
from paramfx.splitnet.gradients import add_split_grads
from paramfx.splitnet.terms import balance_term, disjoint_term, layer_shares, scales, split_totals
from paramfx.splitnet.callback import SplitNet, SplitPenalty

SPLITS, GAMMAS = {'layer4': 2, 'fc': 2}, (1., 1., 10.)
SIZES = {32: {1: .15, 4: .05}, 64: {1: .07}}  # pixels -> {every: target of its share of a step}
FASTER = 3.  # target: the loops over groups, over the closed form
NET = partial(zoo.build, 'imagenet/resnet18', 10)
PERIOD = 4  # steps of a turn: with `every=4` one of them has the penalty


def add_net(pixels, net=NET, bs=32):
    "Register the network with `masked_step`, whose fits are used"
    masked_step.NETS[f'{pixels} px'] = (net, (3, pixels, pixels), bs, 50_000, 1, None)
    return f'{pixels} px'


def timed(cb):
    "Add up the CPU seconds that `cb` spends in its part of a step: the penalty, and the move of the assignments"
    cb.__dict__['spent'] = 0.
    def wrap(f):
        def g(*args):
            start = time.process_time()
            res = f(*args)
            cb.__dict__['spent'] += time.process_time()-start
            return res
        return g
    for k in ('on_grads', 'on_update', 'on_step'): cb.__dict__[k] = wrap(getattr(cb, k))
    return cb


def steps(pixels, splits=SPLITS, rounds=12, repeats=3, opt='SGD', net=NET, bs=32):
    "Rows of one size of pictures: a plain step, and those with the penalty"
    name, ratio, share, plain = add_net(pixels, net, bs), {}, {}, []
    for r in range(repeats):
        cbs = {f'every={k}': timed(SplitNet(splits, SplitPenalty(every=k, disjoint_warmup=None))) for k in (1, 4)}
        runs = {k: Runner(make_learner(name, opt, cb, seed=r), PERIOD) for k, cb in {'plain': None, 'plain again': None, **cbs}.items()}
        for i in range(rounds):
            before = {k: cb.spent for k, cb in cbs.items()}
            t = {k: v[0] for k, v in paired(runs, rounds=1, warmup=0 if i else 1).items()}
            if i == 0: before = {k: cb.spent/2 for k, cb in cbs.items()}  # a turn to warm up, one that counts
            mean = (t['plain']+t['plain again'])/2
            plain += [t['plain'], t['plain again']]
            ratio.setdefault('plain again', []).append(t['plain again']/t['plain'])
            for k, cb in cbs.items():
                ratio.setdefault(k, []).append(t[k]/mean)
                share.setdefault(k, []).append((cb.spent-before[k])/mean)
        for run in runs.values(): run.close()
    ms, goals = 1e3*statistics.median(plain)/PERIOD, {f'every={k}': t for k, t in SIZES.get(pixels, SIZES[32]).items()}
    return [_row(f'{pixels} px step', k, quartiles(v), quartiles(share[k])['median'] if k in share else None,
        goals.get(k), plain_ms=ms) for k, v in ratio.items()]


def _row(what, how, q, value=None, goal=None, up=False, **more):
    "`value` is what is held against the target; None: the ratio"
    told, value = {} if value is None else dict(share=value), q['median'] if value is None else value
    met = '' if goal is None else 'yes' if (value >= goal if up else value <= goal) else 'no'
    return dict(what=what, how=how, ratio=q['median'], q1=q['q1'], q3=q['q3'], **told, target='' if goal is None else goal, met=met, **more)


# -- formulations

def looped_term(w, p, q):
    "Group by group, with masked copies of the weight, as the method is usually written"
    row, col = scales(w.shape, len(p))
    size = (w.square().flatten(2).mean(2) if w.ndim > 2 else w.square()).add(1e-12).sqrt()
    res = 0.
    for g in range(len(p)):
        res = res + row*(size*q[g][:,None]*(1-p[g])).norm(dim=0).sum()
        res = res + col*(size*p[g]*(1-q[g])[:,None]).norm(dim=1).sum()
    return res


def in_loop(layers, free):
    terms = torch.stack([looped_term(*l) for l in layers])
    soft = [sum(map(f, free.values()))/len(free) for f in (disjoint_term, balance_term)]
    return sum(f*t for f, t in zip(GAMMAS, ((layer_shares(terms)*terms).sum(), *soft)))


def in_matmuls(layers, free): return sum(f*t for f, t in zip(GAMMAS, split_totals(layers, free)))


def formulations(rounds=20, splits=SPLITS, net=NET, pixels=32):
    "Rows: each formulation with its backward pass, over the closed form"
    learn = make_learner(add_net(pixels, net, 4), 'SGD', SplitNet(splits))
    holder = learn.split_net.effect.holder
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    def leaf(): return holder.flat.detach().clone().requires_grad_()
    def closed():
        t = leaf()
        soft = holder.soft(t)
        return add_split_grads(holder.weights(soft), soft, [t], GAMMAS)[1][0]
    def autograd(f):
        t = leaf()
        soft = holder.soft(t)
        f(holder.weights(soft), soft).backward()
        return t.grad
    fns = {'closed form': closed, 'matrix products under autograd': partial(autograd, in_matmuls), 'loops under autograd': partial(autograd, in_loop)}
    ref = closed()
    for k, f in fns.items():  # the same penalty, or there is nothing to compare
        if (f()-ref).abs().max() > 1e-3*ref.abs().max(): raise SystemExit(f'{k}: another gradient than the closed form')
    times = paired(fns, rounds)
    rows = ratios(times, 'closed form')
    return [_row('formulation', k, q, None, FASTER if k.startswith('loops') else None, True, ms=1e3*statistics.median(times[k])) for k, q in rows.items()] + [
        dict(what='formulation', how='closed form', ratio=1., ms=1e3*statistics.median(times['closed form']))]


NOTE = """ResNet-18 with ten classes in batches of 32, `layer4` and `fc` in two groups. Above: steps of a running `learn.fit`
(loading, every event, SGD with momentum) in four fits that take turns; a turn is four steps, so that with `every=4` each has
one penalty. `ratio` is a whole step over the mean of two plain fits; `plain again`, the second plain fit over the first, is
noise as far as it is off from 1. `share` is the time spent on the penalty and the update of the assignments, measured inside of
these steps, over that of a plain step: it is held against the target. Below: value and gradients of the penalty alone, relative
to the closed form, where a larger ratio means that the closed form is that many times faster. Medians and quartiles within a
round, CPU time, one thread."""


def missed(rows):
    "Targets that were not reached"
    return [f"{r['what']}, {r['how']}: {r.get('share', r['ratio']):.3f}, target {r['target']}" for r in rows if r.get('met') == 'no']


def run(sizes=tuple(SIZES), rounds=12, repeats=3):
    "All rows"
    return [row for px in sizes for row in steps(px, rounds=rounds, repeats=repeats)] + formulations()


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=12, help='per repeat')
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(rounds=a.rounds, repeats=a.repeats)
    print(table(rows) if a.dry else write_table('split_penalty', rows, NOTE).read_text())
    if missed(rows): raise SystemExit('missed: ' + '; '.join(missed(rows)))
