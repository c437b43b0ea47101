"Everything of one wing, dynamic sparse training: `from paramfx.sparse.all import *`"
from .compute import *
from .sparsify import *
from .moves import *
from .exchange import *
from .rewirer import *
from .rewire import *
from .prune import *
from .load_masks import *
from .tied import *
from .published import *
from .plots import *
from .coding import *
from .container import *
from .tensors import *
from .files import *
from .demo import *
