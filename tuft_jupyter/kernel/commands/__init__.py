"""The sub-commands of ``%tuft``, a small module per subject, listed in :mod:`~tuft_jupyter.kernel.commands.table`."""
