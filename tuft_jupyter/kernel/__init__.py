"""What runs in the user's kernel: finding or starting a server, connecting the stock SDK to it, ``%tuft``.

Light by promise: the standard library, psutil and IPython. Neither the SDK nor anything heavy is imported
before it is asked for. Of ours it imports ``config``, ``home`` and the version only.
"""
