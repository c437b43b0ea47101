"Everything of one wing, which channels belong together, and exact cuts: `from paramfx.channels.all import *`"
from .ids import *
from .rules import *
from .recurrent import *
from .spaces import *
from .cuts import *
from .trace import *
from .dead import *
