# SPDX-License-Identifier: Apache-2.0
"""Start, self-monitoring and end of the daemon, and its succession by the next one."""
