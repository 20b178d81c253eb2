"""Population statistics: the statistics for test time, measured over a data set."""

from .report import LayerShift as LayerShift
from .report import Recalibration as Recalibration
from .session import recalibrate as recalibrate

__all__ = ["LayerShift", "Recalibration", "recalibrate"]
