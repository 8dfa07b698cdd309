"""The muscles: training and sampling with plain torch, transformers and PEFT.

The modules here run without Ray, without HTTP and without asyncio; ``cluster`` alone puts them into actors.
"""
