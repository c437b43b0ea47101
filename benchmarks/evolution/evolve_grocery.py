"""Grocery Store photos at 64 pixels: a ResNet18 trained in generations from scratch, whole and slim, beside one run of as many epochs.

Needs `PARAMFX_DATA`. Half an hour on one core; what is finished is kept in a file, and the same command goes on from there."""
import argparse
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import paramfx.evolution.evolve # gives Learner evolve  # noqa: F401
import torch
from fastai.basics import set_seed
from benchmarks.evolution.evolve_digits import RATE, Timed, learner
from benchmarks.timing import table, write_table
from paramfx import zoo
from paramfx.core.samples import sample_batch
from paramfx.evolution.generations import Evaluation
from paramfx.evolution.masks import extract_slim
from paramfx.evolution.policies import KELS
from paramfx.data.photos import grocery_dls
from paramfx.report.cost import cost


def network(seed=0):
    set_seed(seed)
    return zoo.build('grocery/resnet18')


def run(generations=6, epochs=4, lr=1e-2, seed=0, net=network, dls=None, folder=Path('.'), bs=32):
    "A row per generation, one of the long run, and one of costs"
    learn, timed = learner(net(seed), dls or grocery_dls(bs=bs, device='cpu'), seed, path=folder, model_dir='.'), Timed()
    set_seed(seed)
    log = learn.evolve(generations, epochs, KELS(RATE), lr=lr, fit_method=timed, evaluation=Evaluation(long_run=True),
        file='evolve_grocery', resume=(folder/'evolve_grocery.pth').exists())
    minutes = dict(zip(range(generations+1, generations+1-len(timed.cpu), -1), reversed(timed.cpu)))  # where it went on, the first are missing
    rows = [dict(trained=f"generation {r['generation']}", epochs=epochs, dense=100*r['accuracy'], slim=100*r['slim_accuracy'], reset_norm=r['reset_norm'],
                 cpu_minutes=minutes.get(r['generation'], 0)/60, minutes=r['seconds']/60) for r in log]
    x = sample_batch(learn.dls)
    macs = [cost(m, x, latency=False).macs/1e6 for m in (learn.model, extract_slim(learn.model, x, RATE))]
    return rows + [dict(trained='one run', epochs=log.long_run['epochs'], dense=100*log.long_run['accuracy'],
        cpu_minutes=minutes[generations+1]/60, minutes=log.long_run['seconds']/60),
                   dict(trained='million multiply-adds', dense=macs[0], slim=macs[1])]


NOTE = """Top-1 on the 2,485 test photos of 81 classes, in percent; ResNet18 at 64x64 pixels from scratch, {generations}
generations of {epochs} epochs, split rate .5, batches of 32, one-cycle Adam at {lr:g}, one seed. `slim` is the fit part alone,
cut out and measured as it is. `one run`: the same first network, trained once for as many epochs as all generations have.
Generations this short show the mechanism, not the published gain; `reset_norm` is the norm of what the next generation loses
over that of what it keeps. Minutes of CPU time in training, one thread, and minutes on the clock of a machine that others use."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--generations', type=int, default=6)
    ap.add_argument('--epochs', type=int, default=4)
    ap.add_argument('--lr', type=float, default=1e-2)
    ap.add_argument('--state', type=Path, default=Path('.'), help='folder for the state of the evolution')
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(a.generations, a.epochs, a.lr, folder=a.state)
    note = NOTE.format(generations=a.generations, epochs=a.epochs, lr=a.lr)
    print(table(rows) if a.dry else write_table('evolve_grocery', rows, note).read_text())
