"""``python -m tuft_jupyter_server``: the same as ``tuft``, but that a configuration must be named."""

import sys

from tuft_jupyter.cli import main

if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.stderr.write("tuft_jupyter_server: name a configuration: --config FILE (-c FILE)\n")
        raise SystemExit(2)
    raise SystemExit(main())
