# SPDX-License-Identifier: Apache-2.0
"""Ingest of models into the store: from the inbox, from callers, and from the hub."""
