"""The engines: training and sampling with plain torch, transformers and PEFT.

Trainer and samplers are plain classes that run without Ray and HTTP; ``ray_engines`` alone puts them into actors.
"""
