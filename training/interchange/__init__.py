"""Checkpoints in other formats than the snapshots of `training.checkpoint`: what others published, and what
their tools read.

`openai`: UNet weights of the consistency models of Song et al. 2023, read. `safetensors`: weights and a JSON
configuration in one file, read and written. `diffusers`: folders for `ConsistencyModelPipeline`, written.
`describe`: what a network is, for `convert.py info`.
"""
