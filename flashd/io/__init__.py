# SPDX-License-Identifier: Apache-2.0
"""Typed interfaces to the native streamer, the CUDA driver and the kernel's sandbox."""
