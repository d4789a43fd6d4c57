# SPDX-License-Identifier: Apache-2.0
"""Management of the models in the store: renames, removals, verification, and deletion of unused checkpoints."""
