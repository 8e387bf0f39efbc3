"""Checkpoints: a folder a step, safetensors files of pieces with hashes, a JSON manifest, and nothing pickled.

The format is `blocks` (what there is), `checks` (what must hold) and `manifest` (as JSON). `pieces` writes and reads tensor files.
"""
