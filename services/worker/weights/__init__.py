"""Checkpoints: files on disk as one shape of thing, whatever their format.

`checkpoint` is that shape and fills the decoder's weights from it; `safetensors` reads Hugging Face folders;
`gguf` reads GGUF files, with `gguf_file` for the format and `gguf_tokenizer` for the tokenizer inside.
"""
