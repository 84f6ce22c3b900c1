"""Models: one decoder for all families, driven by the checkpoint's own config.

`spec` reads the config, `families` holds what a config leaves unsaid, `rope` resolves position scaling,
`weights` is the fused layout, `decoder` the forward pass, `random` builds models without files.
"""
