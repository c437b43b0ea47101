"""Two other ways to find out which channels of a network belong together; neither knows the tracer.

`nan_probe` runs the whole network with NaN in the channels that are to go and looks where they arrive. `coupled` asks the
dependency graph of Torch-Pruning. `cut_channels` and `unit_channels` say the same of a `Cut` and of a unit of a `ChannelMap`."""
import warnings
from math import ceil

import numpy as np
import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _alive(x, dim):
    "Which channels of `x` along `dim` hold numbers; one that is NaN only in places is an error"
    nan = x.isnan().transpose(0, dim).flatten(1)
    if (nan.any(1) != nan.all(1)).any(): raise AssertionError(f'NaN in a part of a channel: {(nan.any(1) & ~nan.all(1)).nonzero().flatten().tolist()}')
    return ~nan.any(1).numpy()


def _grouped(live, groups, n_out, gone, name):
    "Which of the `n_out` rows of a grouped convolution live: whole groups do, or the same channels of every group"
    g = live.reshape(groups, -1)
    whole,alike = (g.any(1) == g.all(1)).all(),(g == g[:1]).all()
    rows = g.any(1).repeat(n_out//groups) if gone is None else np.isin(np.arange(n_out), gone, invert=True)
    r = rows.reshape(groups, -1)
    if not (whole and (r == g[:, :1]).all() or alike and (r == r[:1]).all()): raise AssertionError(f'{name}: its groups are left with different shapes')
    return rows


def nan_probe(
    model, # Network in evaluation mode
    xs, # Tuple of inputs
    dead, # Called with (name, module, number of rows) of each convolution and linear layer; the rows that go, or None: the groups decide
) -> dict: # Name of each convolution, linear layer and batch norm -> (live inputs, live outputs)
    "Which channels each layer reads and hands out when the producers' dead rows are NaN; hooks on modules only"
    res, handles, stash = {}, [], {}
    names = {m: n for n, m in model.named_modules() if isinstance(m, (*PRODUCERS, *BATCH_NORMS))}
    dim = lambda m: -1 if isinstance(m, nn.Linear) else 1

    def enter(m, args):
        stash[m] = _alive(args[0], dim(m))
        return (args[0].nan_to_num(0.), *args[1:])

    def leave(m, args, out):
        name, live, n = names[m], stash.pop(m), out.shape[dim(m)]
        if isinstance(m, BATCH_NORMS): rows = live
        elif getattr(m, 'groups', 1) > 1: rows = _grouped(live, m.groups, n, dead(name, m, n), name)
        else: rows = np.isin(np.arange(n), dead(name, m, n), invert=True)
        before = res.setdefault(name, (live, rows))
        if not all(map(np.array_equal, before, (live, rows))): raise AssertionError(f'{name}: reads other channels at its second use')
        return out.index_fill(dim(m), torch.from_numpy(np.flatnonzero(~rows)), float('nan'))

    try:
        for m in names: handles += [m.register_forward_pre_hook(enter), m.register_forward_hook(leave)]
        with torch.no_grad(): out = model(*xs)
    finally:
        for h in handles: h.remove()
    if out.isnan().any(): raise AssertionError('NaN in the output: a layer that makes it lost rows')
    return res


def last_producer(model, xs):
    "Name of the convolution or linear layer that runs last"
    seen, handles = [], []
    for n, m in model.named_modules():
        if isinstance(m, PRODUCERS): handles.append(m.register_forward_hook(lambda m, a, o, n=n: seen.append(n)))
    with torch.no_grad(): model(*xs)
    for h in handles: h.remove()
    return seen[-1]


def prefix(rate, whole, unit=lambda name: 1):
    "For `nan_probe`: each layer but `whole` keeps the first rows, rounded up to units of rows; a grouped one those of the groups it reads"
    def dead(name, m, n):
        if getattr(m, 'groups', 1) > 1: return None
        return [] if name == whole else range(unit(name)*ceil(n//unit(name)*rate), n)
    return dead


def cut_channels(cmap, cut):
    "Name of each module that the cut speaks of -> {'in' or 'out': live channels}"
    res = {}
    def put(name, side, lab, old=None):
        idx = cut.index(lab)
        res.setdefault(name, {})[side] = np.ones(len(lab), bool) if idx is None else np.isin(np.arange(len(lab)), idx)
    for (name, t, d), (kind, lab) in cmap.bindings.items():
        if t != 'weight': continue
        if 'cols' in kind: put(name, 'in', lab)
        if kind != 'cols': put(name, 'out', lab)
        if kind == 'pass' and name not in cmap.groups: put(name, 'in', lab)
    for name, lab in cmap.groups.items(): res[name]['in'] = cut.live[lab] # one per group
    return res


def disagreements(
    model, xs, cmap, cut, dead # As for `nan_probe`; `dead` must ask for what `cut` does
) -> tuple: # Number of checks, names of the layers and sides that differ
    "Compare the live channels of all convolutions, linear layers and batch norms"
    ours, n, bad = cut_channels(cmap, cut), 0, []
    for name, live in nan_probe(model, xs, dead).items():
        for side, want in zip(('in', 'out'), live):
            got = ours.get(name, {}).get(side, np.ones(len(want), bool)) # not in the map: it reads the input of the network
            if len(got) < len(want): got = (np.repeat if name in cmap.groups else np.tile)(got, len(want)//len(got)) # whole groups, or alike
            n += 1
            if not np.array_equal(got, want): bad.append((name, side))
    return n, bad


def unit_channels(cmap, space, unit):
    "(module, 'in' or 'out', channel) of all that goes with a unit; norms and depthwise layers count as 'out'"
    lab = cmap.units[cmap.find(space)][unit]
    return {(m, 'in' if kind == 'cols' else 'out', int(i)) for (m, t, d), (kind, labs) in cmap.bindings.items()
            if t == 'weight' for i in np.flatnonzero(labs == lab)}


class Coupled:
    "What Torch-Pruning would prune together with a row of a layer, as `unit_channels` says it"
    def __init__(self, model, xs):
        import torch_pruning as tp
        self.tp, self.names = tp, {m: n for n, m in model.named_modules()}
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.graph = tp.DependencyGraph().build_dependency(model, example_inputs=xs)
        self.model = model

    def __call__(self, name, row):
        layer, res = self.model.get_submodule(name), set()
        prune = self.tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else self.tp.prune_conv_out_channels
        for dep, idxs in self.graph.get_pruning_group(layer, prune, [row]):
            m = dep.target.module
            if not isinstance(m, (*PRODUCERS, *BATCH_NORMS)): continue
            out = self.graph.is_out_channel_pruning_fn(dep.handler) or isinstance(m, BATCH_NORMS) or getattr(m, 'groups', 1) > 1
            res |= {(self.names[m], 'out' if out else 'in', int(i)) for i in idxs}
        return res
