"""Settings of callbacks from one flat dict, for tests that sweep over methods and settings at once."""
from dataclasses import fields

from paramfx.core.clock import AllFits
from paramfx.slicing.rates import RateDraw
from paramfx.slicing.slice import Slicing
from paramfx.sparse.methods import METHODS
from paramfx.sparse.penalties import L1


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
