"""Settings of callbacks from one flat dict, for tests that sweep over methods and settings at once."""
from dataclasses import fields

from paramfx.core.clock import AllFits
from paramfx.evolution.forgetting import Rewind
from paramfx.evolution.generations import Evaluation
from paramfx.evolution.policies import POLICIES
from paramfx.slicing.rates import RateDraw
from paramfx.slicing.slice import Slicing
from paramfx.sparse.methods import METHODS
from paramfx.sparse.penalties import L1
from paramfx.splitnet.callback import SplitPenalty


def sparse_settings(method='dsr', l1=0., epochs=None, **kw):
    "`kw` with what belongs to the method in its object; `l1=` and `epochs=` (of all fits) as objects"
    own = {k: kw.pop(k) for k in METHODS[method].__dataclass_fields__ if k in kw}
    if l1: kw['regularizer'] = L1(l1)
    if epochs: kw['span'] = AllFits(epochs)
    return dict(kw, method=METHODS[method](**own))


def taken(kw, cls):
    "Those of `kw` that are fields of `cls`; they are no longer in `kw`"
    return {f.name: kw.pop(f.name) for f in fields(cls) if f.name in kw}


def slice_settings(**kw):
    "The same for `SliceTrain`"
    draw, slicing = RateDraw(**taken(kw, RateDraw)), Slicing(**taken(kw, Slicing))
    return dict(kw, schedule=draw, slicing=slicing)


def split_settings(**kw):
    "The same for `SplitNet`"
    return dict(regularizer=SplitPenalty(**taken(kw, SplitPenalty))) | kw


def evolve_settings(policy='kels', rewind_epoch=None, **kw):
    "The same for `KnowledgeEvolution` and `learn.evolve`: settings of the policy and of the evaluation, and the epoch to rewind to"
    seed = {'seed': kw.pop('seed')} if 'seed' in kw else {}
    own = taken(kw, POLICIES[policy]) if isinstance(policy, str) and policy in POLICIES else {}
    seen = {new: kw.pop(k) for k, new in dict(eval_slim='slim', keep_best='keep_best', long_run='long_run').items() if k in kw}
    if seen: kw['evaluation'] = Evaluation(**seen)
    if rewind_epoch is not None: kw['reinit'] = Rewind(rewind_epoch)
    return dict(kw, policy=POLICIES[policy](**own) if own else policy, **seed)
