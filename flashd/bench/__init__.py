# SPDX-License-Identifier: Apache-2.0
"""How fast is flashd on this machine, as a fraction of what the machine can do?"""
