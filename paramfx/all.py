"Everything a notebook needs: `from paramfx.all import *`"
from .core.all import *
from .report.all import *
from .channels.all import *
from .masks.all import *
from .kernels.all import *
from .data.all import *
from . import zoo
from .losses import *
from .export.all import *
from .bases.all import *
from .slicing.all import *
from .evolution.all import *
from .splitnet.all import *
from .sparse.all import *
