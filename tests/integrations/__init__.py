# SPDX-License-Identifier: Apache-2.0
"""Integrations beside the packages that they patch."""
