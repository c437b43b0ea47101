"""A forward pass of a split network, relative to the dense one: the split part alone, and the whole beside what its multiply-adds promise.

Groups are equal; the split network computes what the masked dense one does, which is checked as it is made."""
import argparse
import os
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch import nn
from benchmarks.timing import paired, quartiles, table, write_table
from paramfx import zoo
from paramfx.report.cost import count_macs
from paramfx.splitnet.split import split_model

PART, BIG, OTHER, WRN = 1.15, 1.15, 1.05, .7  # at most this often 1/G, the ratio of multiply-adds at batch 32 and 224 pixels and elsewhere, dense
SIZES = ((32, 224), (1, 224), (32, 64), (1, 64))  # batch, pixels


class Top(nn.Module):
    "The part of a resnet that is split"
    def __init__(self, m): super().__init__(); self.layer4, self.pool, self.fc = m.layer4, m.avgpool, m.fc
    def forward(self, x): return self.fc(self.pool(self.layer4(x)).flatten(1))


@torch.no_grad()
def forwards(m, x, n=1):
    for _ in range(n): m(x)


def row(network, what, groups, batch, pixels, ratios, macs, target):
    q = quartiles([r/target[0] for r in ratios])
    return dict(network=network, what=what, groups=groups, batch=batch, pixels=pixels,
        time=quartiles(ratios)['median'], macs=macs, ratio=q['median'], q1=q['q1'], q3=q['q3'],
                target=target[1], met='yes' if q['median'] <= target[1] else 'no')


def compare(dense, split, x, rounds, n=1):
    "Ratios of time, and of multiply-adds"
    fns = {k: partial(forwards, m, x, n) for k, m in (('dense', dense), ('split', split))}
    with torch.no_grad(): t = paired(fns, rounds=rounds)
    a, b = (count_macs(m, (x[:1],))[0] for m in (dense, split))
    return [s/d for d, s in zip(t['dense'], t['split'])], b/a


def resnet(g, rounds, batch=32):
    from torchvision.models import resnet18
    torch.manual_seed(0)
    dense = resnet18().eval()
    split = split_model(dense, torch.randn(1, 3, 64, 64), splits={'layer4': g, 'fc': g}, classes='random')
    rows, x = [], torch.randn(batch, 256, 14, 14)
    r, macs = compare(Top(dense), Top(split), x, rounds)
    rows.append(row('resnet18', 'layer4 and fc alone x groups', g, batch, 224, r, macs, (1/g, PART)))
    for batch, pixels in SIZES:
        x = torch.randn(batch, 3, pixels, pixels)
        r, macs = compare(dense, split, x, rounds, 1 if batch*pixels > 500 else 10)
        rows.append(row('resnet18', 'whole / its share of multiply-adds', g, batch, pixels, r, macs, (macs, BIG if (batch, pixels) == SIZES[0] else OTHER)))
    return rows


def wrn(rounds):
    torch.manual_seed(0)
    dense = zoo.build('cifar100/wrn_16_8').eval()
    split = split_model(dense, torch.randn(1, 3, 32, 32), splits=[2, 4, 4], classes='random')
    rows = []
    for batch in (32, 1):
        r, macs = compare(dense, split, torch.randn(batch, 3, 32, 32), rounds)
        rows.append(row('WRN-16-8', 'whole / dense', '2-4-4', batch, 32, r, macs, (1, WRN)))
    return rows


NOTE = """In evaluation, without gradients, CPU time on one thread: medians and quartiles of the ratios within a round. `time`
is that of the split network relative to the dense one, `macs` the same for multiply-adds; `ratio` is `time` as `what` says, and
is compared with the target."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=15)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [*resnet(2, a.rounds), *resnet(4, a.rounds), *wrn(a.rounds)]
    print(table(rows) if a.dry else write_table('split_forward', rows, NOTE).read_text())
