"""A forward pass of a sliced network, relative to the subnet cut out of it; the switch between rates; and the time of a narrow slice.

Both of a pair compute the same to the bit: the subnet is `materialize(model, sample, rate=r)`."""
import argparse
import os
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from benchmarks.timing import paired, quartiles, table, write_table
from paramfx.export.materialize import materialize
from paramfx.slicing.slice import at_rate, set_rate, slice_model

NETS, RATES, BATCHES, SIZE = ('resnet18', 'resnet50'), (.5, .25), {1: 1.10, 8: 1.05}, 224  # batch size -> at most this often the subnet's time
SWITCH_US, NARROW = 10, .15  # microseconds of a switch; share of the full latency at .25, resnet50, batch 1


def build(name, size):
    import torchvision
    torch.manual_seed(0)
    m = getattr(torchvision.models, name)(num_classes=10).eval()
    slice_model(m, torch.randn(1, 3, 64, 64), rates=(1, *RATES))
    return m


@torch.no_grad()
def forwards(m, x, n=1):
    for _ in range(n): m(x)


def switches(m, n=1000):
    for _ in range(n//2):
        set_rate(m, .25)
        set_rate(m, 1)


def row(name, what, rate, batch, ratios, target, **more):
    q = quartiles(ratios)
    return dict(network=name, what=what, rate=rate, batch=batch, ratio=q['median'], q1=q['q1'], q3=q['q3'], target=target,
                met='yes' if q['median'] <= target else 'no', **more)


def measure(name, rounds, size=SIZE):
    "Rows of one network"
    m, rows = build(name, size), []
    for rate in RATES:
        slim = materialize(m, torch.randn(1, 3, 64, 64), rate=rate)
        for batch, target in BATCHES.items():
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            with at_rate(m, rate), torch.no_grad():
                assert torch.equal(m(x), slim(x)), 'the slice does not compute what the subnet does'
                t = paired(dict(subnet=partial(forwards, slim, x), slice=partial(forwards, m, x)), rounds=rounds)
            rows.append(row(name, 'slice / subnet', rate, batch, [b/a for a, b in zip(t['subnet'], t['slice'])], target))
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    def run(rate): set_rate(m, rate); forwards(m, x)
    t = paired({r: partial(run, r) for r in (1, *RATES)}, rounds=rounds)
    for r in RATES: rows.append(row(name, 'slice / full width', r, 1, [b/a for a, b in zip(t[1], t[r])], NARROW if (name, r) == ('resnet50', .25) else 1.))
    t = paired(dict(switch=partial(switches, m)), rounds=rounds)['switch']
    rows.append(row(name, 'switch, microseconds', '', '', [1e6*s/1000 for s in t], SWITCH_US))
    return rows


NOTE = f"""Sliced networks of {SIZE} x {SIZE} pixels in evaluation, without gradients, CPU time on one thread: medians and quartiles of the ratios
within a round. The first passes, which make the copies that a slice keeps, are not counted. `switch` is a call of `set_rate`."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=25)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [r for n in NETS for r in measure(n, a.rounds)]
    print(table(rows) if a.dry else write_table('slice_forward', rows, NOTE).read_text())
