"Everything of one wing, model slicing: `from paramfx.slicing.all import *`"
from .recurrent import *
from .switch import *
from .layers import *
from .plan import *
from .rates import *
from .parts import *
from .slice import *
from .passes import *
from .callback import *
from .tools import *
from .search import *
from .files import *
from .plots import *
from .serve import *
from .demo import *
