"""Settings of sparse callbacks from one flat dict, for tests that sweep over methods and settings at once."""
from paramfx.core.clock import AllFits
from paramfx.sparse.methods import METHODS
from paramfx.sparse.penalties import L1


def sparse_settings(method='dsr', l1=0., epochs=None, **kw):
    "`kw` with what belongs to the method in its object; `l1=` and `epochs=` (of all fits) as objects"
    own = {k: kw.pop(k) for k in METHODS[method].__dataclass_fields__ if k in kw}
    if l1: kw['regularizer'] = L1(l1)
    if epochs: kw['span'] = AllFits(epochs)
    return dict(kw, method=METHODS[method](**own))
