"""``python -m tuft_jupyter_server``: the same as ``tuft``."""

from tuft_jupyter.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
