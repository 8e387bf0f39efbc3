"""Checkpoints on the disk, for whoever reads or writes them: no model, no process group.

`blocks` says what there is, `checks` and `tiling` what must hold, `manifest` is all of it as JSON. `pieces` writes tensor files,
`copies` reads rows from them, `verify` hashes everything again; `strict` opens what a stranger may have put there.
"""
