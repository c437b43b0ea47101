"""A forward of a sparse 4096x4096 layer that is only used, relative to the dense one, and the density at which they are even."""
import argparse
from functools import partial

from benchmarks.timing import paired, quartiles, table, write_table

import torch
from torch import nn
from paramfx.csr_infer import FrozenCSR, break_even

TARGETS = {.9: {1: .20, 32: .25, 256: .35}, .95: {1: .10, 32: .15, 256: .20}, .98: {1: .05, 32: .07, 256: .12}}


def repeated(m, x, n):
    with torch.no_grad():
        for _ in range(n): m(x)


def measure(sparsity, goals, rounds, n=4096):
    "Rows of one sparsity, a row per number of items"
    gen = torch.Generator().manual_seed(0)
    lin = nn.Linear(n, n)
    with torch.no_grad(): lin.weight.mul_(torch.rand(n, n, generator=gen) >= sparsity)
    csr, rows = FrozenCSR(lin), []
    for items, goal in goals.items():
        x, k = torch.randn(items, n, generator=gen), 10 if items == 1 else 1
        t = paired({'dense': partial(repeated, lin, x, k), 'csr': partial(repeated, csr, x, k)}, rounds=rounds)
        q = quartiles([b/a for a, b in zip(t['dense'], t['csr'])])
        rows.append(dict(sparsity=sparsity, items=items, ratio=q['median'], q1=q['q1'], q3=q['q3'], target=goal, met='yes' if q['median'] <= goal else 'no'))
    return rows


NOTE = """A forward of a layer of 4096x4096 with bias, non-zero weights only, relative to the dense layer: medians and quartiles of the
ratios within a round, CPU time, one thread. `break_even` is the density below which sparse was faster, found by timing."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--rounds', type=int, default=15)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [r for s, goals in TARGETS.items() for r in measure(s, goals, a.rounds)]
    rows += [dict(items=k, break_even=break_even(4096, 4096, k)) for k in (1, 32, 256)]
    print(table(rows) if a.dry else write_table('csr_infer', rows, NOTE).read_text())
    missed = [f"{r['sparsity']}, {r['items']} items: {r['ratio']:.3f} > {r['target']}" for r in rows if r.get('met') == 'no']
    if missed: raise SystemExit('Missed: ' + '; '.join(missed))
