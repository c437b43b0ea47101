"Everything of one wing, what every method stands on: `from paramfx.core.all import *`"
from .tables import *
from .samples import *
from .layers import *
from .optimizers import *
from .clock import *
from .state import *
from .callback import *
from .runs import *
from .forward import *
from .registry import *
from .arguments import *
