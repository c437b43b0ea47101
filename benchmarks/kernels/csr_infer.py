"""A forward of layers made sparse by `materialize(fmt=...)`, relative to the dense ones, and the density at which they are even.

The script fails where a target is missed, or where a layer that was to be sparse ran dense."""
import argparse
from functools import partial

from benchmarks.timing import paired, quartiles, table, write_table

import torch
from torch import nn
from paramfx.kernels.timing import break_even
from paramfx.kernels.inference import FrozenBSR, FrozenCSR, freeze_layers
from paramfx.export.materialize import materialize

TARGETS = {.9: {1: .20, 32: .25, 256: .35}, .95: {1: .10, 32: .15, 256: .20}, .98: {1: .05, 32: .07, 256: .12}}
BLOCKS = 8, 16  # patterns of blocks, at a sparsity of .9
CONVS = (256, 256, 14, 32), (64, 256, 56, 8)  # 1x1: inputs, outputs, height and width, items
KINDS = {'csr': FrozenCSR, 'bsr': FrozenBSR}


def pattern(shape, sparsity, block=1, seed=0):
    "A random mask of a weight, in square blocks"
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[0]//block, shape[1]//block, generator=gen) >= sparsity
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1).view(shape)


def masked(layer, sparsity, block=1):
    "A network of this layer, with zeros"
    with torch.no_grad(): layer.weight.mul_(pattern(layer.weight.shape, sparsity, block))
    return nn.Sequential(layer).eval()


def check(net, kind):
    "Fail where the layer is not of this kind"
    want = KINDS[kind.split()[0]]
    if type(net[0]) is not want or (kind != 'csr' and net[0].block != int(kind.rpartition('x')[2])):
        raise SystemExit(f'The layer was to be {kind} and is {net[0]}.')


def repeated(m, x, n):
    with torch.no_grad():
        for _ in range(n): m(x)


def measure(dense, nets, x, rounds, **about):
    "A row for each of `nets` (kind -> network)"
    for kind, net in nets.items(): check(net, kind)
    k = 50 if x.numel() < 10_000 else 5 if x.numel() < 200_000 else 1  # passes in a row
    t = paired({n: partial(repeated, m, x, k) for n, m in [('dense', dense), *nets.items()]}, rounds=rounds)
    qs = {n: quartiles([b/a for a, b in zip(t['dense'], t[n])]) for n in nets}
    return [dict(about, items=len(x), format=n, ratio=q['median'], q1=q['q1'], q3=q['q3']) for n, q in qs.items()]


def linear(sparsity, goals, rounds, n=4096):
    "Rows of a linear layer with single zeros, a row per number of items"
    net, rows = masked(nn.Linear(n, n), sparsity), []
    for items, goal in goals.items():
        x = torch.randn(items, n)
        row, = measure(net, {'csr': materialize(net, x, fmt='csr', dead=False)}, x, rounds, layer=f'linear {n}x{n}', zeros='single', sparsity=sparsity)
        rows.append(row | dict(target=goal, met='yes' if row['ratio'] <= goal else 'no'))
    return rows


def blocks(block, rounds, n=4096, items=(1, 32, 256), sparsity=.9):
    "Rows of a linear layer whose zeros are blocks: in rows, and in blocks of that size and smaller"
    net = masked(nn.Linear(n, n), sparsity, block)
    nets = {k: freeze_layers(net, {'0': k}) for k in ['csr', *dict.fromkeys(f'bsr {b}x{b}' for b in (8, block))]}
    return [r for k in items for r in measure(net, nets, torch.randn(k, n), rounds, layer=f'linear {n}x{n}', zeros=f'{block}x{block}', sparsity=sparsity)]


def conv(shape, rounds, sparsity=.9):
    "A row of a 1x1 convolution"
    i, o, size, items = shape
    net, x = masked(nn.Conv2d(i, o, 1), sparsity), torch.randn(items, i, size, size)
    return measure(net, {'csr': materialize(net, x, fmt='csr', dead=False)}, x, rounds,
        layer=f'1x1 convolution {o}x{i}, {size}x{size} pixels', zeros='single', sparsity=sparsity)


def even(items, n=4096):
    "The density at which a linear layer is as fast as the dense one"
    even = break_even(n, n, items, dtype=torch.float32, rounds=3, kind='csr', pixels=()) # as `materialize` asked: remembered
    return dict(layer=f'linear {n}x{n}', zeros='single', items=items, format='csr', break_even=even)


def missed(rows): return [f"{r['sparsity']}, {r['items']} items: {r['ratio']:.3f} > {r['target']}" for r in rows if r.get('met') == 'no']


NOTE = """A forward of layers with bias that `materialize(fmt='csr')` made sparse, and of the same with blocks, relative to the
dense layer: medians and quartiles of the ratios within a round, CPU time, one thread, random inputs. A pass is repeated 50
times in a row with one item, 5 times with 32, so that a matrix that is small enough stays in the cache, as in a server; a first
pass after other work takes longer. `break_even` is the density below which rows were faster, found by timing."""


def run(rounds=15, n=4096):
    "All rows"
    torch.manual_seed(0)
    rows = [r for s, goals in TARGETS.items() for r in linear(s, goals, rounds, n)]
    rows += [r for b in BLOCKS for r in blocks(b, rounds, n)] + [r for shape in CONVS for r in conv(shape, rounds)]
    return rows + [even(k, n) for k in (1, 32, 256)]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--rounds', type=int, default=15)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(a.rounds)
    print(table(rows) if a.dry else write_table('csr_infer', rows, NOTE).read_text())
    if missed(rows): raise SystemExit('Missed: ' + '; '.join(missed(rows)))
