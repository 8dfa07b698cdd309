"""Where ModelScope's own package keeps a model that it has downloaded.

The layout of its cache is its own business and changes, so the package ``modelscope`` is asked, in a process of its
own: its import takes seconds and may bring torch. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

from tuft_jupyter.core.errors import UserError

ASK = """
import sys
from modelscope import snapshot_download
print("AT " + snapshot_download(sys.argv[1], local_files_only=True))
"""
ASK_SECONDS = 60.0


@functools.lru_cache(maxsize=64)
def directory(name: str) -> Path:
    """The directory of ModelScope model ``name`` in the local cache. UserError if it, or the package, is not there."""
    if importlib.util.find_spec("modelscope") is None:
        raise UserError(
            f"base model 'ms://{name}': the package modelscope, which knows where models of ModelScope lie, is not "
            "installed: pip install modelscope, or give the model's directory, or an id of Hugging Face"
        )
    fix = f"download it first, for example with: modelscope download --model {name}"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, name],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"base model 'ms://{name}': modelscope did not answer within {ASK_SECONDS:g} s"
        ) from None
    found = [line[3:] for line in asked.stdout.splitlines() if line.startswith("AT ")]
    if asked.returncode or not found or not Path(found[-1]).is_dir():
        raise UserError(f"base model 'ms://{name}' is not in ModelScope's cache on the server; {fix}")
    return Path(found[-1])
