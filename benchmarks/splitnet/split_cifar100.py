"""CIFAR-100: groups of classes that a small residual network learns, beside the 20 superclasses; and what the split costs.

Three stages of basic blocks on half-size pictures, so that a run takes minutes; needs `PARAMFX_DATA`. Three networks go on from
one trained start: dense, with `SplitNet`, and nothing at all, which is what is split at random."""
import argparse
import os
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import torch
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.progress import ProgressCallback
from pathlib import Path
from torch import nn
from benchmarks.slicing.slice_digits import fit, score
from benchmarks.timing import table, write_table
from paramfx.core.samples import sample_batch
from paramfx.core.forward import copy_model
from paramfx.data.images import cifar_dls
from paramfx.report.cost import cost
from paramfx.splitnet.groups import class_groups
from paramfx.splitnet.split import masked_model, split_model
from paramfx.splitnet.plan import split_plan
from paramfx.splitnet.callback import SplitNet, SplitPenalty

# the 20 superclasses of CIFAR-100, five classes each
SUPER = {o.split(': ')[0]: o.split(': ')[1].split() for o in """aquatic mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food containers: bottle bowl can cup plate
fruit and vegetables: apple mushroom orange pear sweet_pepper
household electrical devices: clock keyboard lamp telephone television
household furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large carnivores: bear leopard lion tiger wolf
large man-made outdoor things: bridge castle house road skyscraper
large natural outdoor scenes: cloud forest mountain plain sea
large omnivores and herbivores: camel cattle chimpanzee elephant kangaroo
medium-sized mammals: fox porcupine possum raccoon skunk
non-insect invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles 1: bicycle bus motorcycle pickup_truck train
vehicles 2: lawn_mower rocket streetcar tank tractor""".splitlines()}
GROUPS, WIDTHS = 4, (24, 48, 96)
# the penalties five times as large as by default: the pull at a weight falls with their number, and the fit is short
HOW = dict(gamma_weight=5., gamma_disjoint=5., gamma_balance=50., disjoint_warmup=(.1, .4))
ASSIGN_LR = 3e-2


def network(seed, n_classes=100, widths=WIDTHS):
    "A residual network of torchvision's basic blocks"
    from collections import OrderedDict
    from torchvision.models.resnet import BasicBlock
    set_seed(seed)
    def block(n_in, n, stride):
        down = None if stride == 1 and n_in == n else nn.Sequential(nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n))
        return BasicBlock(n_in, n, stride, down)
    a, b, c = widths
    return nn.Sequential(OrderedDict(stem=nn.Sequential(nn.Conv2d(3, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a),
        nn.ReLU()), layer1=block(a, a, 1), layer2=block(a, b, 2),
                                     layer3=nn.Sequential(block(b, c, 2), block(c, c, 1)),
                                     pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(c, n_classes)))


class NoValid(Callback):
    "The test images are looked at once, at the end"
    def before_validate(self): raise CancelValidException


def learner(net, seed, **kw):
    dls = cifar_dls(n_classes=100, bs=64, device='cpu', **kw)
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)


def coarse(vocab, table=SUPER):
    "Number of the superclass of each class"
    of = {c: i for i, cs in enumerate(table.values()) for c in cs}
    return np.array([of[c] for c in vocab])


def agreement(groups, supers):
    "How well groups fit superclasses: adjusted Rand index, normalized mutual information, and pairs of a superclass that are in one group"
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    g = np.asarray(groups)
    same = (supers[:, None] == supers) & ~np.eye(len(g), dtype=bool)
    return dict(ari=float(adjusted_rand_score(supers, g)), nmi=float(normalized_mutual_info_score(supers, g)),
        together=100*float((g[:, None] == g)[same].mean()))


def by_chance(groups, supers, n=1000):
    "The same of `n` partitions with groups of these sizes: means, and the best index"
    rng = np.random.default_rng(0)
    got = [agreement(rng.permutation(np.asarray(groups)), supers) for _ in range(n)]
    return {k: float(np.mean([o[k] for o in got])) for k in got[0]} | dict(best_ari=max(o['ari'] for o in got))


def splits(): return {'layer3': GROUPS, 'fc': GROUPS}


def classes_of(model, x, how, seed=0):
    "Group of each class, as `split_model` would choose it"
    plan = split_plan(model, x, splits())
    return class_groups(model, plan, how, seed)


def row(what, model, dls, x, seconds=None, **kw):
    c = cost(model, x, latency=False)
    return dict(network=what, accuracy=score(model, dls), parameters=c.params,
        million_macs=c.macs/1e6) | ({} if seconds is None else dict(seconds=seconds)) | kw


