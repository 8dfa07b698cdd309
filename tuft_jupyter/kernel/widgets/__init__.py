"""Views of the server's work in a notebook's output: :class:`LossCurve`, :class:`RunTable`, :class:`CheckpointTable`,
:class:`Playground`, :class:`GpuMeter`.

They work wherever anywidget does (JupyterLab, Notebook 7, VS Code). A widget holds names, not data: what it shows comes
from the server each time, so it is whole after a reload of the page and after a restart of the kernel.
"""

from tuft_jupyter.kernel.widgets.curve import LossCurve
from tuft_jupyter.kernel.widgets.meter import GpuMeter
from tuft_jupyter.kernel.widgets.playground import Playground
from tuft_jupyter.kernel.widgets.tables import CheckpointTable, RunTable

__all__ = ["CheckpointTable", "GpuMeter", "LossCurve", "Playground", "RunTable"]
