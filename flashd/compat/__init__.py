# SPDX-License-Identifier: Apache-2.0
"""Lets programs written for other loaders use flashd, as clients of the daemon."""
