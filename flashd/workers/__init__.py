# SPDX-License-Identifier: Apache-2.0
"""Engine processes: the zygote that forks them, the gate, and the engines themselves."""
