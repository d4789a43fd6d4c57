# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: a folder that other tools can read too.

    model.safetensors   the weights: one valid safetensors file
    digests.b3          32-byte BLAKE3 digests of the blocks of its data region
    manifest.toml       metadata, read without the weights (flashd/checkpoint/manifest.py)
    config.json, tokenizer.json, ...   the side files of the source, unchanged

**model.safetensors.** Eight bytes of length, little-endian; JSON, padded with spaces so that the data region starts at
a multiple of 4096 bytes (the format allows trailing spaces); the data region. Tensors whose size is a multiple of 256
bytes come first, by name; the others follow in descending order of the power of two in their size, then by name, so
that every tensor is aligned at least to its element. There are no holes and no trailing bytes. A tensor that the source
has under several names is stored once; `__metadata__["flashd.aliases"]` is a JSON object from each additional name to
the stored one. So the data region is the arena, byte for byte: loading is one large aligned read.

**digests.b3.** Block i covers bytes [i·B, (i+1)·B) of the data region, where B is
`digest_block_bytes` of the manifest; the last block may be short. The digests of the header and of this table are in
the manifest.

**Addresses.** `weights` = BLAKE3(BLAKE3(header) || BLAKE3(digests.b3)), the header being all bytes before the data.
`id` = BLAKE3 of `weights` and the names and digests of the side files, one per line, sorted by name. Everything is
addressed by content, so equal bytes are the same checkpoint, and a changed byte is detected.

**A GGUF file** is stored as it is: it is the one tensor, `gguf`, of bytes, and the arena is a copy of the file. Parts
are joined before. `gguf.json` tells what the file says of its model, and marks such a checkpoint.

**Images and ranks** use the same file format, with one file per rank.
"""
