"Everything of one wing, layers that hold and multiply live values only: `from paramfx.kernels.all import *`"
from .csr import *
from .inference import *
from .timing import *
