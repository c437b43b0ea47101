"Everything of one wing, units, masks and densities: `from paramfx.masks.all import *`"
from .units import *
from .store import *
