"""Checkpoints in formats of other tools.

`openai` reads UNet weights of the consistency models of Song et al. 2023. `safetensors` reads and writes
weights and a JSON configuration in one file. `diffusers` writes folders for diffusers'
`ConsistencyModelPipeline`. `describe` describes a network for `convert.py info`.
"""