def kept(model, file, go):
    "A network and the seconds its training took, from `file`; trained by `go`, where there is no such file"
    if file is None or not file.exists():
        learn, seconds = go()
        if file is not None: torch.save((learn.model.state_dict(), seconds), file)
        return learn.model, seconds
    state, seconds = torch.load(file, weights_only=True)
    model.load_state_dict(state)
    return model, seconds


def run(seed=0, epochs=8, tune=3, lr=1e-2, make=learner, net=network, table=SUPER, keep=None, tell=lambda row: None):
    "A row per network, and the learned groups by name"
    rows = []
    def add(*args, **kw): rows.append(row(*args, **kw)); tell(rows[-1])
    def go_on(model, n, rate, cb=None):
        learn = make(model, seed)
        if cb is None: return learn, fit(learn, n, rate, [NoValid()])
        begun = time.process_time()
        with learn.add_cb(cb).no_logging(): learn.fit(n, rate, cbs=NoValid())  # at a constant rate, so that weights between groups go on shrinking
        return learn, time.process_time()-begun
    file = lambda what: None if keep is None else Path(keep)/f'{what}_{epochs}_{lr:g}_{seed}.pth'
    start, first = kept(net(seed), file('start'), lambda: go_on(net(seed), epochs, lr))
    dense, more = kept(net(seed), file('dense'), lambda: go_on(copy_model(start), epochs, lr/2))
    dls = make(start, seed).dls
    x = sample_batch(dls)
    supers = coarse(dls.vocab, table)
    add('dense', dense, dls, x, first+more)
    cb = SplitNet(splits(), SplitPenalty(**HOW), assign_lr=ASSIGN_LR)
    learn, took = go_on(copy_model(start), epochs, lr/5, cb)
    groups, left = cb.groups(), cb.history[-1]
    learn.materialize(x)
    add('with SplitNet, uncut', learn.model, dls, x, took, weight_left=left['weight'], undecided=left['disjoint'])
    ways = {'learned': (learn.model, dict(groups=groups), groups[[*groups][-1]])}
    for how in ('cluster', 'random'): ways[how] = dense, dict(classes=how, seed=seed), classes_of(dense, x, how, seed)
    for how, (model, kw, top) in ways.items():
        add(f'{how}, masked', masked_model(model, x, splits=splits(), **kw), dls, x, **agreement(top, supers))
        new, took = go_on(split_model(model, x, splits=splits(), **kw), tune, lr/4)
        add(f'{how}, split and finetuned', new.model, dls, x, took)
    top = ways['learned'][2]
    rows.append(dict(network='1000 partitions of those sizes, mean') | by_chance(top, supers))
    even = np.sort(supers)
    rows.append(dict(network='whole superclasses, as evenly as it goes') | agreement(even*GROUPS//(even.max()+1), even))
    return rows, {f'group {g+1}': [c for c, i in zip(dls.vocab, top.tolist()) if i == g] for g in range(GROUPS)}


NOTE = """{groups} groups of classes, learned by a residual network in its last stage and classifier, one seed, 100 training
images per class, all test images, pictures of 16x16 after the first layer. One dense network is trained for {epochs} epochs;
dense and SplitNet go on from there for {epochs} more, the dense one is then cut along spectral clusters of its classifier's
rows, and at random; all are finetuned for {tune} epochs. SplitNet's settings: {gammas}. Accuracy in percent; seconds of CPU
time of each row's own training, {minutes:.0f} minutes in all. Agreement with the 20 superclasses: adjusted Rand index,
normalized mutual information, and the percentage of pairs of one superclass that are in one group.

{named}"""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--epochs', type=int, default=8)
    ap.add_argument('--tune', type=int, default=3)
    ap.add_argument('--lr', type=float, default=1e-2)
    ap.add_argument('--networks', help='folder that keeps the dense networks for another run')
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows, named = run(epochs=a.epochs, tune=a.tune, lr=a.lr, keep=a.networks, tell=lambda r: print(r, flush=True))
    note = NOTE.format(groups=GROUPS, epochs=a.epochs, tune=a.tune,
        gammas=', '.join(f'{k}={v}' for k, v in [*HOW.items(), ('assign_lr', ASSIGN_LR)]), minutes=sum(r.get('seconds', 0) for r in rows)/60,
        named='\n'.join(f'- {k} ({len(v)}): {", ".join(v)}' for k, v in named.items()))
    print(table(rows)+note if a.dry else write_table('split_cifar100', rows, note, runs=[named]).read_text())
