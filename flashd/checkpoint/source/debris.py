# SPDX-License-Identifier: Apache-2.0
"""Recognises names in a folder that never belong to a model: hidden files, and debris of operating systems and NAS.

Some hidden names end in `.safetensors`: macOS writes an AppleDouble file `._NAME` for every file that it copies to a
foreign file system. git and huggingface_hub keep `.git` and `.cache` beside the files.
"""

from __future__ import annotations

# In lower case; Windows spells them in any.
_LEFT_BY_SYSTEMS = frozenset(
    {
        "__macosx", "icon\r", "temporary items", "network trash folder",  # macOS
        "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information",  # Windows
        "lost+found",  # ext4
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",  # Synology, QNAP
        "__pycache__",
    }
)  # fmt: skip


def is_debris(name: str) -> bool:
    """Tells whether a file or folder of this name cannot belong to a model."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS
