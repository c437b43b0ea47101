"""LeNet-300-100 on MNIST, dense: does the zoo's network learn what it should from the library's own loader, and what does a
batch of that loader cost? The reference for all experiments with fewer weights."""
import argparse
import os
import statistics
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from fastai.callback.progress import ProgressCallback
from benchmarks.timing import write_table
from paramfx import zoo

NAME, GOAL = 'mnist/lenet_300_100', 98.3
NOTE = f"""Validation on the 10,000 test images, after the last epoch; one-cycle schedule, Adam, weight decay .01, batches of 100,
one thread. Goal: at least {GOAL} % within 10 epochs. `loading` is the time that the loader takes for one batch, shuffling
included, over a whole epoch without training (goal: at most .1 ms)."""


def loading(dls) -> float:
    "Median time of a batch over five epochs, in milliseconds"
    def epoch():
        start = time.perf_counter()
        n = sum(1 for _ in dls.train)
        return 1000*(time.perf_counter()-start)/n
    epoch()
    return statistics.median(epoch() for _ in range(5))


def train(seed, dls, epochs=8, lr=3e-3):
    "Train once; a row of the table"
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    learn = Learner(dls, zoo.build(NAME), CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)
    start = time.perf_counter()
    with learn.no_logging(): learn.fit_one_cycle(epochs, lr, wd=.01)
    seconds = time.perf_counter()-start
    return dict(seed=seed, epochs=epochs, accuracy=round(100*float(learn.validate()[1]), 2), seconds=round(seconds, 1))


def run(seeds=3, epochs=8, dls=None):
    torch.set_num_threads(1)
    dls = dls or zoo.dls('mnist', device='cpu')
    ms = loading(dls)
    return [dict(network=NAME, **train(s, dls, epochs), goal=GOAL, loading_ms=round(ms, 4)) for s in range(seeds)]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=8)
    a = p.parse_args()
    print(write_table('lenet', run(a.seeds, a.epochs), NOTE).read_text())
