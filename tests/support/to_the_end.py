"""``python to_the_end.py [-c CODE | -m MODULE | FILE] ARGUMENTS``: as ``python`` does it, but for its very end.

What the program leaves to be done at its exit is done, and its status is its own. The interpreter is then not taken
apart: the HTTP client of the SDK, pyqwest, has threads that are unwound while that happens. On Pythons before 3.14 they
abort one process in fifty (curioswitch/pyqwest#164, PyO3/pyo3#6084), after the program has done all it does.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import threading
from pathlib import Path
from types import ModuleType


def main() -> None:
    kind, *sys.argv[:] = sys.argv[1:]
    if kind == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.path[0] = ""
        sys.modules["__main__"] = program = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(program))
    elif kind == "-m":
        sys.path[0] = os.fspath(Path.cwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, kind)
        sys.path[0] = os.fspath(Path(kind).parent.absolute())
        runpy.run_path(kind, run_name="__main__")


def status() -> int:
    """Run the program. Returns what ``python`` would have exited with."""
    try:
        main()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - the program's, told as the interpreter tells it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    ended = status()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
