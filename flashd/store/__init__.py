# SPDX-License-Identifier: Apache-2.0
"""The store: checkpoints and images on disk, the names of models, and the inbox."""
